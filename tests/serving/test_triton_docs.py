"""The Python blocks of docs/triton.md run as written against a published release."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiertcn.export.tensors import LENGTH_BUCKETS, MAX_BATCH
from hiertcn.release.publish import ReleaseInput, publish
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.processes.triton import TritonServer

PAGE = Path(__file__).parents[2] / "docs" / "triton.md"


def test_the_code_blocks_run_and_compute_what_torch_does(
    exported_model, release_parts, tmp_path: Path
) -> None:
    repository = ReleaseRepository(tmp_path / "repository")
    exported = exported_model(0)
    info = ReleaseInput(data_date="2026-01-01")
    number = publish(repository, release_parts(0), exported.files, info)
    repository.activate(number)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    log = tmp_path / "triton.log"
    with TritonServer(repository.triton_repository, grpc_port=0, http_port=0, log=log) as triton:
        triton.load("tcn", [number])
        triton.load("gru_step", [number])
        code = "\n".join(blocks)
        for written, here in (
            ('"localhost:8001"', repr(triton.grpc_url)),
            ('".demo/repository"', repr(str(repository.root))),
        ):
            assert code.count(written) == 1
            code = code.replace(written, here)
        exec(compile(code, str(PAGE), "exec"), names)
    model, vectors = exported.model, torch.from_numpy(names["table"].gather([0, 1, 2]))
    start = model.start_state.detach()
    with torch.no_grad():
        expected = model.encode(vectors, torch.tensor([3]), start[-1:])[-1:]
        after = model.gru_step(start.unsqueeze(0), vectors.mean(0, keepdim=True))
    np.testing.assert_allclose(names["user_embedding"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(names["next_state"], after, rtol=1e-4, atol=1e-5)
    assert len(names["best"]) == 10
    assert names["known"].shape == start.shape


def test_the_page_states_the_limits_that_the_code_has() -> None:
    text = " ".join(PAGE.read_text().split())
    assert f"{MAX_BATCH['tcn']} sessions for `tcn` and {MAX_BATCH['gru_step']} for" in text
    *smaller, largest = map(str, LENGTH_BUCKETS)
    assert f"Pad to {', '.join(smaller)} or {largest} positions" in text

"""The exported files: one file each, dynamic, equal to torch, and refused where they are not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from hiertcn.errors import InputError
from hiertcn.export.onnx import export_model
from hiertcn.export.parity import prove_parity
from hiertcn.export.session import open_session
from hiertcn.export.tensors import INPUTS, OUTPUTS, TensorSpec
from hiertcn.files import read_json
from models.hiertcn_serving import GruStep, TcnCone


def test_each_model_is_one_file_with_the_contracts_tensors(exported_model) -> None:
    exported = exported_model(0)
    for name, path in exported.files.items():
        assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
        session = open_session(path)
        assert [one.name for one in session.get_inputs()] == [s.name for s in INPUTS[name]]
        assert [one.name for one in session.get_outputs()] == [s.name for s in OUTPUTS[name]]
        for found, spec in zip(session.get_inputs(), INPUTS[name], strict=True):
            assert len(found.shape) == 1 + len(spec.dims)
            assert isinstance(found.shape[0], str), "the batch axis must stay free"


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 4), (17, 3), (4, 128)])
def test_tcn_computes_what_the_trained_model_does(exported_model, batch: int, length: int) -> None:
    exported = exported_model(0)
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(0, length + 1, (batch,), generator=generator)
    items = torch.randn(batch, length, 6, generator=generator)
    state = torch.randn(batch, 8, generator=generator)
    packed = torch.cat([row[:count].flip(0) for row, count in zip(items, lengths, strict=True)])
    with torch.no_grad():
        expected = exported.model.encode(packed, lengths, state)[(lengths + 1).cumsum(0) - 1]
    (got,) = open_session(exported.files["tcn"]).run(
        None,
        {
            "session_items": items.numpy(),
            "session_length": lengths.to(torch.int32).unsqueeze(1).numpy(),
            "user_state": state.numpy(),
        },
    )
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_proof_and_the_start_state_lie_beside_the_models(exported_model) -> None:
    exported = exported_model(0)
    proof = read_json(exported.directory / "parity.json")
    for name in ("tcn", "gru_step"):
        assert proof[name]["max_error"] <= proof[name]["tolerance"]
        assert len(proof[name]["cases"]) >= 4
    start = np.load(exported.directory / "start_state.npy", allow_pickle=False)
    np.testing.assert_array_equal(start, exported.model.start_state.detach().numpy())


def test_a_file_that_computes_something_else_is_refused(exported_model, tmp_path: Path) -> None:
    exported = exported_model(0)
    path = tmp_path / "model.onnx"
    graph = onnx.load(exported.files["gru_step"])
    weight = max(graph.graph.initializer, key=lambda one: np.prod(one.dims))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(graph, path)
    cases = [(torch.randn(2, 2, 8), torch.randn(2, 6))]
    prove_parity(GruStep(exported.model), exported.files["gru_step"], cases)
    with pytest.raises(InputError, match="differs from torch"):
        prove_parity(GruStep(exported.model), path, cases)


def test_nan_weights_do_not_pass_the_proof(exported_model) -> None:
    exported = exported_model(0)
    broken = TcnCone(exported.model)
    with torch.no_grad():
        broken.start_item.fill_(torch.nan)
    cases = [(torch.randn(1, 2, 6), torch.tensor([[1]], dtype=torch.int32), torch.randn(1, 8))]
    with pytest.raises(InputError, match="differs from torch by nan"):
        prove_parity(broken, exported.files["tcn"], cases)


def test_a_shape_the_file_cannot_take_is_named(exported_model) -> None:
    exported = exported_model(0)
    with pytest.raises(InputError, match="does not run for"):
        prove_parity(
            torch.nn.Bilinear(3, 6, 1),
            exported.files["gru_step"],
            [(torch.randn(2, 3), torch.randn(2, 6))],
        )


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"model\.onnx is not an ONNX model"):
        open_session(path)


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (torch.randn(1, 3), "longer than 1"),
        (torch.randn(2, 3, 4), "expected torch.float32 with 2 axes"),
        (torch.ones(2, 3, dtype=torch.int64), "expected torch.float32"),
    ],
)
def test_a_bad_example_is_refused_and_leaves_no_file(
    tmp_path: Path, example: torch.Tensor, reason: str
) -> None:
    spec = TensorSpec("x", "FP32", (-1,))
    with pytest.raises(InputError, match=reason):
        export_model(torch.nn.ReLU(), [example], [spec], [spec], tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []

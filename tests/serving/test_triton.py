"""A real Triton on a published repository: two versions, errors, and its end in every way."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from google.protobuf import text_format
from tritonclient import grpc as triton_grpc
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from hiertcn.errors import InputError, ReleaseError, ServingError
from hiertcn.export.tensors import INPUTS, MAX_BATCH, OUTPUTS
from hiertcn.release.publish import ReleaseInput, publish
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.processes.triton import TritonServer, find_tritonserver
from hiertcn.serving.processes.triton_install import TritonInstall
from models.hiertcn_serving import GruStep, TcnCone
from tests.waiting import WAIT_S

ROOT = Path(__file__).parents[2]
FIRST, SECOND = 2026010101, 2026010201


@pytest.fixture(scope="module")
def repository(
    exported_model, release_parts, tmp_path_factory: pytest.TempPathFactory
) -> ReleaseRepository:
    """Two releases: exported models of seed 0 and seed 1."""
    repository = ReleaseRepository(tmp_path_factory.mktemp("repository"))
    for seed, date in enumerate(("2026-01-01", "2026-01-02")):
        info = ReleaseInput(data_date=date)
        publish(repository, release_parts(seed), exported_model(seed).files, info)
    return repository


@pytest.fixture(scope="module")
def triton(
    repository: ReleaseRepository, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("triton") / "triton.log"
    with TritonServer(repository.triton_repository, grpc_port=0, http_port=0, log=log) as server:
        for model in ("tcn", "gru_step"):
            server.load(model, [FIRST, SECOND])
        yield server


def _infer(
    server: TritonServer, model: str, version: int, tensors: list[torch.Tensor]
) -> np.ndarray:
    client = triton_grpc.InferenceServerClient(server.grpc_url)
    inputs = []
    for spec, tensor in zip(INPUTS[model], tensors, strict=True):
        inputs.append(triton_grpc.InferInput(spec.name, list(tensor.shape), spec.datatype))
        inputs[-1].set_data_from_numpy(tensor.numpy())
    result = client.infer(model, inputs, model_version=str(version), client_timeout=WAIT_S)
    client.close()
    return result.as_numpy(OUTPUTS[model][0].name)


def _tcn_inputs(batch: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return [
        torch.randn(batch, length, 6, generator=generator),
        torch.randint(0, length + 1, (batch, 1), generator=generator, dtype=torch.int32),
        torch.randn(batch, 8, generator=generator),
    ]


@pytest.mark.parametrize("model", ["tcn", "gru_step", "item_encoder"])
def test_config_agrees_with_the_tensors(model: str) -> None:
    text = (ROOT / "triton_repo" / model / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    for entries, specs in ((config.input, INPUTS[model]), (config.output, OUTPUTS[model])):
        assert [
            (one.name, model_config_pb2.DataType.Name(one.data_type), tuple(one.dims))
            for one in entries
        ] == [(spec.name, f"TYPE_{spec.datatype}", spec.dims) for spec in specs]
    assert config.name == model
    assert config.backend == "onnxruntime"
    assert config.max_batch_size == MAX_BATCH[model]
    assert config.version_policy.latest.num_versions == 2
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    assert config.parameters["intra_op_thread_count"].string_value == "1"


@pytest.mark.parametrize(("seed", "version"), [(0, FIRST), (1, SECOND)])
@pytest.mark.parametrize(("batch", "length"), [(1, 4), (3, 16), (128, 8)])
def test_tcn_of_each_version_computes_what_torch_does(
    triton: TritonServer, exported_model, seed: int, version: int, batch: int, length: int
) -> None:
    tensors = _tcn_inputs(batch, length)
    with torch.no_grad():
        expected = TcnCone(exported_model(seed).model)(*tensors).numpy()
    got = _infer(triton, "tcn", version, tensors)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("seed", "version"), [(0, FIRST), (1, SECOND)])
def test_gru_step_of_each_version_computes_what_torch_does(
    triton: TritonServer, exported_model, seed: int, version: int
) -> None:
    tensors = [torch.randn(5, 2, 8), torch.randn(5, 6)]
    with torch.no_grad():
        expected = GruStep(exported_model(seed).model)(*tensors).numpy()
    got = _infer(triton, "gru_step", version, tensors)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_concurrent_requests_of_mixed_shapes_each_get_their_own_answer(
    triton: TritonServer, exported_model
) -> None:
    cone = TcnCone(exported_model(1).model)
    requests = [_tcn_inputs(1 + number % 3, (4, 8)[number % 2]) for number in range(64)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda one: _infer(triton, "tcn", SECOND, one), requests))
    for tensors, got in zip(requests, answers, strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(got, cone(*tensors).numpy(), rtol=1e-4, atol=1e-5)
    client = triton_grpc.InferenceServerClient(triton.grpc_url)
    statistics = client.get_inference_statistics("tcn", str(SECOND)).model_stats[0]
    assert statistics.execution_count < statistics.inference_count, "nothing was batched"


def test_a_bad_request_fails_alone(triton: TritonServer, exported_model) -> None:
    """A wrong vector width reaches the model; the requests beside it are answered."""
    wrong = _tcn_inputs(1, 4)
    wrong[0] = torch.randn(1, 4, 5)
    good = _tcn_inputs(1, 4)
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(_infer, triton, "tcn", SECOND, wrong if number % 2 else good)
            for number in range(16)
        ]
    with torch.no_grad():
        expected = TcnCone(exported_model(1).model)(*good).numpy()
    for number, future in enumerate(futures):
        if number % 2:
            with pytest.raises(InferenceServerException, match="session_items"):
                future.result()
        else:
            np.testing.assert_allclose(future.result(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (_tcn_inputs(129, 4), "batch"),
        ([torch.zeros(2, 4, 6), torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 8)], "shape"),
    ],
    ids=["too many", "two lengths a session"],
)
def test_shapes_outside_the_contract_are_refused(
    triton: TritonServer, tensors: list[torch.Tensor], reason: str
) -> None:
    with pytest.raises(InferenceServerException, match=reason):
        _infer(triton, "tcn", SECOND, tensors)


def test_versions_load_and_unload_while_others_serve(
    repository: ReleaseRepository, tmp_path: Path
) -> None:
    log = tmp_path / "triton.log"
    with TritonServer(repository.triton_repository, grpc_port=0, http_port=0, log=log) as server:
        assert server.models.loaded("gru_step") == []
        server.load("gru_step", [FIRST])
        assert server.models.loaded("gru_step") == [FIRST]
        stopping, failures = threading.Event(), []

        def keep_asking() -> int:
            answered = 0
            while not stopping.is_set():
                try:
                    tensors = [torch.randn(1, 2, 8), torch.randn(1, 6)]
                    _infer(server, "gru_step", FIRST, tensors)
                    answered += 1
                except InferenceServerException as error:
                    failures.append(error)
            return answered

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(keep_asking)
            server.load("gru_step", [FIRST, SECOND])
            stopping.set()
            assert asking.result() > 0
        assert failures == []
        assert server.models.loaded("gru_step") == [FIRST, SECOND]
        server.load("gru_step", [SECOND])
        assert server.models.loaded("gru_step") == [SECOND]
        server.unload("gru_step")
        assert not server.models.has("gru_step", SECOND)


def test_a_version_that_cannot_load_leaves_the_others_serving(
    exported_model, release_parts, tmp_path: Path
) -> None:
    repository = ReleaseRepository(tmp_path / "repository")
    info = ReleaseInput(data_date="2026-01-01")
    for _ in range(2):
        publish(repository, release_parts(0), exported_model(0).files, info)
    repository.model_path("gru_step", FIRST + 1).write_bytes(b"not a model")
    log = tmp_path / "triton.log"
    with TritonServer(repository.triton_repository, grpc_port=0, http_port=0, log=log) as server:
        server.load("gru_step", [FIRST])
        with pytest.raises(ReleaseError, match="gru_step"):
            server.load("gru_step", [FIRST, FIRST + 1])
        assert server.models.has("gru_step", FIRST)
        with pytest.raises(ReleaseError, match="does not exist"):
            server.load("gru_step", [FIRST, 7])
        assert _infer(server, "gru_step", FIRST, [torch.zeros(1, 2, 8), torch.zeros(1, 6)]).shape


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = TritonServer(
            tmp_path / "repository", grpc_port=port, http_port=0, log=tmp_path / "log"
        )
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1, meant for Triton's gRPC"):
            server.start()
    assert not server.is_alive()


def test_a_server_that_dies_at_start_says_its_last_words(tmp_path: Path) -> None:
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\necho cannot find the frobnicator\nexit 1\n")
    binary.chmod(0o755)
    server = TritonServer(
        tmp_path / "repository",
        grpc_port=0,
        http_port=0,
        log=tmp_path / "triton.log",
        install=TritonInstall(executable=binary),
    )
    with pytest.raises(ServingError, match=r"died at start.*cannot find the frobnicator"):
        server.__enter__()


def test_no_binary_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIERTCN_TRITON_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"make install.*--triton-url"):
        find_tritonserver()
    monkeypatch.delenv("HIERTCN_TRITON_HOME")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no tritonserver found"):
        find_tritonserver()


def test_stop_ends_every_process_and_start_works_again(
    repository: ReleaseRepository, tmp_path: Path
) -> None:
    server = TritonServer(
        repository.triton_repository, grpc_port=0, http_port=0, log=tmp_path / "triton.log"
    )
    for _ in range(2):
        with server:
            server.load("gru_step", [FIRST])
            processes = _family(server.pid)
            assert len(processes) == 2, "the server and one model process"
        assert server.pid is None
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert alive == []


def test_triton_dies_with_a_parent_that_is_killed(
    repository: ReleaseRepository, tmp_path: Path
) -> None:
    """The parent starts Triton from a thread that has ended, as an event loop's executor may."""
    program = f"""
import sys, threading, time
from pathlib import Path
from hiertcn.serving.processes.triton import TritonServer
server = TritonServer(Path({str(repository.triton_repository)!r}), grpc_port=0, http_port=0,
                      log=Path({str(tmp_path / "triton.log")!r}))
thread = threading.Thread(target=server.__enter__)
thread.start()
thread.join()
server.load("gru_step", [{FIRST}])
print(server.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    processes = _family(int(parent.stdout.readline()))
    assert len(processes) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def _family(pid: int | None) -> list[psutil.Process]:
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]

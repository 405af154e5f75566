"""A toy release repository with real parts, and the real Triton and sidecar on it.

The toy's models are small ONNX graphs whose result is easy to compute by hand:
``tcn``: user_embedding = sum of the session's item vectors + user_state @ readout,
``gru_step``: next_state = tanh(state / 2 + session_mean @ mixing), the same for every layer.
"""

import asyncio
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hiertcn.export.tensors import GRU_STEP, TCN
from hiertcn.items.attributes import ItemAttributes
from hiertcn.items.index import IdIndex
from hiertcn.items.neighbor_building import build_neighbor_index
from hiertcn.items.table import ItemTable
from hiertcn.release.publish import ReleaseInput, publish
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.options import SidecarOptions
from hiertcn.serving.processes.triton import TritonServer
from hiertcn.serving.records.snapshot import StateSnapshot
from hiertcn.serving.sidecar import Sidecar
from tests.waiting import WAIT_S, patient_client

LAYERS, HIDDEN, DIM = 2, 6, 5
GAP_US = 1_800_000_000
DAY_US = 86_400_000_000
WATERMARK_US = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z

Result = TypeVar("Result")


@dataclass(frozen=True)
class ToyRelease:
    """A published toy release and the arithmetic to check replies with."""

    number: int
    item_ids: list[str]
    vectors: NDArray[np.float32]
    popularity: NDArray[np.float32]
    start_state: NDArray[np.float32]
    readout: NDArray[np.float32]
    mixing: NDArray[np.float32]
    states: dict[str, NDArray[np.float32]]
    watermark_us: int

    def rows(self, *item_ids: str) -> list[int]:
        return [self.item_ids.index(item_id) for item_id in item_ids]

    def step(self, state: NDArray[np.float32], *session: str) -> NDArray[np.float32]:
        """The state after a closed session."""
        mean = self.vectors[self.rows(*session)].mean(axis=0)
        return np.tanh(state / 2 + mean @ self.mixing)

    def scores(self, state: NDArray[np.float32], *open_session: str) -> NDArray[np.float32]:
        """Every item's score for a user in ``state`` with this open session."""
        user = state[-1] @ self.readout
        if open_session:
            user = user + self.vectors[self.rows(*open_session)].sum(axis=0)
        return self.vectors @ user

    def best(self, scores: NDArray[np.float32], k: int) -> list[str]:
        return [self.item_ids[row] for row in np.argsort(-scores, kind="stable")[:k]]


@dataclass
class ToyRepository:
    """A repository that toy releases are published into."""

    root: Path
    toys: dict[int, ToyRelease] = field(default_factory=dict)

    @property
    def repository(self) -> ReleaseRepository:
        return ReleaseRepository(self.root)

    def publish(
        self,
        number: int,
        *,
        seed: int = 0,
        items: int = 50,
        users: int = 8,
        watermark_us: int = WATERMARK_US,
        activate: bool = True,
        items_file: Path | None = None,
        extend: Callable[[Path], dict[str, Path]] = lambda parts: {},
    ) -> ToyRelease:
        """Publish a toy; ``extend`` adds to its folder of parts, and returns further models."""
        toy = _publish(self.root, number, seed, items, users, watermark_us, items_file, extend)
        self.toys[number] = toy
        if activate:
            self.repository.activate(number)
        return toy


class RunningSidecar:
    """A sidecar on an event loop of its own thread."""

    def __init__(self, options: SidecarOptions) -> None:
        self.options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.sidecar = self.run(_make(options))
        try:
            self.run(self.sidecar.start())
        except BaseException:
            self._end_loop()
            raise
        self.client = patient_client(self.sidecar.address)

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_S)

    def value(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.sidecar.metrics.registry.get_sample_value(name, labels) or 0.0

    def stop(self) -> None:
        if self._thread.is_alive():
            self.client.close()
            self.run(self.sidecar.stop())
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


StartSidecar = Callable[..., RunningSidecar]


class RedisServer:
    """A real server on a free port of this machine, keeping what it is told in its folder."""

    def __init__(self, program: str, folder: Path, *options: str, tls: bool = False) -> None:
        with socket.socket() as free, socket.socket() as other:
            free.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, cluster_port = (int(one.getsockname()[1]) for one in (free, other))
        if "--cluster-enabled" in options:
            options = (*options, "--cluster-port", str(cluster_port))
        self._command = [program, "--tls-port" if tls else "--port", str(self.port)]
        self._command += [*(["--port", "0"] if tls else []), "--bind", "127.0.0.1"]
        self._command += ["--dir", str(folder), "--save", "", *options]
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "Ready to accept connections" in line:
                return
        raise AssertionError(f"the server ended with {self._process.wait()}")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


StartRedis = Callable[..., RedisServer]


@pytest.fixture(scope="module")
def start_redis(
    required_program: Callable[[str], str],
    required_module: Callable[[str], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[StartRedis]:
    """Starts servers with given options; kills what is left."""
    program = required_program("redis-server")
    required_module("valkey")
    running: list[RedisServer] = []

    def start(*options: str, tls: bool = False) -> RedisServer:
        running.append(RedisServer(program, tmp_path_factory.mktemp("redis"), *options, tls=tls))
        running[-1].start()
        return running[-1]

    yield start
    for server in running:
        server.kill()


@pytest.fixture
def toy_repository(tmp_path: Path) -> ToyRepository:
    return ToyRepository(tmp_path / "repository")


@pytest.fixture(scope="session")
def new_toys() -> Callable[[Path], ToyRepository]:
    """Makes a repository for toy releases in a folder."""
    return ToyRepository


@pytest.fixture(scope="module")
def shared_toy(tmp_path_factory: pytest.TempPathFactory) -> ToyRepository:
    """One repository with one active release for all tests of a module that do not change it."""
    toys = ToyRepository(tmp_path_factory.mktemp("toy") / "repository")
    toys.publish(2026010101)
    return toys


@pytest.fixture(scope="module")
def shared_triton(
    shared_toy: ToyRepository, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    with _triton(shared_toy, tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture
def triton(toy_repository: ToyRepository, tmp_path: Path) -> Iterator[TritonServer]:
    """A Triton on this test's own repository."""
    (toy_repository.root / "triton_repo").mkdir(parents=True, exist_ok=True)
    with _triton(toy_repository, tmp_path) as server:
        yield server


@pytest.fixture
def start_sidecar(tmp_path: Path) -> Iterator[StartSidecar]:
    """Starts sidecars on any free port, with a state folder of this test; stops what is left."""
    running: list[RunningSidecar] = []

    def start(toys: ToyRepository, triton_url: str, **options: Any) -> RunningSidecar:
        options.setdefault("state_dir", tmp_path / "state")
        options.setdefault("model_deadline_s", WAIT_S)
        options.setdefault("target_latency_s", WAIT_S)
        options.setdefault("port", 0)
        running.append(
            RunningSidecar(SidecarOptions(repository=toys.root, triton_url=triton_url, **options))
        )
        return running[-1]

    yield start
    for sidecar in running:
        sidecar.stop()


async def _make(options: SidecarOptions) -> Sidecar:
    return Sidecar(options)


def _triton(toys: ToyRepository, folder: Path) -> TritonServer:
    return TritonServer(
        toys.repository.triton_repository,
        grpc_port=0,
        http_port=0,
        log=folder / "triton.log",
    )


def _publish(
    root: Path,
    number: int,
    seed: int,
    items: int,
    users: int,
    watermark_us: int,
    items_file: Path | None,
    extend: Callable[[Path], dict[str, Path]],
) -> ToyRelease:
    rng = np.random.default_rng(seed)
    parts = root.with_name(f"parts-{number}")
    item_ids = [f"item-{n}" for n in range(items)]
    # Every value is exact in float16, so the stored table equals these vectors.
    vectors = (rng.integers(-64, 64, (items, DIM)) / 64).astype(np.float32)
    popularity = rng.random(items).astype(np.float32)
    start_state = rng.normal(size=(LAYERS, HIDDEN)).astype(np.float32)
    readout = rng.normal(size=(HIDDEN, DIM)).astype(np.float32)
    mixing = rng.normal(size=(DIM, HIDDEN)).astype(np.float32)
    states = rng.normal(size=(users, LAYERS, HIDDEN)).astype(np.float32)
    user_ids = [f"user-{n}" for n in range(users)]
    index = IdIndex.build(item_ids, parts / "item_index")
    if items_file is not None:
        ItemAttributes.write(parts / "item_attributes", index, items_file)
    table = ItemTable.write(parts / "item_table", vectors)
    build_neighbor_index(table, parts / "neighbor_index")
    StateSnapshot.write(
        parts / "user_states",
        users=user_ids,
        states=states,
        folded_until_us=np.full(users, watermark_us - DAY_US, np.int64),
        # The last user was in the middle of a session at the watermark.
        history_offsets=np.array([0] * users + [2], np.int64),
        history_item_rows=np.array([1, 2], np.int32),
        history_timestamps_us=np.array([watermark_us - 2_000_000, watermark_us - 1_000_000]),
        watermark_us=watermark_us,
        gap_us=GAP_US,
    )
    np.save(parts / "popularity.npy", popularity)
    np.save(parts / "start_state.npy", start_state)
    models = {TCN: _tcn(readout), GRU_STEP: _gru_step(mixing)}
    for name, graph in models.items():
        onnx.save(graph, str(parts / f"{name}.onnx"))
    more = extend(parts)
    day = str(number)
    published = publish(
        ReleaseRepository(root),
        {path.name: path for path in parts.iterdir() if path.suffix != ".onnx"},
        {name: parts / f"{name}.onnx" for name in models} | more,
        ReleaseInput(data_date=f"{day[:4]}-{day[4:6]}-{day[6:8]}"),
    )
    assert published == number
    return ToyRelease(
        number=number,
        item_ids=item_ids,
        vectors=vectors,
        popularity=popularity,
        start_state=start_state,
        readout=readout,
        mixing=mixing,
        states=dict(zip(user_ids, states, strict=True)),
        watermark_us=watermark_us,
    )


def _tcn(readout: NDArray[np.float32]) -> onnx.ModelProto:
    return _model(
        [
            helper.make_node("Shape", ["session_items"], ["shape"], start=1, end=2),
            helper.make_node("Squeeze", ["shape"], ["length"]),
            helper.make_node("Range", ["zero", "length", "one"], ["places"]),
            helper.make_node("Cast", ["session_length"], ["lengths"], to=TensorProto.INT64),
            helper.make_node("Less", ["places", "lengths"], ["real"]),
            helper.make_node("Cast", ["real"], ["mask2"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask2", "last"], ["mask"]),
            helper.make_node("Mul", ["session_items", "mask"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "axis"], ["session"], keepdims=0),
            helper.make_node("MatMul", ["user_state", "readout"], ["user"]),
            helper.make_node("Add", ["session", "user"], ["user_embedding"]),
        ],
        inputs=[
            ("session_items", TensorProto.FLOAT, ["b", "l", DIM]),
            ("session_length", TensorProto.INT32, ["b", 1]),
            ("user_state", TensorProto.FLOAT, ["b", HIDDEN]),
        ],
        output=("user_embedding", TensorProto.FLOAT, ["b", DIM]),
        constants={
            "zero": np.int64(0),
            "one": np.int64(1),
            "last": np.array([2]),
            "axis": np.array([1]),
            "readout": readout,
        },
    )


def _gru_step(mixing: NDArray[np.float32]) -> onnx.ModelProto:
    return _model(
        [
            helper.make_node("Mul", ["state", "half"], ["kept"]),
            helper.make_node("MatMul", ["session_mean", "mixing"], ["mixed2"]),
            helper.make_node("Unsqueeze", ["mixed2", "axis"], ["mixed"]),
            helper.make_node("Add", ["kept", "mixed"], ["sum"]),
            helper.make_node("Tanh", ["sum"], ["next_state"]),
        ],
        inputs=[
            ("state", TensorProto.FLOAT, ["b", LAYERS, HIDDEN]),
            ("session_mean", TensorProto.FLOAT, ["b", DIM]),
        ],
        output=("next_state", TensorProto.FLOAT, ["b", LAYERS, HIDDEN]),
        constants={"half": np.float32(0.5), "mixing": mixing, "axis": np.array([1])},
    )


def _model(
    nodes: list[onnx.NodeProto],
    *,
    inputs: list[tuple[str, int, list[Any]]],
    output: tuple[str, int, list[Any]],
    constants: dict[str, Any],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(*described) for described in inputs],
        [helper.make_tensor_value_info(*output)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model

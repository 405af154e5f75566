"""Small real parts of releases, made once a session: exporting a model takes seconds."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before anything loads a numeric library: their threads spin while they wait, and with another
# process on every core that made a training ten to twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, settings
from onnx import numpy_helper

from hiertcn.items.index import IdIndex
from hiertcn.items.neighbor_building import build_neighbor_index
from hiertcn.items.table import ItemTable
from hiertcn.serving.records.snapshot import NEVER_US, StateSnapshot

# How long an example takes says something about the machine, not about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

ITEMS, USERS = 30, 5
GAP_US = 1_800_000_000
WATERMARK_US = 1_767_225_600_000_000


@dataclass(frozen=True)
class ExportedModel:
    """A small HierTCN with random weights and the folder that export_onnx made of it."""

    model: torch.nn.Module
    directory: Path

    @property
    def files(self) -> dict[str, Path]:
        return {name: self.directory / name / "model.onnx" for name in ("tcn", "gru_step")}


ExportModel = Callable[[int], ExportedModel]


@pytest.fixture(scope="session")
def exported_model(tmp_path_factory: pytest.TempPathFactory) -> ExportModel:
    """The exported model of a seed."""
    from hiertcn.export.serving_models import export_serving_models
    from models.hiertcn import HierTCN, HierTCNConfig
    from models.hiertcn_serving import GruStep, TcnCone

    made: dict[int, ExportedModel] = {}

    def make(seed: int) -> ExportedModel:
        if seed not in made:
            torch.manual_seed(seed)
            model = HierTCN(
                HierTCNConfig(item_dim=6, hidden=8, gru_layers=2, tcn_blocks=2, kernel=3, filters=8)
            ).eval()
            directory = tmp_path_factory.mktemp("export") / str(seed)
            export_serving_models(
                TcnCone(model),
                GruStep(model),
                model.start_state.detach().numpy(),
                directory,
                item_dim=6,
            )
            made[seed] = ExportedModel(model, directory)
        return made[seed]

    return make


def _copy_with_other_weights(
    source: ExportedModel, model: torch.nn.Module, directory: Path
) -> None:
    """A second model of the same shape, without paying for a second trace."""
    from models.hiertcn_serving import GruStep, TcnCone

    for name, kind in (("tcn", TcnCone), ("gru_step", GruStep)):
        old, new = kind(source.model).state_dict(), kind(model).state_dict()
        graph = onnx.load(source.files[name])
        replaced = set()
        for initializer in graph.graph.initializer:
            value = numpy_helper.to_array(initializer)
            for key, weight in old.items():
                # The exporter stores the weight of a Linear transposed.
                for turn in (lambda array: array, np.transpose):
                    if np.array_equal(turn(weight.numpy()), value):
                        turned = np.ascontiguousarray(turn(new[key].numpy()))
                        initializer.CopyFrom(numpy_helper.from_array(turned, initializer.name))
                        replaced.add(key)
        assert replaced == set(old)
        (directory / name).mkdir(parents=True)
        onnx.save(graph, directory / name / "model.onnx")
    np.save(directory / "start_state.npy", model.start_state.detach().numpy())


ReleaseParts = Callable[[int], dict[str, Path]]


@pytest.fixture(scope="session")
def release_parts(
    exported_model: ExportModel, tmp_path_factory: pytest.TempPathFactory
) -> ReleaseParts:
    """Every part of a release that goes with ``exported_model`` of the same seed."""
    made: dict[int, dict[str, Path]] = {}

    def make(seed: int) -> dict[str, Path]:
        if seed not in made:
            folder = tmp_path_factory.mktemp("parts")
            made[seed] = _write_parts(folder, seed, exported_model(seed).directory)
        return made[seed]

    return make


def _write_parts(folder: Path, seed: int, exported: Path) -> dict[str, Path]:
    generator = np.random.default_rng(seed)
    start_state = np.load(exported / "start_state.npy", allow_pickle=False)
    vectors = generator.normal(size=(ITEMS, 6)).astype(np.float32)
    table = ItemTable.write(folder / "item_table", vectors, "float32")
    IdIndex.build([f"item-{row}" for row in range(ITEMS)], folder / "item_index")
    build_neighbor_index(table, folder / "neighbor_index", seed=seed)
    StateSnapshot.write(
        folder / "user_states",
        users=[f"user-{row}" for row in range(USERS)],
        states=generator.normal(size=(USERS, *start_state.shape)).astype(np.float32),
        folded_until_us=np.full(USERS, NEVER_US),
        history_offsets=np.zeros(USERS + 1, np.int64),
        history_item_rows=np.empty(0, np.int32),
        history_timestamps_us=np.empty(0, np.int64),
        watermark_us=WATERMARK_US,
        gap_us=GAP_US,
    )
    np.save(folder / "popularity.npy", generator.random(ITEMS, np.float32))
    parts = {path.name: path for path in folder.iterdir()}
    return {**parts, "start_state.npy": exported / "start_state.npy"}


@pytest.fixture(scope="session")
def required_program() -> Callable[[str], str]:
    """Path of a program that a test starts; without it the test is skipped, in CI it fails."""

    def path(name: str) -> str:
        found = shutil.which(name)
        if found is None:
            _lacking(f"{name} is not on PATH; install its Debian package")
        return str(found)

    return path


@pytest.fixture(scope="session")
def required_module() -> Callable[[str], None]:
    """Skip the test without a module of an extra; in CI it fails."""

    def check(name: str) -> None:
        if importlib.util.find_spec(name) is None:
            _lacking(f"the module {name} is not installed; install the extra it belongs to")

    return check


def _lacking(reason: str) -> None:
    if os.environ.get("CI_REQUIRES_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)

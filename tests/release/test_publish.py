"""Publishing is all or nothing: whatever fails, whoever is killed, however many publish."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hiertcn.errors import InputError, ReleaseError
from hiertcn.files import read_json
from hiertcn.items.table import ItemTable
from hiertcn.release.publish import ReleaseInput, publish
from hiertcn.release.repository import ReleaseRepository

ROOT = Path(__file__).parents[2]
INFO = ReleaseInput(data_date="2026-01-01", metrics={"mrr": 0.25})
NUMBER = 2026010101

PUBLISHER = """
import json, resource, signal, sys
from pathlib import Path
from hiertcn.release.publish import ReleaseInput, publish
from hiertcn.release.repository import ReleaseRepository
root, parts, models, limit = json.loads(sys.argv[1])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
paths = [{name: Path(path) for name, path in group.items()} for group in (parts, models)]
print(publish(ReleaseRepository(root), *paths, ReleaseInput(data_date="2026-01-01")))
"""


@pytest.fixture
def repository(tmp_path: Path) -> ReleaseRepository:
    return ReleaseRepository(tmp_path / "repository")


@pytest.fixture
def sources(exported_model, release_parts) -> tuple[dict[str, Path], dict[str, Path]]:
    return release_parts(0), exported_model(0).files


def _left(repository: ReleaseRepository) -> list[Path]:
    """Files that a failed publisher left; configs and the lock belong to no release."""
    return [
        path
        for path in repository.root.rglob("*")
        if path.is_file() and path.name not in ("config.pbtxt", ".lock")
    ]


def _publisher(
    repository: ReleaseRepository, sources: tuple[dict[str, Path], dict[str, Path]], limit: int = 0
) -> "subprocess.Popen[str]":
    parts, models = ({name: str(path) for name, path in one.items()} for one in sources)
    argument = json.dumps([str(repository.root), parts, models, limit])
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, argument],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_release_holds_every_part_under_its_checksum(
    repository: ReleaseRepository, sources
) -> None:
    parts, models = sources
    assert publish(repository, parts, models, INFO) == NUMBER
    manifest = repository.verify(NUMBER)
    held = {entry.path for entry in manifest.files}
    on_disk = {
        str(path.relative_to(repository.root))
        for path in repository.root.rglob("*")
        if path.is_file() and path.name not in ("config.pbtxt", ".lock", "manifest.json")
    }
    assert held == on_disk
    for name, source in parts.items():
        target = repository.path(NUMBER) / name
        for file in [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]:
            copy = target if source.is_file() else target / file.relative_to(source)
            assert copy.read_bytes() == file.read_bytes()
            assert not copy.samefile(file), "a pipeline's next run may overwrite its outputs"
    assert manifest.settings == {
        "items": 30,
        "dim": 6,
        "layers": 2,
        "hidden": 8,
        "users": 5,
        "gap_us": 1_800_000_000,
        "watermark_us": 1_767_225_600_000_000,
    }
    assert manifest.parent is None
    assert read_json(repository.path(NUMBER) / "metrics.json") == {"mrr": 0.25}
    for model in ("tcn", "gru_step"):
        config = repository.triton_repository / model / "config.pbtxt"
        assert config.read_bytes() == (ROOT / "triton_repo" / model / "config.pbtxt").read_bytes()


def test_the_parent_is_what_served(repository: ReleaseRepository, sources) -> None:
    repository.activate(publish(repository, *sources, INFO))
    assert repository.manifest(publish(repository, *sources, INFO)).parent == NUMBER


@pytest.mark.parametrize("missing", ["item_table", "user_states", "start_state.npy"])
def test_a_missing_part_is_named(repository: ReleaseRepository, sources, missing: str) -> None:
    parts, models = sources
    with pytest.raises(ReleaseError, match=f"lacks {missing}"):
        publish(repository, {k: v for k, v in parts.items() if k != missing}, models, INFO)
    assert not repository.root.exists()


def test_parts_of_two_runs_are_refused(
    repository: ReleaseRepository, sources, tmp_path: Path
) -> None:
    parts, models = sources
    table = np.random.default_rng(0).normal(size=(30, 7))
    ItemTable.write(tmp_path / "wide", table)
    with pytest.raises(ReleaseError, match="does not run with the other parts' shapes"):
        publish(repository, {**parts, "item_table": tmp_path / "wide"}, models, INFO)
    ItemTable.write(tmp_path / "short", table[:9, :6])
    with pytest.raises(ReleaseError, match="rows of item_table is 9 but ids of item_index is 30"):
        publish(repository, {**parts, "item_table": tmp_path / "short"}, models, INFO)
    np.save(tmp_path / "start.npy", np.zeros((3, 8), np.float32))
    with pytest.raises(ReleaseError, match="start_state"):
        publish(repository, {**parts, "start_state.npy": tmp_path / "start.npy"}, models, INFO)
    with pytest.raises(ReleaseError, match="does not run"):
        publish(repository, parts, {"tcn": models["gru_step"], "gru_step": models["tcn"]}, INFO)
    assert not repository.root.exists()


def test_a_config_that_is_missing_is_named_and_nothing_is_left(
    repository: ReleaseRepository, sources, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"tcn/config\.pbtxt cannot be read"):
        publish(repository, *sources, INFO, configs=tmp_path)
    assert _left(repository) == []


@contextlib.contextmanager
def _small_disk(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        # Seen before the first byte is written, and met in the middle of the copies.
        ("size=4m", "4 MB free but the release needs"),
        ("size=64m,nr_inodes=24", "No space left on device|no space left on the disk"),
    ],
    ids=["too small", "runs full"],
)
def test_a_full_disk_publishes_nothing(
    repository: ReleaseRepository, sources, tmp_path: Path, options: str, reason: str
) -> None:
    with _small_disk(tmp_path / "disk", options) as disk:
        small = ReleaseRepository(disk)
        with pytest.raises(InputError, match=reason):
            publish(small, *sources, INFO)
        assert small.numbers() == []
        assert _left(small) == []
        assert list(disk.glob("releases/*")) == []


def test_a_read_only_disk_is_named(sources, tmp_path: Path) -> None:
    with (
        _small_disk(tmp_path / "disk", "ro") as disk,
        pytest.raises(InputError, match="cannot be written to"),
    ):
        publish(ReleaseRepository(disk), *sources, INFO)


@pytest.mark.parametrize("limit", [100, 2_000, 100_000])
def test_a_killed_publisher_leaves_no_release_and_the_next_one_cleans_up(
    repository: ReleaseRepository, sources, limit: int
) -> None:
    """The kernel kills the publisher at the first byte of any file beyond ``limit``."""
    publisher = _publisher(repository, sources, limit)
    publisher.communicate()
    assert publisher.returncode == -signal.SIGXFSZ
    assert repository.releases() == []
    assert publish(repository, *sources, INFO) == NUMBER
    held = {entry.path for entry in repository.verify(NUMBER).files}
    left = {str(path.relative_to(repository.root)) for path in _left(repository)}
    assert left == {*held, f"releases/{NUMBER}/manifest.json"}


def test_two_publishers_get_a_release_each(repository: ReleaseRepository, sources) -> None:
    publishers = [_publisher(repository, sources) for _ in range(2)]
    numbers = []
    for publisher in publishers:
        output, errors = publisher.communicate()
        assert publisher.returncode == 0, errors
        numbers.append(int(output))
    assert sorted(numbers) == repository.numbers() == [NUMBER, NUMBER + 1]
    for number in numbers:
        repository.verify(number)


def test_a_publisher_that_may_not_wait_names_the_one_that_holds_the_lock(
    repository: ReleaseRepository, sources
) -> None:
    with (
        repository.lock(),
        pytest.raises(InputError, match=rf"process {os.getpid()}\) for over 0.1 s"),
    ):
        publish(repository, *sources, INFO, wait_s=0.1)
    assert publish(repository, *sources, INFO) == NUMBER

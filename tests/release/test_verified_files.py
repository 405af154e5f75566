"""Checksums are computed once for each file as it is, and again for whatever was written since."""

import os
from pathlib import Path

import pytest

from hiertcn.errors import ReleaseError
from hiertcn.release import manifest
from hiertcn.release.publish import ReleaseInput, publish
from hiertcn.release.repository import ReleaseRepository
from hiertcn.release.verified_files import VerifiedFiles


@pytest.fixture
def repository(tmp_path: Path, exported_model, release_parts) -> ReleaseRepository:
    found = ReleaseRepository(tmp_path / "repository")
    for date in ("2026-01-01", "2026-01-02"):
        info = ReleaseInput(data_date=date, metrics={"mrr": 0.5})
        publish(found, release_parts(0), exported_model(0).files, info)
    return found


@pytest.fixture
def computed(monkeypatch) -> list[Path]:
    """The files whose checksums were computed."""
    paths: list[Path] = []
    sha256 = manifest.sha256

    def noted(path: Path) -> str:
        paths.append(path)
        return sha256(path)

    monkeypatch.setattr(manifest, "sha256", noted)
    return paths


def test_a_restart_computes_no_checksum_again(repository, computed, tmp_path) -> None:
    first, second = repository.numbers()
    for number in (first, second):
        VerifiedFiles(tmp_path / "verified.json").verify(repository, number)
    files = sum(len(repository.manifest(number).files) for number in (first, second))
    assert len(computed) == files
    for number in (first, second):
        VerifiedFiles(tmp_path / "verified.json").verify(repository, number)
    assert len(computed) == files
    VerifiedFiles(tmp_path / "elsewhere.json").verify(repository, first)
    assert len(computed) > files


@pytest.mark.parametrize("way", ["in place", "replaced"])
def test_a_file_that_was_damaged_since_is_found(repository, tmp_path, way) -> None:
    number = repository.numbers()[0]
    verified = VerifiedFiles(tmp_path / "verified.json")
    verified.verify(repository, number)
    path = repository.path(number) / "popularity.npy"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    if way == "in place":
        path.write_bytes(data)
    else:
        aside = path.with_suffix(".aside")
        aside.write_bytes(data)
        aside.replace(path)
    # Whoever keeps the time of modification does not keep that of change.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(ReleaseError, match=r"popularity\.npy"):
            verified.verify(repository, number)


@pytest.mark.parametrize("text", ["", "[]", '{"2026010101": 7}', "\x00"])
def test_what_is_remembered_may_be_damaged_or_lost(repository, computed, tmp_path, text) -> None:
    number = repository.numbers()[0]
    path = tmp_path / "verified.json"
    path.write_text(text)
    VerifiedFiles(path).verify(repository, number)
    assert computed
    del computed[:]
    VerifiedFiles(path).verify(repository, number)
    assert not computed
    VerifiedFiles(tmp_path / "no" / "folder").verify(repository, number)


def test_pruned_releases_are_forgotten(repository, tmp_path) -> None:
    first, second = repository.numbers()
    path = tmp_path / "verified.json"
    VerifiedFiles(path).verify(repository, first)
    repository.activate(second)
    repository.prune(keep=1)
    assert repository.numbers() == [second]
    VerifiedFiles(path).verify(repository, second)
    assert str(first) not in path.read_text()
    with pytest.raises(ReleaseError, match="no release"):
        VerifiedFiles(path).verify(repository, first)

"""Releases are found, checked, flipped, rolled back and pruned through the repository alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hiertcn.errors import InputError, ReleaseError
from hiertcn.release.publish import ReleaseInput, publish
from hiertcn.release.repository import ReleaseRepository

Publish = Callable[..., int]


@pytest.fixture
def repository(tmp_path: Path) -> ReleaseRepository:
    return ReleaseRepository(tmp_path / "repository")


@pytest.fixture
def publish_one(repository: ReleaseRepository, exported_model, release_parts) -> Publish:
    def publish_seed(data_date: str = "2026-01-01") -> int:
        info = ReleaseInput(data_date=data_date, metrics={"mrr": 0.5})
        return publish(repository, release_parts(0), exported_model(0).files, info)

    return publish_seed


def test_an_empty_repository_has_nothing(repository: ReleaseRepository) -> None:
    assert repository.current() is None
    assert repository.previous() is None
    assert repository.releases() == []
    assert not repository.root.exists(), "reading must not create anything"
    with pytest.raises(ReleaseError, match="holds no release 7; complete releases there: none"):
        repository.activate(7)
    with pytest.raises(ReleaseError, match="no previous release"):
        repository.roll_back()


def test_the_triton_repository_names_the_same_root(tmp_path: Path) -> None:
    assert ReleaseRepository(tmp_path / "triton_repo").root == tmp_path


def test_activation_flips_and_roll_back_flips_back(
    repository: ReleaseRepository, publish_one: Publish
) -> None:
    first, second, third = (publish_one(f"2026-01-0{day}") for day in (1, 2, 3))
    assert repository.current() is None, "publishing alone must not change what serves"
    for number in (first, second, second, third):
        repository.activate(number)
    assert (repository.current(), repository.previous()) == (third, second)
    assert repository.roll_back() == second
    assert (repository.current(), repository.previous()) == (second, third)
    assert [(one.number, one.is_current) for one in repository.releases()] == [
        (first, False),
        (second, True),
        (third, False),
    ]


def test_numbers_count_up_within_a_day(repository: ReleaseRepository, publish_one: Publish) -> None:
    assert [publish_one("2026-01-05"), publish_one("2026-01-05T10:00:00Z")] == [
        2026010501,
        2026010502,
    ]
    assert publish_one("2026-01-04") == 2026010401
    for number in range(3, 100):
        manifest = repository.path(2026010500 + number) / "manifest.json"
        manifest.parent.mkdir()
        manifest.touch()
    with pytest.raises(InputError, match="2026010599, the last number of 2026-01-05"):
        repository.next_number("2026-01-05")
    with pytest.raises(InputError, match="yesterday"):
        repository.next_number("yesterday")


@pytest.mark.parametrize(
    "damaged",
    [
        "triton_repo/tcn/{}/model.onnx",
        "releases/{}/item_table/vectors.bin",
        "releases/{}/user_states/states.npy",
        "releases/{}/release.json",
    ],
)
@pytest.mark.parametrize("how", ["flip a bit", "truncate", "delete"])
def test_a_damaged_release_is_refused_and_the_old_one_stays(
    repository: ReleaseRepository, publish_one: Publish, damaged: str, how: str
) -> None:
    first, second = publish_one(), publish_one()
    repository.activate(first)
    path = repository.root / damaged.format(second)
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(ReleaseError, match=path.name):
        repository.activate(second)
    assert (repository.current(), repository.previous()) == (first, None)
    repository.verify(first)


def test_roll_back_to_a_damaged_release_is_refused(
    repository: ReleaseRepository, publish_one: Publish
) -> None:
    for number in (publish_one(), publish_one()):
        repository.activate(number)
    repository.model_path("tcn", 2026010101).write_bytes(b"")
    with pytest.raises(ReleaseError, match="2026010101"):
        repository.roll_back()
    assert repository.current() == 2026010102


@pytest.mark.parametrize("content", ["{}", "[1]", "not JSON", '{"format": 2}', '{"format": 1}'])
def test_a_manifest_that_is_none_is_refused(
    repository: ReleaseRepository, publish_one: Publish, content: str
) -> None:
    number = publish_one()
    (repository.path(number) / "manifest.json").write_text(content)
    with pytest.raises(ReleaseError, match=r"manifest\.json"):
        repository.activate(number)
    assert repository.releases() == []


def test_a_manifest_of_another_release_is_refused(
    repository: ReleaseRepository, publish_one: Publish
) -> None:
    first, second = publish_one(), publish_one()
    manifest = (repository.path(first) / "manifest.json").read_text()
    (repository.path(second) / "manifest.json").write_text(manifest)
    with pytest.raises(ReleaseError, match=f"manifest of release {first}, not of {second}"):
        repository.verify(second)


@pytest.mark.parametrize("content", ["", "{}", '{"release": "1", "previous": null}'])
def test_a_damaged_pointer_is_named(
    repository: ReleaseRepository, publish_one: Publish, content: str
) -> None:
    publish_one()
    (repository.root / "current.json").write_text(content)
    with pytest.raises(ReleaseError, match=r"current\.json is not a pointer"):
        repository.current()


def test_prune_keeps_the_newest_and_what_serves(
    repository: ReleaseRepository, publish_one: Publish
) -> None:
    numbers = [publish_one(f"2026-01-0{day}") for day in range(1, 6)]
    repository.activate(numbers[0])
    repository.activate(numbers[1])
    assert repository.prune(1) == numbers[2:4]
    assert repository.numbers() == [numbers[0], numbers[1], numbers[4]]
    for number in repository.numbers():
        repository.verify(number)
    versions = {path.name for path in repository.triton_repository.glob("*/*/")}
    assert versions == {str(number) for number in repository.numbers()}
    assert repository.prune(1) == []
    with pytest.raises(InputError, match="keep is 0"):
        repository.prune(0)

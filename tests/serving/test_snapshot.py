"""A snapshot gives back what was written, per user, and refuses what does not fit."""

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError, ReleaseError
from hiertcn.serving.records.snapshot import NEVER_US, StateSnapshot


def _arrays(users: int, remembered: list[int], dtype: Any = np.float32) -> dict[str, Any]:
    generator = np.random.default_rng(users)
    total = sum(remembered)
    return {
        "users": [f"user {row}" for row in range(users)],
        "states": generator.normal(size=(users, 2, 3)).astype(dtype),
        "folded_until_us": np.where(np.arange(users) % 3 == 0, NEVER_US, np.arange(users) * 10),
        "history_offsets": np.concatenate([[0], np.cumsum(remembered)]).astype(np.int64),
        "history_item_rows": generator.integers(0, 100, total).astype(np.int32),
        "history_timestamps_us": np.arange(total, dtype=np.int64),
        "watermark_us": 1_000,
        "gap_us": 30,
    }


@settings(max_examples=20)
@given(remembered=st.lists(st.integers(0, 3), max_size=20), half=st.booleans())
def test_lookup_returns_what_was_written(
    tmp_path_factory, remembered: list[int], half: bool
) -> None:
    directory = tmp_path_factory.mktemp("snapshot") / "user_states"
    given_arrays = _arrays(len(remembered), remembered, np.float16 if half else np.float32)
    StateSnapshot.write(directory, **given_arrays)
    snapshot = StateSnapshot.open(directory)
    assert (len(snapshot), snapshot.watermark_us, snapshot.gap_us) == (len(remembered), 1_000, 30)
    offsets = given_arrays["history_offsets"]
    for row, user in enumerate(given_arrays["users"]):
        found = snapshot.lookup(user)
        assert found is not None
        np.testing.assert_array_equal(found.state, given_arrays["states"][row])
        assert found.state.dtype == given_arrays["states"].dtype
        assert found.folded_until_us == given_arrays["folded_until_us"][row]
        within = slice(offsets[row], offsets[row + 1])
        np.testing.assert_array_equal(
            found.history_item_rows, given_arrays["history_item_rows"][within]
        )
        np.testing.assert_array_equal(
            found.history_timestamps_us, given_arrays["history_timestamps_us"][within]
        )
    assert snapshot.lookup("nobody") is None
    assert snapshot.rows(["nobody"]).tolist() == [-1]


def test_states_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    snapshot = StateSnapshot.write(tmp_path / "s", **_arrays(4, [1, 0, 2, 0]))
    held = snapshot.states
    while isinstance(held.base, np.ndarray):
        held = held.base
    assert isinstance(held.base, mmap.mmap)
    with pytest.raises(ValueError, match="read-only"):
        snapshot.states[0] = 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"users": ["a", "b", "a"]}, "appear twice"),
        ({"states": np.zeros((3, 2, 3), np.float64)}, "float64"),
        ({"history_offsets": np.array([0, 1], np.int64)}, "history_offsets"),
        ({"history_item_rows": np.zeros(5, np.int32)}, "5 item rows"),
    ],
)
def test_arrays_that_disagree_are_refused_and_leave_nothing(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        StateSnapshot.write(tmp_path / "s", **{**_arrays(3, [1, 0, 1]), **change})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["states.npy", "history_timestamps_us.npy"])
@pytest.mark.parametrize("damage", ["truncate", "delete", "other shape", "pickle"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    StateSnapshot.write(tmp_path, **_arrays(4, [2, 0, 1, 1]))
    path = tmp_path / name
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "delete":
        path.unlink()
    elif damage == "other shape":
        np.save(path, np.zeros(2, np.int64))
    else:
        np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises(ReleaseError, match=name):
        StateSnapshot.open(tmp_path)


def test_a_snapshot_without_histories_is_served_as_it_is(tmp_path: Path) -> None:
    """Format 1 had the open session alone, under other names."""
    StateSnapshot.write(tmp_path, **_arrays(3, [2, 0, 1]))
    for path in tmp_path.glob("history_*.npy"):
        path.rename(path.with_name(path.name.replace("history_", "open_")))
    header = json.loads((tmp_path / "snapshot.json").read_text())
    header.update(format=1, open_interactions=header.pop("history_interactions"))
    (tmp_path / "snapshot.json").write_text(json.dumps(header))
    found = StateSnapshot.open(tmp_path).lookup("user 2")
    assert found is not None
    assert found.history_timestamps_us.tolist() == [2]


def test_another_format_is_refused(tmp_path: Path) -> None:
    StateSnapshot.write(tmp_path, **_arrays(1, [0]))
    (tmp_path / "snapshot.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ReleaseError, match="format 2"):
        StateSnapshot.open(tmp_path)

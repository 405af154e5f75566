"""The state snapshot of a release: every known user's hidden state and recent history.

A folder of memory-mapped ``.npy`` arrays and an id index of users, as of the release's watermark:
opening one costs no load time at any number of users, and processes share its pages. A look-up is
one hash search and one row read. A snapshot never changes after it is written; what users did
after its watermark is the journal's business, and a snapshot of one release must never be read
with another's models.

In its folder lie also the counts that were made of the same log: ``live_counts``, by minute and
item, and, for a model with scoring terms, ``transitions``.

Snapshots of format 1 hold of the history only the session that was open at the watermark; they
are served as they are.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from hiertcn.errors import InputError, ReleaseError
from hiertcn.files import read_json, whole_directory, write_json
from hiertcn.items.index import IdIndex

NEVER_US: Final = int(np.iinfo(np.int64).min)
"""``folded_until_us`` of a user whose state is still the start state."""

LIVE_COUNTS: Final = "live_counts"
LIVE_TRANSITIONS: Final = "live_transitions"
TRANSITIONS: Final = "transitions"

_FORMAT: Final = 2
_WITHOUT_HISTORY: Final = 1
_ARRAYS: Final = {
    "states": None,
    "folded_until_us": np.int64,
    "history_offsets": np.int64,
    "history_item_rows": np.int32,
    "history_timestamps_us": np.int64,
}


@dataclass(frozen=True, kw_only=True)
class UserSnapshot:
    """What a snapshot knows of one user; the arrays are views into the mapped files.

    ``state`` is ``[layers, hidden]`` in the snapshot's dtype (float32 or float16);
    ``folded_until_us`` the time of the last interaction folded into it (``NEVER_US`` if none);
    ``history_item_rows`` int32 and ``history_timestamps_us`` int64 are the user's newest
    interactions up to the watermark, oldest first: those after ``folded_until_us`` are the whole
    session still open there, those before it lie in closed sessions.
    """

    state: NDArray[Any]
    folded_until_us: int
    history_item_rows: NDArray[np.int32]
    history_timestamps_us: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SnapshotArrays:
    """A new snapshot's arrays while it is written, shapes as in :class:`StateSnapshot`.

    ``directory`` is the folder being written; what else is put there becomes part of the snapshot.
    """

    directory: Path
    states: NDArray[Any]
    folded_until_us: NDArray[np.int64]
    history_item_rows: NDArray[np.int32]
    history_timestamps_us: NDArray[np.int64]


class StateSnapshot:
    """A memory-mapped snapshot.

    Attributes:
        users: index from user id to row.
        states: float32 or float16 ``[users, layers, hidden]``.
        folded_until_us: int64 ``[users]``, ``NEVER_US`` where nothing was folded.
        history_offsets: int64 ``[users + 1]`` into the two arrays below.
        history_item_rows: int32 ``[interactions]``, rows of the release's item table.
        history_timestamps_us: int64 ``[interactions]``.
        watermark_us: event time up to which the log was seen.
        gap_us: idle time that closes a session.
    """

    def __init__(
        self,
        users: IdIndex,
        arrays: dict[str, NDArray[Any]],
        *,
        watermark_us: int,
        gap_us: int,
    ) -> None:
        self.users = users
        self.states = arrays["states"]
        self.folded_until_us: NDArray[np.int64] = arrays["folded_until_us"]
        self.history_offsets: NDArray[np.int64] = arrays["history_offsets"]
        self.history_item_rows: NDArray[np.int32] = arrays["history_item_rows"]
        self.history_timestamps_us: NDArray[np.int64] = arrays["history_timestamps_us"]
        self.watermark_us = watermark_us
        self.gap_us = gap_us

    @classmethod
    def open(cls, directory: Path) -> "StateSnapshot":
        """Map the snapshot in ``directory``.

        Raises:
            ReleaseError: a file is missing or its shape contradicts ``snapshot.json``.
        """
        header = read_json(directory / "snapshot.json")
        found = header.get("format") if isinstance(header, dict) else None
        if found not in (_FORMAT, _WITHOUT_HISTORY):
            raise ReleaseError(
                f"{directory / 'snapshot.json'} is not a state snapshot of format {_FORMAT}; "
                "run backfill_user_states again with this version"
            )
        users = IdIndex.open(directory / "users")
        shapes = _shapes(header)
        if len(users) != header["users"]:
            raise ReleaseError(
                f"{directory / 'users'} holds {len(users)} users but snapshot.json says "
                f"{header['users']}; run backfill_user_states again"
            )
        arrays = {
            name: _map(
                directory / f"{name if found == _FORMAT else _older(name)}.npy",
                shapes[name],
                np.dtype(dtype or header["dtype"]),
            )
            for name, dtype in _ARRAYS.items()
        }
        return cls(
            users,
            arrays,
            watermark_us=int(header["watermark_us"]),
            gap_us=int(header["gap_us"]),
        )

    @classmethod
    def write(
        cls,
        directory: Path,
        *,
        users: Sequence[str] | pa.Array,
        states: NDArray[Any],
        folded_until_us: NDArray[np.int64],
        history_offsets: NDArray[np.int64],
        history_item_rows: NDArray[np.int32],
        history_timestamps_us: NDArray[np.int64],
        watermark_us: int,
        gap_us: int,
    ) -> "StateSnapshot":
        """Write a snapshot from arrays (shapes as the class's attributes), whole or not at all.

        Raises:
            InputError: shapes disagree, a user appears twice, or the disk is full.
        """
        if not len(history_item_rows) == len(history_timestamps_us) == int(history_offsets[-1]):
            raise InputError(
                f"the histories hold {len(history_item_rows)} item rows and "
                f"{len(history_timestamps_us)} timestamps; history_offsets expects "
                f"{int(history_offsets[-1])} of each"
            )
        with new_snapshot(
            directory,
            users=users,
            state_shape=(states.shape[1], states.shape[2]),
            dtype=states.dtype,
            history_offsets=history_offsets,
            watermark_us=watermark_us,
            gap_us=gap_us,
        ) as stored:
            stored.states[:] = states
            stored.folded_until_us[:] = folded_until_us
            stored.history_item_rows[:] = history_item_rows
            stored.history_timestamps_us[:] = history_timestamps_us
        return cls.open(directory)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def layers(self) -> int:
        """Layers of the GRU."""
        return int(self.states.shape[1])

    @property
    def hidden(self) -> int:
        """Width of one layer's state."""
        return int(self.states.shape[2])

    def rows(self, user_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows ``[n]`` of the users, -1 for those the snapshot does not know."""
        return self.users.rows(user_ids)

    def at(self, row: int) -> UserSnapshot:
        """The user at ``row`` (0 <= row < len)."""
        start, end = int(self.history_offsets[row]), int(self.history_offsets[row + 1])
        return UserSnapshot(
            state=self.states[row],
            folded_until_us=int(self.folded_until_us[row]),
            history_item_rows=self.history_item_rows[start:end],
            history_timestamps_us=self.history_timestamps_us[start:end],
        )

    def lookup(self, user_id: str) -> UserSnapshot | None:
        """The user's snapshot, or None if the log did not know the user at the watermark."""
        row = int(self.users.rows([user_id])[0])
        return None if row < 0 else self.at(row)


@contextlib.contextmanager
def new_snapshot(
    directory: Path,
    *,
    users: Sequence[str] | pa.Array,
    state_shape: tuple[int, int],
    dtype: Any,
    history_offsets: NDArray[np.int64],
    watermark_us: int,
    gap_us: int,
) -> Iterator[SnapshotArrays]:
    """Yield the writable maps of a new snapshot.

    The caller fills them in any order, so neither states nor histories need to fit in memory; the
    snapshot appears under ``directory`` when the block succeeds.

    Args:
        directory: the snapshot's folder.
        users: the users' ids.
        state_shape: layers and width of a state.
        dtype: of the states, float32 or float16.
        history_offsets: int64 ``[users + 1]``, where each user's history begins.
        watermark_us: event time up to which the log was seen.
        gap_us: idle time that closes a session.

    Raises:
        InputError: shapes disagree, a user appears twice, or the disk is full.
    """
    count = len(users)
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(np.float16)):
        raise InputError(f"states have dtype {dtype}; expected float32 or float16")
    if history_offsets.shape != (count + 1,) or history_offsets[0] != 0:
        raise InputError(
            f"history_offsets has shape {list(history_offsets.shape)}; expected [{count + 1}] for "
            f"{count} users, starting with 0"
        )
    header = {
        "format": _FORMAT,
        "users": count,
        "layers": state_shape[0],
        "hidden": state_shape[1],
        "dtype": dtype.name,
        "history_interactions": int(history_offsets[-1]),
        "watermark_us": int(watermark_us),
        "gap_us": int(gap_us),
    }
    with whole_directory(directory) as aside:
        index = IdIndex.build(users, aside / "users")
        if len(index) != count:
            raise InputError(
                f"{count - len(index)} of {count} user ids appear twice; expected one row per user"
            )
        shapes = _shapes(header)
        arrays = {
            name: _create(aside / f"{name}.npy", shapes[name], _ARRAYS[name] or dtype)
            for name in _ARRAYS
        }
        arrays["history_offsets"][:] = history_offsets
        yield SnapshotArrays(
            directory=aside,
            states=arrays["states"],
            folded_until_us=arrays["folded_until_us"],
            history_item_rows=arrays["history_item_rows"],
            history_timestamps_us=arrays["history_timestamps_us"],
        )
        for values in arrays.values():
            _flush(values)
        write_json(aside / "snapshot.json", header)


def _shapes(header: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    users = int(header["users"])
    remembered = int(
        header["history_interactions" if header["format"] == _FORMAT else "open_interactions"]
    )
    return {
        "states": (users, int(header["layers"]), int(header["hidden"])),
        "folded_until_us": (users,),
        "history_offsets": (users + 1,),
        "history_item_rows": (remembered,),
        "history_timestamps_us": (remembered,),
    }


def _older(name: str) -> str:
    return name.replace("history_", "open_")


def _create(path: Path, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    # An empty file cannot be mapped, so no users means a plain array saved at once.
    if 0 in shape:
        values: NDArray[Any] = np.empty(shape, dtype=dtype)
        np.save(path, values)
        return values
    return open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _flush(values: NDArray[Any]) -> None:
    if isinstance(values, np.memmap):
        values.flush()


def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    mode: Any = None if 0 in shape else "r"
    try:
        # A plain view: slicing an np.memmap takes ten times as long.
        values: NDArray[Any] = np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ReleaseError(
            f"{path} cannot be read ({error}); run backfill_user_states again"
        ) from None
    if values.shape != shape or values.dtype != dtype:
        raise ReleaseError(
            f"{path} holds {values.dtype} {list(values.shape)}; expected {dtype} {list(shape)}; "
            "run backfill_user_states again"
        )
    return values

"""The state snapshot of a release: every known user's hidden state at the release's watermark.

A folder of memory-mapped ``.npy`` arrays and an id index of users: opening one costs no load
time at any number of users, and processes share its pages. A look-up is one hash search and one
row read. A snapshot never changes after it is written; what users did after its watermark is the
journal's business, and a snapshot of one release must never be read with another's models.
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

_FORMAT: Final = 1
_ARRAYS: Final = {
    "states": None,
    "folded_until_us": np.int64,
    "open_offsets": np.int64,
    "open_item_rows": np.int32,
    "open_timestamps_us": np.int64,
}


@dataclass(frozen=True, kw_only=True)
class UserSnapshot:
    """What a snapshot knows of one user; the arrays are views into the mapped files.

    ``state`` is ``[layers, hidden]`` in the snapshot's dtype (float32 or float16);
    ``folded_until_us`` the time of the last interaction folded into it (``NEVER_US`` if none);
    ``open_item_rows`` int32 and ``open_timestamps_us`` int64 are the session that was still open
    at the watermark, oldest first, empty if there was none.
    """

    state: NDArray[Any]
    folded_until_us: int
    open_item_rows: NDArray[np.int32]
    open_timestamps_us: NDArray[np.int64]


class StateSnapshot:
    """A memory-mapped snapshot.

    Attributes:
        users: index from user id to row.
        states: float32 or float16 ``[users, layers, hidden]``.
        folded_until_us: int64 ``[users]``, ``NEVER_US`` where nothing was folded.
        open_offsets: int64 ``[users + 1]`` into the two arrays below.
        open_item_rows: int32 ``[open interactions]``, rows of the release's item table.
        open_timestamps_us: int64 ``[open interactions]``.
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
        self.open_offsets: NDArray[np.int64] = arrays["open_offsets"]
        self.open_item_rows: NDArray[np.int32] = arrays["open_item_rows"]
        self.open_timestamps_us: NDArray[np.int64] = arrays["open_timestamps_us"]
        self.watermark_us = watermark_us
        self.gap_us = gap_us

    @classmethod
    def open(cls, directory: Path) -> "StateSnapshot":
        """Map the snapshot in ``directory``.

        Raises:
            ReleaseError: a file is missing or its shape contradicts ``snapshot.json``.
        """
        header = read_json(directory / "snapshot.json")
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
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
            name: _map(directory / f"{name}.npy", shapes[name], np.dtype(dtype or header["dtype"]))
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
        open_offsets: NDArray[np.int64],
        open_item_rows: NDArray[np.int32],
        open_timestamps_us: NDArray[np.int64],
        watermark_us: int,
        gap_us: int,
    ) -> "StateSnapshot":
        """Write a snapshot from arrays (shapes as the class's attributes), whole or not at all.

        Raises:
            InputError: shapes disagree, a user appears twice, or the disk is full.
        """
        with new_snapshot(
            directory,
            users=users,
            state_shape=(states.shape[1], states.shape[2]),
            dtype=states.dtype,
            open_offsets=open_offsets,
            open_item_rows=open_item_rows,
            open_timestamps_us=open_timestamps_us,
            watermark_us=watermark_us,
            gap_us=gap_us,
        ) as (stored_states, stored_folded):
            stored_states[:] = states
            stored_folded[:] = folded_until_us
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
        start, end = int(self.open_offsets[row]), int(self.open_offsets[row + 1])
        return UserSnapshot(
            state=self.states[row],
            folded_until_us=int(self.folded_until_us[row]),
            open_item_rows=self.open_item_rows[start:end],
            open_timestamps_us=self.open_timestamps_us[start:end],
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
    open_offsets: NDArray[np.int64],
    open_item_rows: NDArray[np.int32],
    open_timestamps_us: NDArray[np.int64],
    watermark_us: int,
    gap_us: int,
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Yield writable maps ``states [users, layers, hidden]`` and ``folded_until_us [users]``.

    The caller fills them in any order, so states never need to fit in memory; the snapshot
    appears under ``directory`` when the block succeeds.

    Raises:
        InputError: shapes disagree, a user appears twice, or the disk is full.
    """
    count = len(users)
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(np.float16)):
        raise InputError(f"states have dtype {dtype}; expected float32 or float16")
    if open_offsets.shape != (count + 1,) or open_offsets[0] != 0:
        raise InputError(
            f"open_offsets has shape {list(open_offsets.shape)}; expected [{count + 1}] for "
            f"{count} users, starting with 0"
        )
    if not len(open_item_rows) == len(open_timestamps_us) == int(open_offsets[-1]):
        raise InputError(
            f"open sessions hold {len(open_item_rows)} item rows and {len(open_timestamps_us)} "
            f"timestamps; open_offsets expects {int(open_offsets[-1])} of each"
        )
    header = {
        "format": _FORMAT,
        "users": count,
        "layers": state_shape[0],
        "hidden": state_shape[1],
        "dtype": dtype.name,
        "open_interactions": len(open_item_rows),
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
        states = _create(aside / "states.npy", shapes["states"], dtype)
        folded = _create(aside / "folded_until_us.npy", shapes["folded_until_us"], np.int64)
        yield states, folded
        _flush(states)
        _flush(folded)
        for name, values in (
            ("open_offsets", open_offsets),
            ("open_item_rows", open_item_rows),
            ("open_timestamps_us", open_timestamps_us),
        ):
            np.save(aside / f"{name}.npy", np.asarray(values, dtype=_ARRAYS[name]))
        write_json(aside / "snapshot.json", header)


def _shapes(header: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    users, opened = int(header["users"]), int(header["open_interactions"])
    return {
        "states": (users, int(header["layers"]), int(header["hidden"])),
        "folded_until_us": (users,),
        "open_offsets": (users + 1,),
        "open_item_rows": (opened,),
        "open_timestamps_us": (opened,),
    }


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
        values: NDArray[Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
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

"""The session store: every user's interactions as memory-mapped columns of ids and times.

A store is a folder:

    header.json             format, counts, session gap, watermark
    item_rows.npy           int32 [interactions], by user, then time
    timestamps_us.npy       int64 [interactions], microseconds since the epoch, UTC
    session_offsets.npy     int64 [sessions + 1], first interaction of each session, then the count
    user_offsets.npy        int64 [users + 1], first session of each user, then the count
    impression_rows.npy     int32 [impressions], only if the log has impressions
    impression_offsets.npy  int64 [interactions + 1], first impression of each interaction
    event_types.npy         uint8 [interactions], only if the log has event types: 0 for none, else
                            1 + the place of its type among the header's
    users/                  IdIndex: user ``u`` of the columns is row ``u``

12 bytes an interaction (13 with event types), 8 a session, 8 and the id a user; 4 an impression.
Opening maps the files and costs the same at any size; processes share the pages. Embeddings are
never stored: readers gather them from the item table. Every session has at least one interaction,
every user at least one session. ``hiertcn/sessions/cut.py`` writes stores; this module only reads
them.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.files import read_json
from hiertcn.items.index import IdIndex

HEADER_FILE: Final = "header.json"
USERS_FOLDER: Final = "users"
ITEM_ROWS: Final = "item_rows"
TIMESTAMPS_US: Final = "timestamps_us"
SESSION_OFFSETS: Final = "session_offsets"
USER_OFFSETS: Final = "user_offsets"
IMPRESSION_ROWS: Final = "impression_rows"
IMPRESSION_OFFSETS: Final = "impression_offsets"
EVENT_TYPES: Final = "event_types"

_FORMAT: Final = 1
_DTYPES: Final = {
    ITEM_ROWS: np.int32,
    TIMESTAMPS_US: np.int64,
    SESSION_OFFSETS: np.int64,
    USER_OFFSETS: np.int64,
    IMPRESSION_ROWS: np.int32,
    IMPRESSION_OFFSETS: np.int64,
    EVENT_TYPES: np.uint8,
}


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """What the store's header says about it.

    ``items`` is the length of the item index it was cut with: all item rows lie below it.
    ``gap_us`` is the pause in microseconds beyond which a session ends; ``watermark_us`` is the
    time of the last interaction. ``impressions`` is None where the log has none; ``event_types``,
    the most frequent first, is empty where it has none.
    """

    users: int
    sessions: int
    interactions: int
    items: int
    impressions: int | None
    gap_us: int
    watermark_us: int
    event_types: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the header's JSON fields."""
        return {"format": _FORMAT, **asdict(self), "event_types": list(self.event_types)}


class SessionStore:
    """Read-only view of a store folder; safe to share between threads and processes."""

    item_rows: NDArray[np.int32]
    timestamps_us: NDArray[np.int64]
    session_offsets: NDArray[np.int64]
    user_offsets: NDArray[np.int64]
    impression_rows: NDArray[np.int32] | None
    impression_offsets: NDArray[np.int64] | None
    event_types: NDArray[np.uint8] | None

    def __init__(self, directory: Path, meta: StoreMeta, columns: dict[str, NDArray[Any]]) -> None:
        """Use :meth:`open`; this only holds the mapped parts."""
        self.directory = directory
        self.meta = meta
        self.item_rows = columns[ITEM_ROWS]
        self.timestamps_us = columns[TIMESTAMPS_US]
        self.session_offsets = columns[SESSION_OFFSETS]
        self.user_offsets = columns[USER_OFFSETS]
        self.impression_rows = columns.get(IMPRESSION_ROWS)
        self.impression_offsets = columns.get(IMPRESSION_OFFSETS)
        self.event_types = columns.get(EVENT_TYPES)

    @classmethod
    def open(cls, directory: Path) -> "SessionStore":
        """Map a store.

        Raises:
            InputError: a file is missing, damaged, or does not fit the header.
        """
        directory = Path(directory)
        meta = _read_meta(directory)
        names = [ITEM_ROWS, TIMESTAMPS_US, SESSION_OFFSETS, USER_OFFSETS]
        if meta.impressions is not None:
            names += [IMPRESSION_ROWS, IMPRESSION_OFFSETS]
        if meta.event_types:
            names.append(EVENT_TYPES)
        columns = {name: _map_column(directory, name) for name in names}
        expected = {
            ITEM_ROWS: meta.interactions,
            TIMESTAMPS_US: meta.interactions,
            SESSION_OFFSETS: meta.sessions + 1,
            USER_OFFSETS: meta.users + 1,
            IMPRESSION_ROWS: meta.impressions,
            IMPRESSION_OFFSETS: meta.interactions + 1,
            EVENT_TYPES: meta.interactions,
        }
        for name, column in columns.items():
            if column.shape != (expected[name],):
                raise InputError(
                    f"{directory / name}.npy has the shape {column.shape}, expected "
                    f"({expected[name]},) from {HEADER_FILE}; rebuild the session store"
                )
        return cls(directory, meta, columns)

    @cached_property
    def users(self) -> IdIndex:
        """The users' ids: user ``u`` of the columns is row ``u``."""
        return IdIndex.open(self.directory / USERS_FOLDER)

    @property
    def user_ids(self) -> Any:
        """The users' ids as an Arrow large_string array [users], in the columns' order."""
        return self.users.id_array

    @property
    def has_impressions(self) -> bool:
        """Whether the log told which items were shown."""
        return self.impression_rows is not None

    def session_starts_us(self) -> NDArray[np.int64]:
        """Return each session's first time in microseconds, int64 [sessions]."""
        starts: NDArray[np.int64] = self.timestamps_us[self.session_offsets[:-1]]
        return starts

    def user_of_session(self, sessions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the user each session belongs to, int64 of the same shape."""
        users: NDArray[np.int64] = np.searchsorted(self.user_offsets, sessions, side="right") - 1
        return users

    def impressions(
        self, interactions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the item rows shown at the given interactions, and how many each had.

        The target is among them only if the log said so.

        Args:
            interactions: int64 [n].

        Returns:
            int32 [sum of counts] rows, one interaction's after another, and int64 [n] counts.

        Raises:
            InputError: the log had no impressions.
        """
        if self.impression_rows is None or self.impression_offsets is None:
            raise InputError(
                f"the session store {self.directory} has no impressions; ingest a log with an "
                "impressions column or rank against the catalogue"
            )
        starts = self.impression_offsets[interactions]
        counts = self.impression_offsets[interactions + 1] - starts
        return self.impression_rows[ranges(starts, counts)], counts

    def iterate_users(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield ``(first, last + 1)`` of consecutive groups of at most ``size`` users."""
        for first in range(0, self.meta.users, size):
            yield first, min(first + size, self.meta.users)


def ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``arange(start, start + count)`` of every pair, one after another, int64."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    out: NDArray[np.int64] = np.repeat(starts - (ends - counts), counts)
    out += np.arange(total, dtype=np.int64)
    return out


def _read_meta(directory: Path) -> StoreMeta:
    header = read_json(directory / HEADER_FILE)
    if not isinstance(header, dict) or header.pop("format", None) != _FORMAT:
        raise InputError(
            f"{directory / HEADER_FILE} does not describe a session store of format {_FORMAT}; "
            "rebuild it with this version"
        )
    try:
        return StoreMeta(**{**header, "event_types": tuple(header.get("event_types", ()))})
    except TypeError as error:
        raise InputError(
            f"{directory / HEADER_FILE} is incomplete ({error}); rebuild the session store"
        ) from None


def _map_column(directory: Path, name: str) -> NDArray[Any]:
    path = directory / f"{name}.npy"
    try:
        # A plain view: indexing an np.memmap goes through Python for every slice.
        column = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be mapped ({error}); rebuild the session store") from None
    if column.dtype != _DTYPES[name]:
        raise InputError(
            f"{path} holds {column.dtype}, expected {np.dtype(_DTYPES[name])}; rebuild the store"
        )
    return column

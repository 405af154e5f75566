"""The newest recorded interactions by item id: what the live counts of any release are fed by.

Held in memory in the order of arrival, each with the item before it in its session, at most
``most`` of them (8 million by default: 16 bytes each and every chunk's distinct ids, so about 130
MB; exact live counts after a flip as long as the last six hours hold no more). The oldest arrivals
go first, so an interaction with a far-off time takes one place and pushes out nothing else of its
time. One thread adds, any thread reads: a reader keeps a place in the sequence and asks for what
came since.

The event log is the truth: :meth:`RecentInteractions.fill` reads it after a restart.
"""

import itertools
import logging
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.items.hashing import xxh64
from hiertcn.serving.log.entries import Position, SegmentedLog
from hiertcn.serving.log.scan import ScannedInteractions, scan
from hiertcn.serving.records.record import NEVER_US
from hiertcn.sessions.live_transitions import START

_log = logging.getLogger(__name__)

MOST: Final = 8_000_000
BEGAN: Final = ""
"""Stands for the item before one that began its session; no item's id is empty."""

_CHUNK: Final = 65_536
_NOT_KNOWN: Final = START - 1


class Arrivals(NamedTuple):
    """Interactions in the order of arrival.

    Attributes:
        item_ids: what codes stand for.
        codes: int32 ``[n]``, the items.
        timestamps_us: int64 ``[n]``.
        previous: int32 ``[n]``, the item before each in its session, `START` where it began one,
            -2 where that is not known.
    """

    item_ids: list[str]
    codes: NDArray[np.int32]
    timestamps_us: NDArray[np.int64]
    previous: NDArray[np.int32]


class KnownItems(Protocol):
    """What a release says of items, sessions and what happened before it.

    Attributes:
        gap_us: idle time that closes a session, microseconds.
    """

    gap_us: int

    def item_rows(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of the items, -1 where unknown."""
        ...

    def last_interactions(
        self, user_ids: Sequence[str], until_us: int
    ) -> list[tuple[str, int] | None]:
        """Item and time of each user's last interaction up to a time; None where none is known."""
        ...


class _Chunk:
    def __init__(self) -> None:
        self._code_of: dict[str, int] = {}
        self._item_ids: list[str] = []
        self._codes = array("i")
        self._timestamps_us = array("q")
        self._previous = array("i")

    @classmethod
    def of(
        cls,
        item_ids: list[str],
        codes: NDArray[np.intc],
        timestamps_us: NDArray[np.int64],
        previous: NDArray[np.intc],
    ) -> Self:
        chunk = cls()
        chunk._item_ids = item_ids
        chunk._code_of = {item_id: code for code, item_id in enumerate(item_ids)}
        chunk._codes.frombytes(codes.tobytes())
        chunk._timestamps_us.frombytes(timestamps_us.tobytes())
        chunk._previous.frombytes(previous.tobytes())
        return chunk

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, item_id: str, timestamp_us: int, previous: str | None) -> None:
        self._codes.append(self._code(item_id))
        self._timestamps_us.append(timestamp_us)
        if previous is None:
            self._previous.append(_NOT_KNOWN)
        else:
            self._previous.append(START if previous == BEGAN else self._code(previous))

    def since(self, place: int) -> Arrivals:
        # Slices are copies, so the arrays may grow while the caller reads.
        codes = np.frombuffer(self._codes[place:], np.intc).astype(np.int32, copy=False)
        timestamps_us = np.frombuffer(self._timestamps_us[place:], np.int64)
        previous = np.frombuffer(self._previous[place:], np.intc).astype(np.int32, copy=False)
        if 2 * len(codes) >= len(self._item_ids):
            return Arrivals(self._item_ids.copy(), codes, timestamps_us, previous)
        used, own, before = _renumbered(codes, previous)
        item_ids = [self._item_ids[code] for code in used.tolist()]
        return Arrivals(item_ids, own, timestamps_us, before)

    def _code(self, item_id: str) -> int:
        code = self._code_of.setdefault(item_id, len(self._item_ids))
        if code == len(self._item_ids):
            self._item_ids.append(item_id)
        return code


class RecentInteractions:
    """A bounded sequence of interactions.

    Args:
        most: how many are kept, to within one chunk of 65,536.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._chunks: deque[_Chunk] = deque([_Chunk()])
        self._first = 0
        self._end = 0
        self._newest_us = NEVER_US
        self._lock = threading.Lock()

    @property
    def newest_us(self) -> int:
        """Time of the newest interaction ever added, ``NEVER_US`` before the first."""
        return self._newest_us

    @property
    def end(self) -> int:
        """How many interactions were ever added: the place that :meth:`since` returns next."""
        return self._end

    def add(
        self,
        interactions: Sequence[tuple[str, int]],
        previous: Iterable[str | None] = itertools.repeat(None),
    ) -> None:
        """Add interactions in the order they came.

        Args:
            interactions: item ids and times in microseconds.
            previous: of each, the item before it in its session, `BEGAN` where it began one, None
                where that is not known.
        """
        with self._lock:
            for (item_id, timestamp_us), before in zip(interactions, previous, strict=False):
                if len(self._chunks[-1]) == _CHUNK:
                    self._chunks.append(_Chunk())
                self._chunks[-1].add(item_id, timestamp_us, before)
                self._newest_us = max(self._newest_us, timestamp_us)
            self._end += len(interactions)
            while self._end - self._first - len(self._chunks[0]) >= self._most:
                self._first += len(self._chunks.popleft())

    def since(self, place: int) -> tuple[list[Arrivals], int]:
        """What was added from ``place`` on and is still kept, and the place to go on from."""
        found = []
        with self._lock:
            first = self._first
            for chunk in self._chunks:
                if first + len(chunk) > place:
                    found.append(chunk.since(max(0, place - first)))
                first += len(chunk)
            return found, self._end

    def fill(self, log: SegmentedLog, until: Position, after_us: int, release: KnownItems) -> None:
        """Add what the log holds up to a position, once each, as when it was recorded.

        A deletion takes nothing back, as it does not when it is recorded: counts name nobody.

        Args:
            log: the event log.
            until: entries beyond it are left out.
            after_us: interactions up to this time, in microseconds, are left out.
            release: says where sessions end, and which items come before another.
        """
        found: list[ScannedInteractions] = []
        total = 0
        for path, end in reversed(log.segments(until)):
            try:
                scanned = scan(np.fromfile(path, np.uint8), end)
            except InputError as error:
                _log.error("%s is damaged (%s); live counts go without it", path, error)
                continue
            kept = scanned.timestamps_us > after_us
            chosen = pa.array(kept)
            found.append(
                ScannedInteractions(
                    scanned.item_ids.filter(chosen),
                    scanned.timestamps_us[kept],
                    scanned.same[kept],
                    scanned.keys[kept],
                    scanned.users[kept],
                    scanned.user_ids.filter(chosen),
                )
            )
            total += int(kept.sum())
            if total >= self._most:
                break
        if not total:
            return
        found.reverse()
        timestamps_us = np.concatenate([one.timestamps_us for one in found])
        new = _firsts(np.concatenate([one.keys for one in found]))
        new[new] = _firsts(np.concatenate([one.same for one in found])[new])
        near = pa.array(new & (timestamps_us <= after_us + release.gap_us))
        came_before = _came_before(
            pa.chunked_array([one.user_ids for one in found]).filter(near), after_us, release
        )
        self._add_arrays(
            pa.chunked_array([came_before.item_ids, *(one.item_ids for one in found)]).filter(
                pa.array(np.append(np.ones(len(came_before.users), np.bool_), new))
            ),
            np.append(came_before.timestamps_us, timestamps_us[new]),
            np.append(came_before.users, np.concatenate([one.users for one in found])[new]),
            len(came_before.users),
            release,
        )

    def _add_arrays(
        self,
        item_ids: pa.ChunkedArray,
        timestamps_us: NDArray[np.int64],
        users: NDArray[np.uint64],
        skipped: int,
        release: KnownItems,
    ) -> None:
        """Add ``[n]`` interactions but the first ``skipped``, which only came before others."""
        distinct = item_ids.combine_chunks().dictionary_encode()
        codes = distinct.indices.to_numpy()
        known = release.item_rows(distinct.dictionary.to_pylist())[codes] >= 0
        previous = previous_places(users, timestamps_us, known, release.gap_us)
        before = np.where(previous >= 0, codes[np.maximum(previous, 0)], previous)
        with self._lock:
            self._newest_us = max(self._newest_us, int(timestamps_us[skipped:].max()))
            for first in range(skipped, len(timestamps_us), _CHUNK):
                part = slice(first, first + _CHUNK)
                used, own, previous_codes = _renumbered(codes[part], before[part])
                ids = distinct.dictionary.take(pa.array(used)).to_pylist()
                chunk = _Chunk.of(ids, own, timestamps_us[part], previous_codes)
                self._chunks.append(chunk)
                self._end += len(chunk)


class _CameBefore(NamedTuple):
    item_ids: pa.Array
    timestamps_us: NDArray[np.int64]
    users: NDArray[np.uint64]


def _came_before(user_ids: pa.ChunkedArray, until_us: int, release: KnownItems) -> _CameBefore:
    """What a release knows of users just before a log begins: they may have gone on from it."""
    ids = user_ids.unique()
    last = release.last_interactions(ids.to_pylist(), until_us)
    return _CameBefore(
        pa.array([one[0] for one in last if one is not None], pa.large_string()),
        np.array([one[1] for one in last if one is not None], np.int64),
        xxh64(ids.filter(pa.array([one is not None for one in last], pa.bool_()))),
    )


def _renumbered(
    codes: NDArray[np.integer[Any]], previous: NDArray[np.integer[Any]]
) -> tuple[NDArray[Any], NDArray[np.intc], NDArray[np.intc]]:
    """The distinct codes of both, and both numbered by place among them; negative ones stay."""
    both = np.concatenate([codes, previous])
    used, inverse = np.unique(both, return_inverse=True)
    skipped = int((used < 0).sum())
    places: NDArray[np.intc] = np.where(both < 0, both, inverse - skipped).astype(np.intc)
    return used[skipped:], places[: len(codes)], places[len(codes) :]


def previous_places(
    users: NDArray[np.uint64],
    timestamps_us: NDArray[np.int64],
    known: NDArray[np.bool_],
    gap_us: int,
) -> NDArray[np.int64]:
    """Where the interaction before each one in its session is, int64 ``[n]``.

    `START` where it began it, -2 where it came late or is passed over.

    Args:
        users: uint64 ``[n]``, equal for interactions of one user.
        timestamps_us: int64 ``[n]``.
        known: bool ``[n]``; the others are passed over, and follow nothing.
        gap_us: idle time that closes a session.
    """
    order = np.flatnonzero(known)
    order = order[np.argsort(users[order], kind="stable")]
    previous = np.full(len(users), _NOT_KNOWN, np.int64)
    _find_previous(users, timestamps_us, order, gap_us, previous)
    return previous


@compiled
def _find_previous(
    users: NDArray[np.uint64],
    timestamps_us: NDArray[np.int64],
    order: NDArray[np.int64],
    gap_us: int,
    previous: NDArray[np.int64],
) -> None:
    last = -1
    for place in order:
        previous[place] = START
        if last >= 0 and users[last] == users[place]:
            if timestamps_us[place] < timestamps_us[last]:
                # It came late: nobody went on from here to there.
                previous[place] = _NOT_KNOWN
                continue
            if timestamps_us[place] - timestamps_us[last] <= gap_us:
                previous[place] = last
        last = place


def _firsts(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are 0 or equal none before them, bool ``[n]``."""
    firsts: NDArray[np.bool_] = values == 0
    firsts[np.unique(values, return_index=True)[1]] = True
    return firsts

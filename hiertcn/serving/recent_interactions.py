"""The newest recorded interactions by item id: what the live counts of any release are fed by.

Held in memory in the order of arrival, at most ``most`` of them (8 million by default: 12 bytes
each and every chunk's distinct ids, so about 100 MB; exact live counts after a flip as long as the
last six hours hold no more). The oldest arrivals go first, so an interaction with a far-off time
takes one place and pushes out nothing else of its time. One thread adds, any thread reads: a reader
keeps a place in the sequence and asks for what came since.

The event log is the truth: :meth:`RecentInteractions.fill` reads it after a restart.
"""

import threading
from array import array
from collections import deque
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiertcn.serving.event_log import EventLog, LoggedDeletion, Position
from hiertcn.serving.record import user_key

MOST: Final = 8_000_000
_CHUNK: Final = 65_536


class Arrivals(NamedTuple):
    """Interactions in the order of arrival: ``item_ids[codes[n]]`` at ``timestamps_us[n]``.

    ``codes`` int32 ``[n]``, ``timestamps_us`` int64 ``[n]``.
    """

    item_ids: list[str]
    codes: NDArray[np.int32]
    timestamps_us: NDArray[np.int64]


class _Chunk:
    def __init__(self) -> None:
        self._code_of: dict[str, int] = {}
        self._item_ids: list[str] = []
        self._codes = array("i")
        self._timestamps_us = array("q")

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, item_id: str, timestamp_us: int) -> None:
        code = self._code_of.setdefault(item_id, len(self._item_ids))
        if code == len(self._item_ids):
            self._item_ids.append(item_id)
        self._codes.append(code)
        self._timestamps_us.append(timestamp_us)

    def since(self, place: int) -> Arrivals:
        # Slices are copies, so the arrays may grow while the caller reads.
        codes = np.frombuffer(self._codes[place:], np.intc).astype(np.int32, copy=False)
        timestamps_us = np.frombuffer(self._timestamps_us[place:], np.int64)
        if len(codes) < len(self._item_ids):
            item_ids = [self._item_ids[code] for code in codes.tolist()]
            return Arrivals(item_ids, np.arange(len(codes), dtype=np.int32), timestamps_us)
        return Arrivals(self._item_ids.copy(), codes, timestamps_us)


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
        self._lock = threading.Lock()

    @property
    def end(self) -> int:
        """How many interactions were ever added: the place that :meth:`since` returns next."""
        return self._end

    def add(self, interactions: list[tuple[str, int]]) -> None:
        """Add ``(item id, timestamp in microseconds)`` pairs."""
        with self._lock:
            for item_id, timestamp_us in interactions:
                if len(self._chunks[-1]) == _CHUNK:
                    self._chunks.append(_Chunk())
                self._chunks[-1].add(item_id, timestamp_us)
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

    def fill(self, log: EventLog, until: Position, after_us: int) -> None:
        """Add what the log holds up to a position, once each, as when it was recorded.

        Args:
            log: the event log.
            until: entries beyond it are left out.
            after_us: interactions up to this time, in microseconds, are left out.

        Raises:
            InputError: a segment is damaged.
        """
        seen: set[int] = set()
        deletions: dict[bytes, int] = {}
        found: list[tuple[str, int]] = []
        for end, entry in log.replay():
            if end > until:
                break
            if isinstance(entry, LoggedDeletion):
                # A deleted user's journal is empty, so the same interaction is new again.
                deletions[entry.user_key] = deletions.get(entry.user_key, 0) + 1
                continue
            if entry.timestamp_us <= after_us:
                continue
            life = deletions.get(user_key(entry.user_id), 0) if deletions else 0
            same = hash((entry.user_id, life, entry.item_id, entry.timestamp_us))
            key = hash((entry.user_id, life, entry.key)) if entry.key else same
            if same in seen or key in seen:
                continue
            seen.update((same, key))
            found.append((entry.item_id, entry.timestamp_us))
            if len(found) == _CHUNK:
                self.add(found)
                found = []
        self.add(found)

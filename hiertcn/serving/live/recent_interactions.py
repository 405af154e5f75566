"""The newest recorded interactions by item id: what the live counts of any release are fed by.

Held in memory in the order of arrival, at most ``most`` of them (8 million by default: 12 bytes
each and every chunk's distinct ids, so about 100 MB; exact live counts after a flip as long as the
last six hours hold no more). The oldest arrivals go first, so an interaction with a far-off time
takes one place and pushes out nothing else of its time. One thread adds, any thread reads: a reader
keeps a place in the sequence and asks for what came since.

The event log is the truth: :meth:`RecentInteractions.fill` reads it after a restart.
"""

import logging
import threading
from array import array
from collections import deque
from typing import Final, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.serving.log.entries import Position, SegmentedLog
from hiertcn.serving.log.scan import ScannedInteractions, scan
from hiertcn.serving.records.record import NEVER_US

_log = logging.getLogger(__name__)

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

    @classmethod
    def of(
        cls, item_ids: list[str], codes: NDArray[np.intc], timestamps_us: NDArray[np.int64]
    ) -> Self:
        chunk = cls()
        chunk._item_ids = item_ids
        chunk._code_of = {item_id: code for code, item_id in enumerate(item_ids)}
        chunk._codes.frombytes(codes.tobytes())
        chunk._timestamps_us.frombytes(timestamps_us.tobytes())
        return chunk

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

    def add(self, interactions: list[tuple[str, int]]) -> None:
        """Add ``(item id, timestamp in microseconds)`` pairs."""
        with self._lock:
            for item_id, timestamp_us in interactions:
                if len(self._chunks[-1]) == _CHUNK:
                    self._chunks.append(_Chunk())
                self._chunks[-1].add(item_id, timestamp_us)
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

    def fill(self, log: SegmentedLog, until: Position, after_us: int) -> None:
        """Add what the log holds up to a position, once each, as when it was recorded.

        A deletion takes nothing back, as it does not when it is recorded: counts name nobody.

        Args:
            log: the event log.
            until: entries beyond it are left out.
            after_us: interactions up to this time, in microseconds, are left out.
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
            found.append(
                ScannedInteractions(
                    scanned.item_ids.filter(pa.array(kept)),
                    scanned.timestamps_us[kept],
                    scanned.same[kept],
                    scanned.keys[kept],
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
        item_ids = pa.chunked_array([one.item_ids for one in found]).filter(pa.array(new))
        self._add_arrays(item_ids, timestamps_us[new])

    def _add_arrays(self, item_ids: pa.ChunkedArray, timestamps_us: NDArray[np.int64]) -> None:
        with self._lock:
            self._newest_us = max(self._newest_us, int(timestamps_us.max()))
            for first in range(0, len(timestamps_us), _CHUNK):
                distinct = item_ids[first : first + _CHUNK].combine_chunks().dictionary_encode()
                codes = distinct.indices.to_numpy().astype(np.intc)
                chunk = _Chunk.of(
                    distinct.dictionary.to_pylist(), codes, timestamps_us[first : first + _CHUNK]
                )
                self._chunks.append(chunk)
                self._end += len(chunk)


def _firsts(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are 0 or equal none before them, bool ``[n]``."""
    firsts: NDArray[np.bool_] = values == 0
    firsts[np.unique(values, return_index=True)[1]] = True
    return firsts

"""The co-interactions of a coded log: found user by user and counted day by day in compiled code.

The users are divided by their hashes, so that all events of one fall into the same part and a part
fits into memory; parts are worked on side by side. A part's events are sorted by user and time,
and each is paired with those that follow it. A pair is one number of 64 bits (its two items), put
into a file of its day; sorting such a file brings equal pairs together, in the order in which they
are wanted. What is counted depends neither on the parts nor on the order of the files.

Cost: 4 M events with 5.5 M pairs took 0.7 s of one core to pair and count, where a query engine
took 8.5 s. Not bounded by the memory allowed: the events of one user, and the pairs of one source
and day.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.graph.coded_log import AT, NUMBER, USER, CodedLog
from hiertcn.graph.neighbor_sums import row_ranges
from hiertcn.graph.options import GraphOptions
from hiertcn.graph.pairs import HASH_BITS, PRIME, US_PER_DAY

_BYTES_AN_EVENT: Final = 48
_BYTES_A_PAIR: Final = 16
_BATCH_ROWS: Final = 1 << 18
_PIECE: Final = 1 << 20
_HALF: Final = np.uint64(32)
_LOW: Final = np.uint64(2**32 - 1)
# Ciura's, and by 2.25 beyond. A short history needs the last one only: Shell's sort is an insertion
# sort there, and stays far from quadratic in a long one.
_GAPS: Final = np.array(
    [*(round(701 * 2.25**k) for k in range(20, 0, -1)), 701, 301, 132, 57, 23, 10, 4, 1], np.int64
)


class CodedPairs:
    """All pairs of some days, in files.

    Args:
        log: the days' events and those shortly before them.
        first_day: pairs whose later event lies before it are left out; days since 1970-01-01.
        options: window, cap and threads.
        memory: bytes for events, of all threads together.
        folder: existing folder for the files.

    Attributes:
        ids: the items' ids by code, large_string [items], ascending.
    """

    def __init__(
        self, log: CodedLog, first_day: int, options: GraphOptions, memory: int, folder: Path
    ) -> None:
        self.ids, numbers, hashes = log.items.in_text_order()
        self._folder = folder
        codes = np.empty(len(numbers), np.int32)
        codes[numbers] = np.arange(len(numbers), dtype=np.int32)
        rows = sum(pq.read_metadata(file).num_rows for file in log.files)
        threads = options.thread_count
        # Parts below one batch would only read the log more often.
        events = max(memory // threads // _BYTES_AN_EVENT, _BATCH_ROWS)
        parts = max(threads, math.ceil(rows / events))
        work = partial(
            _write_pairs, log.files, codes, hashes.view(np.int64), first_day, options, folder, parts
        )
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(parts)))

    def of_day(
        self, day: int, memory: int
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]]:
        """Yield sources int32 [n], targets int32 [n] (codes) and counts int64 [n], in order.

        Args:
            day: days since 1970-01-01.
            memory: bytes for pairs.
        """
        files = sorted(self._folder.glob(f"{day}-*"))
        for first, stop, pairs in self._ranges(files, memory // _BYTES_A_PAIR):
            keys = np.empty(pairs, np.uint64)
            filled = 0
            for piece in _pieces(files):
                sources = piece >> _HALF
                here = piece[(sources >= first) & (sources < stop)]
                keys[filled : filled + len(here)] = here
                filled += len(here)
            keys.sort()
            counts = np.empty(pairs, np.int64)
            distinct = _count_equal(keys, counts)
            for start in range(0, distinct, _PIECE):
                piece = keys[start : min(start + _PIECE, distinct)]
                yield (
                    (piece >> _HALF).astype(np.int32),
                    (piece & _LOW).astype(np.int32),
                    counts[start : start + len(piece)],
                )

    def _ranges(self, files: Sequence[Path], most: int) -> Iterator[tuple[int, int, int]]:
        """Yield ranges of sources and how many pairs each has, ``most`` or one source's."""
        pairs = sum(file.stat().st_size for file in files) // 8
        if pairs <= most:
            yield 0, len(self.ids), pairs
            return
        starts = np.zeros(len(self.ids) + 1, np.int64)
        for piece in _pieces(files):
            starts[1:] += np.bincount((piece >> _HALF).astype(np.int64), minlength=len(self.ids))
        np.cumsum(starts, out=starts)
        for first, stop in row_ranges(starts, most):
            yield first, stop, int(starts[stop] - starts[first])


def _pieces(files: Sequence[Path]) -> Iterator[NDArray[np.uint64]]:
    for file in files:
        with file.open("rb") as opened:
            while len(piece := np.fromfile(opened, np.uint64, _PIECE)):
                yield piece


def _write_pairs(
    files: Sequence[Path],
    codes: NDArray[np.int32],
    hashes: NDArray[np.int64],
    first_day: int,
    options: GraphOptions,
    folder: Path,
    parts: int,
    part: int,
) -> None:
    """Write the pairs of one part of the users into files ``day-part``."""
    window_us = round(options.window_s * 1e6)
    since_us = first_day * US_PER_DAY
    users, items, at = _events(files, codes, since_us - window_us, parts, part)
    # One user's events come together where half a hash and a place are sorted as one number, in an
    # eighth of the time of ordering whole hashes. Users of equal halves are parted later.
    keys = (users.view(np.uint64) & ~_LOW) | np.arange(len(users), dtype=np.uint64)
    keys.sort()
    order = (keys & _LOW).view(np.int64)
    del keys
    users = users[order]
    items = items[order]
    at = at[order]
    del order
    _sort_events(users, items, at, hashes, _GAPS)
    followers = min(options.max_followers, len(users))
    keys = np.empty(max(_PIECE, followers), np.uint64)
    days = np.empty(len(keys), np.int32)
    done = 0
    while done < len(users):
        done, count = _pair(users, items, at, done, window_us, followers, since_us, keys, days)
        found = days[:count]
        for day in np.unique(found):
            with (folder / f"{day}-{part}").open("ab") as out:
                out.write(keys[:count][found == day].data)


def _events(
    files: Sequence[Path], codes: NDArray[np.int32], since_us: int, parts: int, part: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Return users, item codes and times of one part's events."""
    taken = []
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
                user, number, at = (np.asarray(batch.column(name)) for name in (USER, NUMBER, AT))
                here = np.flatnonzero(
                    (user.view(np.uint64) % np.uint64(parts) == part) & (at >= since_us)
                )
                taken.append((user[here], codes[number[here]], at[here]))
    empty = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64)
    users, items, times = (np.concatenate(column) for column in zip(empty, *taken, strict=True))
    return users, items, times


@compiled
def _tie(user: Any, item_hash: Any, at_us: Any) -> Any:
    """See ``pairs``: the order within an instant."""
    factor = ((user & HASH_BITS) + at_us // 1_000_000) % (PRIME - 1) + 1
    return ((item_hash & HASH_BITS) + 1) * factor % PRIME


@compiled
def _sort_events(users: Any, items: Any, at: Any, hashes: Any, gaps: Any) -> None:
    """Sort in place by user, time, tie and item what is ordered by the half of the user's hash."""
    start = 0
    for stop in range(1, len(users) + 1):
        if stop < len(users) and users[stop] >> 32 == users[start] >> 32:
            continue
        for gap in gaps:
            for k in range(start + gap, stop):
                user, item, when = users[k], items[k], at[k]
                place = k
                while place - gap >= start:
                    before = place - gap
                    if users[before] != user:
                        if users[before] < user:
                            break
                    elif at[before] != when:
                        if at[before] < when:
                            break
                    else:
                        tie = _tie(user, hashes[item], when)
                        other = _tie(user, hashes[items[before]], when)
                        if other < tie or (other == tie and items[before] <= item):
                            break
                    users[place], items[place], at[place] = users[before], items[before], at[before]
                    place = before
                users[place], items[place], at[place] = user, item, when
        start = stop


@compiled
def _pair(
    users: Any,
    items: Any,
    at: Any,
    first: int,
    window_us: int,
    followers: int,
    since_us: int,
    keys: Any,
    days: Any,
) -> Any:
    """Pair events from ``first`` on until they end or ``keys`` might not hold one event's more."""
    count = 0
    for k in range(first, len(users)):
        if count + followers > len(keys):
            return k, count
        for later in range(k + 1, min(k + 1 + followers, len(users))):
            if users[later] != users[k] or at[later] > at[k] + window_us:
                break
            if items[later] != items[k] and at[later] >= since_us:
                source, target = min(items[k], items[later]), max(items[k], items[later])
                keys[count] = (np.uint64(source) << _HALF) | np.uint64(target)
                days[count] = at[later] // US_PER_DAY
                count += 1
    return len(users), count


@compiled
def _count_equal(keys: Any, counts: Any) -> int:
    """Bring the distinct of sorted keys to the front, and say how often each was there."""
    distinct = 0
    for k in range(len(keys)):
        if distinct and keys[distinct - 1] == keys[k]:
            counts[distinct - 1] += 1
        else:
            keys[distinct] = keys[k]
            counts[distinct] = 1
            distinct += 1
    return distinct

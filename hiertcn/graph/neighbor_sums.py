"""Sum weighted pairs of rows and keep each row's strongest neighbors, in bounded memory.

The pairs lie on disk as numbers, both ends once. A range of rows is worked on at a time: its
pairs are gathered by row (a counting sort), each row adds up its own in an array over all rows
and keeps the best by insertion. A sort of all pairs, which a query engine needs for the same,
takes several times as long.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled

_BYTES_AN_END: Final = 20
_INSERTED_AT_MOST: Final = 128
_PIECE: Final = 1 << 20
_NEWEST: Final = np.uint8(1)
_PREVIOUS: Final = np.uint8(2)
_SEEN: Final = np.uint8(4)
_REPEATED: Final = np.uint8(8)


@dataclass(frozen=True)
class DayPairs:
    """One day's pairs in raw files.

    Attributes:
        source, target: files of int32, rows; each pair lies there once.
        count: file of int64.
        units: what a co-interaction of this day weighs, an integer.
        newest, previous: whether the day is the window's last, or the last but one.
    """

    source: Path
    target: Path
    count: Path
    units: int
    newest: bool
    previous: bool

    def pieces(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]]:
        """Yield sources int32 [n], targets int32 [n] and counts int64 [n]."""
        with (
            self.source.open("rb") as sources,
            self.target.open("rb") as targets,
            self.count.open("rb") as counts,
        ):
            while len(source := np.fromfile(sources, np.int32, _PIECE)):
                target = np.fromfile(targets, np.int32, _PIECE)
                yield source, target, np.fromfile(counts, np.int64, _PIECE)


class PairCounts(NamedTuple):
    """Distinct pairs: of positive weight, those with an unknown end, and where they were seen."""

    pairs: int = 0
    unknown: int = 0
    newest: int = 0
    previous: int = 0
    both: int = 0
    seen_before: int = 0


@dataclass(frozen=True)
class Strongest:
    """What :func:`strongest_neighbors` found.

    Attributes:
        degrees: int64 [items], neighbors kept.
        counts: of all pairs.
    """

    degrees: NDArray[np.int64]
    counts: PairCounts
    _files: list[tuple[Path, Path]]

    def pieces(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Yield neighbors int32 [n] and weights int64 [n]: rows ascending, strongest first."""
        for neighbors, weights in self._files:
            yield np.fromfile(neighbors, np.int32), np.fromfile(weights, np.int64)


def strongest_neighbors(
    days: Sequence[DayPairs],
    items: int,
    rows: int,
    top_n: int,
    memory: int,
    threads: int,
    folder: Path,
) -> Strongest:
    """Sum the pairs of all days and keep each item's ``top_n`` heaviest, ties to the lower row.

    Args:
        days: pairs of rows below ``rows``; those from ``items`` on are counted but not kept.
        items, rows: numbers of rows.
        top_n: neighbors kept.
        memory: bytes for pairs, of all threads together; 9 bytes a row and thread come on top.
        threads: row ranges worked on at once.
        folder: existing folder for what is found, read by :meth:`Strongest.pieces`.
    """
    starts = np.zeros(rows + 1, np.int64)
    for day in days:
        for source, target, _ in day.pieces():
            _count_ends(source, target, starts[1:])
    np.cumsum(starts, out=starts)
    degrees = np.zeros(rows, np.int64)
    ranges = list(row_ranges(starts, min(memory // _BYTES_AN_END, starts[-1]) // threads))
    work = partial(_of_range, days, starts, items, top_n, degrees, folder)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(work, ranges))
    counts = sum((counts for counts, _ in found), np.zeros(len(PairCounts._fields), np.int64))
    return Strongest(degrees[:items], PairCounts(*counts.tolist()), [files for _, files in found])


def row_ranges(starts: NDArray[np.int64], ends: int) -> Iterator[tuple[int, int]]:
    """Cut the rows into ranges of about ``ends`` ends of pairs, or of one row with more.

    Args:
        starts: int64 [rows + 1], ends of pairs before each row, ascending from 0.
        ends: wanted in a range.
    """
    first, rows = 0, len(starts) - 1
    while first < rows:
        stop = int(np.searchsorted(starts, starts[first] + max(ends, 1), "right")) - 1
        stop = max(stop, first + 1)
        yield first, stop
        first = stop


def _of_range(
    days: Sequence[DayPairs],
    starts: NDArray[np.int64],
    items: int,
    top_n: int,
    degrees: NDArray[np.int64],
    folder: Path,
    rows: tuple[int, int],
) -> tuple[NDArray[np.int64], tuple[Path, Path]]:
    first, stop = rows
    here = starts[first : stop + 1] - starts[first]
    neighbors = np.empty(here[-1], np.int32)
    weights = np.empty(here[-1], np.int64)
    days_of = np.empty(here[-1], np.uint8)
    cursor = here[:-1].copy()
    for day in days:
        kind = _SEEN | (_NEWEST * day.newest) | (_PREVIOUS * day.previous)
        for piece in day.pieces():
            _gather(*piece, day.units, kind, first, cursor, neighbors, weights, days_of)
    counts = np.zeros(len(PairCounts._fields), np.int64)
    # What is kept goes to the front of the same arrays: never more than was read.
    kept = _strongest(
        first,
        here,
        neighbors,
        weights,
        days_of,
        items,
        top_n,
        np.zeros(len(starts) - 1, np.int64),
        np.zeros(len(starts) - 1, np.uint8),
        degrees[first:stop],
        counts,
    )
    files = folder / f"neighbors-{first}", folder / f"weights-{first}"
    files[0].write_bytes(neighbors[:kept].data)
    files[1].write_bytes(weights[:kept].data)
    return counts, files


@compiled
def _count_ends(source: Any, target: Any, ends: Any) -> None:
    for k in range(len(source)):
        ends[source[k]] += 1
        ends[target[k]] += 1


@compiled
def _gather(
    source: Any,
    target: Any,
    count: Any,
    units: int,
    kind: Any,
    first: int,
    cursor: Any,
    neighbors: Any,
    weights: Any,
    days: Any,
) -> None:
    for k in range(len(source)):
        for one, other in ((source[k], target[k]), (target[k], source[k])):
            row = one - first
            if 0 <= row < len(cursor):
                place = cursor[row]
                cursor[row] += 1
                neighbors[place] = other
                weights[place] = count[k] * units
                days[place] = kind


@compiled
def _strongest(
    first: int,
    starts: Any,
    neighbors: Any,
    weights: Any,
    days: Any,
    items: int,
    top_n: int,
    sums: Any,
    seen: Any,
    degrees: Any,
    counts: Any,
) -> int:
    """Reduce each row's pairs in place; ``sums`` and ``seen`` [rows] are all 0 before and after."""
    total = 0
    for offset in range(len(starts) - 1):
        row, start = first + offset, starts[offset]
        distinct = 0
        for k in range(start, starts[offset + 1]):
            neighbor = neighbors[k]
            if seen[neighbor]:
                seen[neighbor] |= days[k] | _REPEATED
            else:
                seen[neighbor] = days[k]
                neighbors[start + distinct] = neighbor
                distinct += 1
            sums[neighbor] += weights[k]
        best = 0
        for k in range(start, start + distinct):
            neighbor = neighbors[k]
            weight, kind = sums[neighbor], seen[neighbor]
            sums[neighbor] = 0
            seen[neighbor] = 0
            if row < neighbor:
                newest, previous = (kind & _NEWEST) != 0, (kind & _PREVIOUS) != 0
                counts[0] += weight > 0
                counts[1] += weight > 0 and neighbor >= items
                counts[2] += newest
                counts[3] += previous
                counts[4] += newest and previous
                counts[5] += newest and (kind & _REPEATED) != 0
            if weight > 0 and neighbor < items and row < items:
                neighbors[start + best] = neighbor
                weights[start + best] = weight
                best += 1
        best = _heaviest_first(
            neighbors[start : start + best], weights[start : start + best], top_n
        )
        # Loops, for numba takes seconds to compile an assignment that may broadcast.
        for k in range(best):
            neighbors[total + k] = neighbors[start + k]
            weights[total + k] = weights[start + k]
        degrees[offset] = best
        total += best
    return total


@compiled
def _heaviest_first(neighbors: Any, weights: Any, top_n: int) -> int:
    """Bring the ``top_n`` heaviest to the front in order and return how many there are."""
    kept = min(len(neighbors), top_n)
    if kept > _INSERTED_AT_MOST:
        _select(neighbors, weights, kept)
        return kept
    for k in range(1, len(neighbors)):
        neighbor, weight = neighbors[k], weights[k]
        place = min(k, kept)
        while place > 0 and (
            weights[place - 1] < weight
            or (weights[place - 1] == weight and neighbors[place - 1] > neighbor)
        ):
            if place < kept:
                neighbors[place] = neighbors[place - 1]
                weights[place] = weights[place - 1]
            place -= 1
        if place < kept:
            neighbors[place] = neighbor
            weights[place] = weight
    return kept


@compiled
def _select(neighbors: Any, weights: Any, kept: int) -> None:
    """The same for many, through a heap of the heaviest so far with the lightest on top."""
    for root in range(kept // 2 - 1, -1, -1):
        _sift_down(neighbors, weights, root, kept)
    for k in range(kept, len(neighbors)):
        if _is_lighter(neighbors, weights, 0, k):
            _swap(neighbors, weights, 0, k)
            _sift_down(neighbors, weights, 0, kept)
    for end in range(kept - 1, 0, -1):
        _swap(neighbors, weights, 0, end)
        _sift_down(neighbors, weights, 0, end)


@compiled
def _sift_down(neighbors: Any, weights: Any, root: int, end: int) -> None:
    child = 2 * root + 1
    while child < end:
        if child + 1 < end and _is_lighter(neighbors, weights, child + 1, child):
            child += 1
        if not _is_lighter(neighbors, weights, child, root):
            break
        _swap(neighbors, weights, child, root)
        root, child = child, 2 * child + 1


@compiled
def _is_lighter(neighbors: Any, weights: Any, one: int, other: int) -> bool:
    if weights[one] != weights[other]:
        return bool(weights[one] < weights[other])
    return bool(neighbors[one] > neighbors[other])


@compiled
def _swap(neighbors: Any, weights: Any, one: int, other: int) -> None:
    neighbors[one], neighbors[other] = neighbors[other], neighbors[one]
    weights[one], weights[other] = weights[other], weights[one]

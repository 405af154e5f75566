"""Importance neighborhoods: whom random walks from an item visit most (PinSage, section 3.1).

From every item ``walks`` walks of ``length`` steps start. Before each step the walk returns to its
start with probability ``restart``, then moves to a neighbor with probability proportional to the
edge's weight; an item without neighbors sends it back to the start. The ``top`` most visited other
items are the neighborhood, the normalized visit counts its weights: with ``p_0`` at the start and
``p_t = (restart * p_0 + (1 - restart) * p_{t-1}) W`` the counts estimate ``sum_t p_t``, ties going
to the lower row.

Every item has a random stream of its own (SplitMix64 from the seed and the row), so the result
depends on the seed alone, not on threads or chunks. Cost: 30,000 to 50,000 items a second and core
with 50 walks of 4 steps; 4 bytes per edge plus the result in memory. Compiled by numba at the
first call (a few seconds, cached on disk).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.files import read_json, whole_directory, write_json
from hiertcn.graph.csr import CSR, read_only
from hiertcn.items.hashing import compiled

NO_ITEM: Final = -1

_ROWS_FILE: Final = "rows.npy"
_WEIGHTS_FILE: Final = "weights.npy"
_OPTIONS_FILE: Final = "walks.json"
_ITEMS_PER_TASK: Final = 1 << 12
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, kw_only=True)
class WalkOptions:
    """How neighborhoods are walked.

    Attributes:
        walks: walks from each item.
        length: steps of a walk.
        restart: probability of returning to the start before a step, at least 0 and below 1.
        top: neighbors kept.
        seed: of the random streams.
    """

    walks: int = 50
    length: int = 4
    restart: float = 0.3
    top: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("walks", "length", "top"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.restart < 1:
            raise InputError(f"restart is {self.restart}; expected a probability in [0, 1)")


@dataclass(frozen=True, eq=False)
class Neighborhoods:
    """The most visited items around each item.

    Attributes:
        rows: int32 [items, top], by falling weight, -1 where there are fewer.
        weights: float32 [items, top], summing to 1 over an item's neighbors, 0 beside a -1.
        options: how they were walked, so that they can be walked again on another graph.
    """

    rows: NDArray[np.int32]
    weights: NDArray[np.float32]
    options: WalkOptions

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", read_only(self.rows))
        object.__setattr__(self, "weights", read_only(self.weights))

    def __len__(self) -> int:
        return len(self.rows)

    def write(self, directory: Path) -> None:
        """Write the arrays and how they were walked, whole or not at all."""
        with whole_directory(directory) as aside:
            np.save(aside / _ROWS_FILE, self.rows)
            np.save(aside / _WEIGHTS_FILE, self.weights)
            write_json(aside / _OPTIONS_FILE, asdict(self.options))

    @classmethod
    def open(cls, directory: Path) -> "Neighborhoods":
        """Map neighborhoods that :meth:`write` wrote.

        Raises:
            InputError: a file is missing, truncated, or disagrees with the others.
        """
        try:
            rows, weights = (
                np.asarray(np.load(directory / name, mmap_mode="r", allow_pickle=False))
                for name in (_ROWS_FILE, _WEIGHTS_FILE)
            )
            options = WalkOptions(**read_json(directory / _OPTIONS_FILE))
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise InputError(
                f"the neighborhoods at {directory} cannot be mapped ({error}); walk again"
            ) from error
        if rows.shape != weights.shape or rows.shape[1:] != (options.top,):
            raise InputError(
                f"the neighborhoods at {directory} have rows {list(rows.shape)} and weights "
                f"{list(weights.shape)}, expected [items, {options.top}] each; walk again"
            )
        return cls(rows, weights, options)


def importance_neighborhoods(
    csr: CSR,
    *,
    walks: int = 50,
    length: int = 4,
    restart: float = 0.3,
    top: int = 10,
    seed: int = 0,
    threads: int = 0,
    progress: bool = True,
) -> Neighborhoods:
    """Walk from every item of the graph and return whom the walks visit most.

    Args:
        csr: the item graph.
        walks, length, restart, top, seed: see :class:`WalkOptions`.
        threads: 0 means one per core; the result does not depend on it.
        progress: show a progress bar.

    Raises:
        InputError: an option is out of its range.
    """
    options = WalkOptions(walks=walks, length=length, restart=restart, top=top, seed=seed)
    return walk_neighborhoods(csr, options, threads=threads, progress=progress)


def walk_neighborhoods(
    csr: CSR, options: WalkOptions, *, threads: int = 0, progress: bool = True
) -> Neighborhoods:
    """Like :func:`importance_neighborhoods`, from one options object."""
    rows = np.full((csr.items, options.top), NO_ITEM, np.int32)
    weights = np.zeros((csr.items, options.top), np.float32)
    thresholds = np.empty(len(csr.indices), np.uint32)
    _cumulate(csr.indptr, csr.weights, thresholds)

    def walk(first: int) -> int:
        part = slice(first, first + _ITEMS_PER_TASK)
        _walk(
            csr.indptr,
            csr.indices,
            thresholds,
            first,
            options.walks,
            options.length,
            np.uint64(round(options.restart * 2**32)),
            np.uint64(options.seed & (2**64 - 1)),
            rows[part],
            weights[part],
        )
        return len(rows[part])

    bar = tqdm(
        total=csr.items, desc="walks", unit="item", mininterval=2, disable=not progress or None
    )
    # Threads of our own: numba's would set how many threads the OpenMP shared with torch uses.
    with bar, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for walked in pool.map(walk, range(0, csr.items, _ITEMS_PER_TASK)):
            bar.update(walked)
    return Neighborhoods(rows, weights, options)


@compiled
def _cumulate(indptr: Any, weights: Any, thresholds: Any) -> None:
    """Edge k of an item is chosen by the 32-bit numbers below thresholds[k] and not the last."""
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        total = 0.0
        for k in range(start, stop):
            total += weights[k]
        below = 0.0
        for k in range(start, stop):
            below += weights[k]
            thresholds[k] = np.uint32(min(below / total * 4294967296.0, 4294967295.0))
        if stop > start:
            thresholds[stop - 1] = np.uint32(4294967295)


@compiled
def _mix(state: Any) -> Any:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


@compiled
def _walk(
    indptr: Any,
    indices: Any,
    thresholds: Any,
    first: int,
    walks: int,
    length: int,
    restart: Any,
    seed: Any,
    rows: Any,
    weights: Any,
) -> None:
    low_half = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    slots = 2
    while slots < 2 * walks * length:
        slots *= 2
    visited = np.full(slots, -1, np.int32)
    counts = np.zeros(slots, np.int32)
    used = np.empty(walks * length, np.int64)
    for offset in range(len(rows)):
        home = first + offset
        if indptr[home] == indptr[home + 1]:
            continue
        state = _mix(seed ^ _mix(np.uint64(home) + _GOLDEN))
        distinct = 0
        for _ in range(walks):
            here = np.int64(home)
            for _ in range(length):
                state += _GOLDEN
                draw = _mix(state)
                if (draw >> half) < restart or indptr[here] == indptr[here + 1]:
                    here = np.int64(home)
                choice = draw & low_half
                low, high = indptr[here], indptr[here + 1] - 1
                while low < high:
                    middle = (low + high) >> 1
                    if np.uint64(thresholds[middle]) <= choice:
                        low = middle + 1
                    else:
                        high = middle
                here = np.int64(indices[low])
                if here == home:
                    continue
                slot = np.int64(_mix(np.uint64(here)) & np.uint64(slots - 1))
                while visited[slot] != here and visited[slot] != -1:
                    slot = (slot + 1) & (slots - 1)
                if visited[slot] == -1:
                    visited[slot] = here
                    used[distinct] = slot
                    distinct += 1
                counts[slot] += 1
        kept = _keep_most_visited(visited, counts, used[:distinct], rows[offset])
        total = 0
        for place in range(kept):
            total += _count_of(visited, counts, rows[offset, place])
        for place in range(kept):
            weights[offset, place] = _count_of(visited, counts, rows[offset, place]) / total
        for k in range(distinct):
            visited[used[k]] = -1
            counts[used[k]] = 0


@compiled
def _count_of(visited: Any, counts: Any, item: Any) -> Any:
    slots = len(visited)
    slot = np.int64(_mix(np.uint64(item)) & np.uint64(slots - 1))
    while visited[slot] != item:
        slot = (slot + 1) & (slots - 1)
    return counts[slot]


@compiled
def _keep_most_visited(visited: Any, counts: Any, used: Any, best: Any) -> Any:
    """Insert into the sorted list ``best``: by falling count, then rising row."""
    kept = 0
    held = np.empty(len(best), np.int32)
    for slot in used:
        item, count = visited[slot], counts[slot]
        if kept == len(best):
            worst = held[kept - 1]
            if count < worst or (count == worst and item > best[kept - 1]):
                continue
        else:
            kept += 1
        place = kept - 1
        while place > 0 and (
            held[place - 1] < count or (held[place - 1] == count and best[place - 1] > item)
        ):
            held[place] = held[place - 1]
            best[place] = best[place - 1]
            place -= 1
        held[place] = count
        best[place] = item
    return kept

"""The compiled loops of the random walks (see ``walks``)."""

from typing import Any, Final

import numpy as np

from hiertcn.compiling import compiled

_INSERTED_AT_MOST: Final = 128
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
_16: Final = np.uint64(16)
_HALF: Final = np.uint64(32)
_HIGH: Final = np.uint64(48)
_LOW: Final = np.uint64(0xFFFFFFFF)
_PART: Final = np.uint64(0xFFFF)


@compiled
def alias_entries(indptr: Any, indices: Any, weights: Any, entries: Any) -> None:
    """Vose's construction: neighbor in the low 32 bits, then 16 of probability, 16 of alias.

    An entry's neighbor is taken if 16 random bits are at most its probability, else the neighbor
    of the entry ``alias`` places from the item's first.
    """
    most = 0
    for row in range(len(indptr) - 1):
        most = max(most, indptr[row + 1] - indptr[row])
    share = np.empty(most, np.float64)
    small = np.empty(most, np.int64)
    large = np.empty(most, np.int64)
    for row in range(len(indptr) - 1):
        start, degree = indptr[row], indptr[row + 1] - indptr[row]
        total = 0.0
        for k in range(degree):
            total += weights[start + k]
        smalls, larges = 0, 0
        for k in range(degree):
            share[k] = weights[start + k] * degree / total
            entries[start + k] = (
                np.uint64(indices[start + k]) | np.uint64(0xFFFF << 32) | (np.uint64(k) << _HIGH)
            )
            if share[k] < 1.0:
                small[smalls] = k
                smalls += 1
            else:
                large[larges] = k
                larges += 1
        while smalls and larges:
            smalls -= 1
            one, other = small[smalls], large[larges - 1]
            # Rounded so that a share of 0 is never taken and one of 1 always.
            parts = np.uint64(min(max(share[one] * 65536.0 - 0.5, 0.0), 65535.0))
            entries[start + one] = (
                np.uint64(indices[start + one]) | (parts << _HALF) | (np.uint64(other) << _HIGH)
            )
            share[other] -= 1.0 - share[one]
            if share[other] < 1.0:
                larges -= 1
                small[smalls] = other
                smalls += 1


@compiled
def _mix(state: Any) -> Any:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


@compiled
def walk_items(
    indptr: Any,
    entries: Any,
    first: int,
    walks: int,
    length: int,
    restart: Any,
    seed: Any,
    rows: Any,
    weights: Any,
) -> None:
    """Walk from the items ``first`` onwards and fill their rows and weights [n, top].

    Args:
        indptr: int64 [items + 1].
        entries: uint64 [edges], of :func:`alias_entries`.
        first: the first item's row.
        walks, length: see :class:`hiertcn.graph.walks.WalkOptions`.
        restart: its probability in units of 2^-16, uint64.
        seed: uint64.
        rows: int32 [n, top], filled with -1.
        weights: float32 [n, top], filled with 0.
    """
    top = rows.shape[1]
    slots = 2
    while slots < 2 * walks * length:
        slots *= 2
    slot_mask = np.uint64(slots - 1)
    visited = np.full(slots, -1, np.int32)
    counts = np.zeros(slots, np.int32)
    used = np.empty(walks * length, np.int64)
    keys = np.empty(walks * length, np.uint64)
    here = np.empty(walks, np.int64)
    start = np.empty(walks, np.int64)
    degree = np.empty(walks, np.int64)
    draws = np.empty(walks, np.uint64)
    for offset in range(len(rows)):
        home = first + offset
        home_start, home_degree = indptr[home], indptr[home + 1] - indptr[home]
        if home_degree == 0:
            continue
        state = _mix(seed ^ _mix(np.uint64(home) + _GOLDEN))
        distinct = 0
        for walk in range(walks):
            here[walk] = home
        for _ in range(length):
            # Four loops, so that the loads of all walks are under way at once.
            for walk in range(walks):
                start[walk] = indptr[here[walk]]
                degree[walk] = indptr[here[walk] + 1] - start[walk]
            for walk in range(walks):
                state += _GOLDEN
                draws[walk] = _mix(state)
                if ((draws[walk] >> _16) & _PART) < restart or degree[walk] == 0:
                    start[walk], degree[walk] = home_start, home_degree
            for walk in range(walks):
                # The high 32 bits choose the entry, the low 16 between it and its alias.
                place = ((draws[walk] >> _HALF) * np.uint64(degree[walk])) >> _HALF
                entry = entries[start[walk] + np.int64(place)]
                if (draws[walk] & _PART) > ((entry >> _HALF) & _PART):
                    entry = entries[start[walk] + np.int64(entry >> _HIGH)]
                here[walk] = np.int64(entry & _LOW)
            for walk in range(walks):
                item = here[walk]
                if item == home:
                    continue
                slot = np.int64(_slot_hash(item) & slot_mask)
                while visited[slot] != item and visited[slot] != -1:
                    slot = (slot + 1) & np.int64(slot_mask)
                if visited[slot] == -1:
                    visited[slot] = item
                    used[distinct] = slot
                    distinct += 1
                counts[slot] += 1
        # By falling count, then rising row.
        for k in range(distinct):
            slot = used[k]
            keys[k] = (np.uint64(walks * length - counts[slot]) << _HALF) | np.uint64(visited[slot])
            visited[slot] = -1
            counts[slot] = 0
        kept = min(top, distinct)
        _smallest_first(keys, distinct, kept)
        total = np.int64(0)
        for place in range(kept):
            total += walks * length - np.int64(keys[place] >> _HALF)
        for place in range(kept):
            rows[offset, place] = np.int32(keys[place] & _LOW)
            count = walks * length - np.int64(keys[place] >> _HALF)
            weights[offset, place] = count / total


@compiled
def _slot_hash(item: Any) -> Any:
    return (np.uint64(item) * _GOLDEN) >> np.uint64(40)


@compiled
def _smallest_first(keys: Any, length: int, kept: int) -> None:
    """Bring the ``kept`` smallest of ``keys[:length]`` to its front in order."""
    if kept > _INSERTED_AT_MOST:
        keys[:length].sort()
        return
    for k in range(1, length):
        key = keys[k]
        place = k
        if k >= kept:
            if key > keys[kept - 1]:
                continue
            place = kept - 1
        while place > 0 and keys[place - 1] > key:
            keys[place] = keys[place - 1]
            place -= 1
        keys[place] = key

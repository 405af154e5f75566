"""The compiled part of the memory features (``memory.py``).

A request touches a few hundred items of a catalogue that may hold millions. So the features are
added up in a small open-addressed table of the touched items, which stays in the nearest caches,
instead of in arrays of the catalogue's length: 500 candidates of 200,000 items cost a third, and
nothing is kept between requests.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.sessions.live_transitions import (
    NEWEST,
    SMOOTHING,
    START,
    LiveTransitions,
    newest_followers,
)

_CONTEXT: Final = 12
_CONTEXT_DECAY: Final = 0.3
_OWN_CONTEXT: Final = 3
_OWN_REACH: Final = 4
_LIVE_CONTEXT: Final = 3
_SESSION_DECAY: Final = 0.8
_FEATURES: Final = 6
_NO_ITEM: Final = np.int32(-1)


class HistoryArrays(NamedTuple):
    """``memory.Histories`` as compiled code takes it."""

    rows: NDArray[np.int32]
    sessions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    running: NDArray[np.int64]
    asked_us: NDArray[np.int64]


class TableArrays(NamedTuple):
    """`TransitionTable` as compiled code takes it.

    ``catalogue`` is how many rows are items: those past the table have no followers.
    """

    offsets: NDArray[np.int64]
    followers: NDArray[np.int32]
    weights: NDArray[np.float32]
    totals: NDArray[np.float32]
    catalogue: int


class _Slots(NamedTuple):
    """Features of the items that one request touches.

    Attributes:
        items: int32 ``[slots]``, the item in each slot or -1; a power of two of them, at most half
            in use.
        features: float32 ``[slots, features]``.
        used: int32 ``[slots / 2]``, the slots in use, in the order they came.
        held: int64 ``[1]``, how many those are.
    """

    items: NDArray[np.int32]
    features: NDArray[np.float32]
    used: NDArray[np.int32]
    held: NDArray[np.int64]


@compiled
def fill_catalogue(
    out: NDArray[np.float32], histories: HistoryArrays, table: TableArrays, live: LiveTransitions
) -> None:
    """Add the features of all items to ``out [features, n, items]``, which is zeros."""
    slots = _slots(64)
    for request in range(len(histories.running)):
        slots = _added_up(request, histories, table, live, slots)
        for place in range(slots.held[0]):
            slot = slots.used[place]
            if slots.items[slot] < out.shape[2]:
                for feature in range(_FEATURES):
                    out[feature, request, slots.items[slot]] = slots.features[slot, feature]


@compiled
def fill_items(
    out: NDArray[np.float32],
    asked: NDArray[np.int64],
    shared: bool,
    histories: HistoryArrays,
    table: TableArrays,
    live: LiveTransitions,
) -> None:
    """Write the features of the asked items to ``out [features, n, count]``, which is zeros.

    Args:
        out: overwritten where an item has features.
        asked: int64 ``[n, count]``, or ``[1, count]`` where they are shared.
        shared: whether every request asks for the same items.
        histories: of ``n`` requests.
        table: the transitions.
        live: the newest transitions.
    """
    slots = _slots(64)
    for request in range(len(histories.running)):
        slots = _added_up(request, histories, table, live, slots)
        if slots.held[0] == 0:
            continue
        mine = asked[0] if shared else asked[request]
        for column in range(len(mine)):
            slot = _found(slots.items, mine[column]) if mine[column] >= 0 else -1
            if slot >= 0:
                for feature in range(_FEATURES):
                    out[feature, request, column] = slots.features[slot, feature]


@compiled
def weigh_items(
    weighed: NDArray[np.float32],
    in_session: NDArray[np.float32],
    asked: NDArray[np.int64],
    weights: NDArray[np.float32],
    histories: HistoryArrays,
    table: TableArrays,
    live: LiveTransitions,
) -> None:
    """Write weighted sums of the asked items' features, and that of the running session.

    Args:
        weighed: float32 ``[n, count]``, zeros.
        in_session: float32 ``[n, count]``, zeros.
        asked: int64 ``[n, count]``.
        weights: float32 ``[n, features]``.
        histories: of ``n`` requests.
        table: the transitions.
        live: the newest transitions.
    """
    slots = _slots(64)
    for request in range(len(histories.running)):
        slots = _added_up(request, histories, table, live, slots)
        if slots.held[0] == 0:
            continue
        for column in range(asked.shape[1]):
            item = asked[request, column]
            slot = _found(slots.items, item) if item >= 0 else -1
            if slot >= 0:
                total = np.float32(0.0)
                for feature in range(_FEATURES):
                    total += weights[request, feature] * slots.features[slot, feature]
                weighed[request, column] = total
                in_session[request, column] = slots.features[slot, 3]


@compiled
def find_support(
    out: NDArray[np.int64], histories: HistoryArrays, table: TableArrays, live: LiveTransitions
) -> None:
    """Write the items with any feature above zero to ``out [n, most]``, largest sums first."""
    slots = _slots(64)
    for request in range(len(histories.running)):
        slots = _added_up(request, histories, table, live, slots)
        sums = np.empty(slots.held[0], np.float32)
        for place in range(len(sums)):
            sums[place] = -slots.features[slots.used[place]].sum()
        order = np.argsort(sums, kind="mergesort")
        for place in range(min(out.shape[1], len(order))):
            if sums[order[place]] < 0.0:
                out[request, place] = slots.items[slots.used[order[place]]]


@compiled
def _slots(count: int) -> _Slots:
    return _Slots(
        np.full(count, _NO_ITEM, np.int32),
        np.zeros((count, _FEATURES), np.float32),
        np.empty(count // 2, np.int32),
        np.zeros(1, np.int64),
    )


@compiled
def _emptied(slots: _Slots, touched: int) -> _Slots:
    """Empty slots for up to so many items."""
    if touched > len(slots.used):
        count = 2 * len(slots.items)
        while count < 2 * touched:
            count *= 2
        return _slots(count)
    for place in range(slots.held[0]):
        slots.items[slots.used[place]] = _NO_ITEM
        slots.features[slots.used[place]].fill(0.0)
    slots.held[0] = 0
    return slots


@compiled
def _home(items: NDArray[np.int32], item: Any) -> Any:
    # Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4): neighbours part.
    mixed = np.uint64(item) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(mixed >> np.uint64(32)) & (len(items) - 1)


@compiled
def _found(items: NDArray[np.int32], item: Any) -> int:
    """The slot of an item, -1 if it has none."""
    slot = _home(items, item)
    while items[slot] != item:
        if items[slot] == _NO_ITEM:
            return -1
        slot = (slot + 1) & (len(items) - 1)
    return int(slot)


@compiled
def _slot_of(slots: _Slots, item: Any) -> int:
    """The slot of an item, which it now has."""
    slot = _home(slots.items, item)
    while slots.items[slot] != item:
        if slots.items[slot] == _NO_ITEM:
            slots.items[slot] = item
            slots.used[slots.held[0]] = slot
            slots.held[0] += 1
            break
        slot = (slot + 1) & (len(slots.items) - 1)
    return int(slot)


@compiled
def _added_up(
    request: int,
    histories: HistoryArrays,
    table: TableArrays,
    live: LiveTransitions,
    slots: _Slots,
) -> _Slots:
    """One request's features, in emptied slots or larger ones."""
    rows, sessions = histories.rows, histories.sessions
    items, catalogue = len(table.totals), table.catalogue
    first, end = histories.offsets[request], histories.offsets[request + 1]
    session_start = end - histories.running[request]

    context_start = session_start if session_start < end else first
    context_start = max(context_start, end - _CONTEXT)
    live_start = max(session_start, end - _LIVE_CONTEXT)
    touched = end - first + max(1, end - live_start) * NEWEST
    weight_sum, weight = 0.0, 1.0
    for place in range(context_start, end):
        weight_sum += weight
        weight *= _CONTEXT_DECAY
        if 0 <= rows[place] < items:
            touched += table.offsets[rows[place] + 1] - table.offsets[rows[place]]
    slots = _emptied(slots, touched)
    features = slots.features

    weight = 1.0
    for place in range(end - 1, context_start - 1, -1):
        item = rows[place]
        if 0 <= item < items:
            total = table.totals[item]
            if total > 0.0:
                share = weight / (weight_sum * total)
                for entry in range(table.offsets[item], table.offsets[item + 1]):
                    slot = _slot_of(slots, table.followers[entry])
                    features[slot, 0] += share * table.weights[entry]
        weight *= _CONTEXT_DECAY

    followers = np.empty(NEWEST, np.int32)
    if session_start == end:
        _add_live(live, START, 1.0, histories.asked_us[request], followers, slots)
    weight = 1.0
    for place in range(end - 1, live_start - 1, -1):
        if 0 <= rows[place] < catalogue:
            _add_live(live, rows[place], weight, histories.asked_us[request], followers, slots)
        weight *= _CONTEXT_DECAY

    # Twice: what is added is a share of the sum.
    own_sum = 0.0
    for adds in (False, True):
        weight = 1.0
        for back in range(1, _OWN_CONTEXT + 1):
            at_start = end - back < session_start
            item = np.int32(-1) if at_start else rows[end - back]
            for place in range(first, session_start if at_start else end - back):
                if at_start:
                    if place > first and sessions[place] == sessions[place - 1]:
                        continue
                    begin = place
                else:
                    if rows[place] != item:
                        continue
                    begin = place + 1
                followed = weight
                for follower_place in range(begin, min(begin + _OWN_REACH, end)):
                    if sessions[follower_place] != sessions[place]:
                        break
                    follower = rows[follower_place]
                    if 0 <= follower < catalogue:
                        if adds:
                            features[_slot_of(slots, follower), 1] += followed / (own_sum + 1.0)
                        else:
                            own_sum += followed
                    followed *= 0.5
            if at_start:
                break
            weight *= _CONTEXT_DECAY

    # Powers by repeated products, newest session first: the same for every place of a session.
    past, share = 0.0, 1.0
    for place in range(session_start - 1, first - 1, -1):
        share = _aged(share, sessions, place, session_start)
        if 0 <= rows[place] < catalogue:
            past += share
    share = 1.0
    for place in range(session_start - 1, first - 1, -1):
        share = _aged(share, sessions, place, session_start)
        item = rows[place]
        if 0 <= item < catalogue:
            slot = _slot_of(slots, item)
            features[slot, 2] += share / past
            features[slot, 4] = features[slot, 0]
    for place in range(session_start, end):
        item = rows[place]
        if 0 <= item < catalogue:
            features[_slot_of(slots, item), 3] = 1.0
    return slots


@compiled
def _add_live(
    live: LiveTransitions,
    item: int,
    weight: float,
    now_us: int,
    followers: NDArray[np.int32],
    slots: _Slots,
) -> None:
    """Add what was gone on to from an item just now; ``followers`` is overwritten."""
    count = newest_followers(live, item, now_us, followers)
    for follower in followers[:count]:
        slots.features[_slot_of(slots, follower), 5] += weight / (count + SMOOTHING)


@compiled
def _aged(share: float, sessions: NDArray[np.int64], place: int, session_start: int) -> float:
    """The weight of a place whose successor has ``share``; less by a factor for every session."""
    if place + 1 < session_start:
        for _ in range(sessions[place + 1] - sessions[place]):
            share *= _SESSION_DECAY
    return share

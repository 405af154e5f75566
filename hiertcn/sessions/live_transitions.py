"""Who went on to what just now: the newest transitions of everybody's sessions, by item left.

Where what is read changes by the hour, what the last readers of an item went on to says more than
what followed it in training. A transition is two neighboring interactions of one session, at the
time of the later one; a session's first interaction is one from `START`, so that what sessions
begin with just now is known too. At time ``t`` the newest `NEWEST` from an item count, if they
happened before ``t`` and at most `WINDOW_US` earlier; the item's share of them, of `SMOOTHING` more
that belong to no item, is the feature ``live_transitions`` (``memory.py``).

This module reconstructs them for any time of a session store, for training and evaluation;
``live_followers.py`` of serving keeps them for the present. Memory: 12 bytes a transition and 8 an
item.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.sessions.store import SessionStore

WINDOW_US: Final = 3600 * 1_000_000
NEWEST: Final = 128
SMOOTHING: Final = 5.0
START: Final = -1
"""Stands for the item left where a session begins."""

_MOST_STEPS: Final = 4096
"""Transitions looked at where many are later than the time asked about, or far too old."""


class LiveTransitions(NamedTuple):
    """Transitions as compiled code takes them, in one of two forms; `START` counts as an item.

    Sorted, for any time: those of the item ``i`` lie at ``offsets[i + 1] .. offsets[i + 2] - 1``,
    by time, and ``heads`` is empty. Linked, for the present: the newest of ``i`` has the number
    ``heads[i + 1]``, from 1, and lies at ``(number - 1) % len(followers)``; the one before it from
    the same item has the number ``before``. Numbers up to ``forgotten`` are overwritten; 0 is none.

    Attributes:
        followers: int32 ``[k]``, the item gone on to.
        times_us: int64 ``[k]``.
        offsets: int64 ``[items + 2]``, or empty.
        heads: int64 ``[items + 1]``, or empty.
        before: int64 ``[k]``, or empty.
        forgotten: int64 ``[1]``.
    """

    followers: NDArray[np.int32]
    times_us: NDArray[np.int64]
    offsets: NDArray[np.int64]
    heads: NDArray[np.int64]
    before: NDArray[np.int64]
    forgotten: NDArray[np.int64]


def no_transitions() -> LiveTransitions:
    """Nobody went on to anything."""
    nothing = np.empty(0, np.int64)
    return LiveTransitions(
        np.empty(0, np.int32), nothing, nothing, nothing, nothing, np.zeros(1, np.int64)
    )


def live_transitions(store: SessionStore, items: int) -> LiveTransitions:
    """Return the transitions of a store between items of a catalogue of ``items``, sorted."""
    sources, followers, times_us = transitions_of(store)
    kept = (sources < items) & (followers < items)
    sources, followers, times_us = sources[kept], followers[kept], times_us[kept]
    order = np.lexsort((times_us, sources))
    offsets = np.zeros(items + 2, np.int64)
    np.cumsum(np.bincount(sources - START, minlength=items + 1), out=offsets[1:])
    return no_transitions()._replace(
        followers=followers[order], times_us=times_us[order], offsets=offsets
    )


def transitions_of(
    store: SessionStore, *, after_us: int | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Return the items left, int32 ``[k]``, and gone on to, and when, int64, in the store's order.

    The item left is `START` where a session begins.

    Args:
        store: the sessions.
        after_us: earlier transitions are left out; None for all.
    """
    rows, times_us = np.asarray(store.item_rows), np.asarray(store.timestamps_us)
    left = np.full(len(rows), START, np.int32)
    left[1:] = rows[:-1]
    left[np.asarray(store.session_offsets[:-1])] = START
    if after_us is None:
        return left, rows, times_us
    kept = times_us > after_us
    return left[kept], rows[kept], times_us[kept]


@compiled
def newest_followers(
    live: LiveTransitions, item: int, now_us: int, found: NDArray[np.int32]
) -> int:
    """Write what was gone on to from an item before a time, newest first, and return how many.

    Args:
        live: the transitions; none of an item past them.
        item: its row, or `START`.
        now_us: only earlier transitions count.
        found: int32 ``[most]``, overwritten.
    """
    count = 0
    source = item - START
    if len(live.heads) == 0:
        if source + 1 >= len(live.offsets):
            return 0
        first, end = live.offsets[source], live.offsets[source + 1]
        at = first + np.searchsorted(live.times_us[first:end], now_us) - 1
        while at >= first and count < len(found) and live.times_us[at] >= now_us - WINDOW_US:
            found[count] = live.followers[at]
            count += 1
            at -= 1
        return count
    if source >= len(live.heads):
        return 0
    number = live.heads[source]
    steps = 0
    while number > live.forgotten[0] and count < len(found) and steps < _MOST_STEPS:
        at = (number - 1) % len(live.followers)
        if now_us - WINDOW_US <= live.times_us[at] < now_us:
            found[count] = live.followers[at]
            count += 1
        number = live.before[at]
        steps += 1
    return count


@compiled
def link(
    live: LiveTransitions,
    count: int,
    sources: NDArray[Any],
    followers: NDArray[Any],
    times_us: NDArray[np.int64],
) -> int:
    """Add transitions in the order they came to the linked form, in place; return their number.

    Args:
        live: linked.
        count: transitions added before.
        sources: int ``[n]``, rows below ``len(heads) - 1``, or `START`.
        followers: int ``[n]``.
        times_us: int64 ``[n]``.
    """
    for place in range(len(sources)):
        at = count % len(live.followers)
        count += 1
        live.followers[at] = followers[place]
        live.times_us[at] = times_us[place]
        source = sources[place] - START
        live.before[at] = live.heads[source]
        live.heads[source] = count
    live.forgotten[0] = max(0, count - len(live.followers))
    return count

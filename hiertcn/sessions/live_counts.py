"""How much each item was interacted with in the last 5 and 15 minutes, hour and six hours.

The feature is a share: an item's interactions in the window over all items' and `SMOOTHING` more,
so that a quiet five minutes say little. Counts are by whole minutes: at time ``t``, in the
minute ``b``, a window of ``w`` minutes holds the interactions of the minutes ``b - w .. b - 1``.
The running minute never counts, so nothing is looked at ahead when a log is replayed, and the
sidecar need not recount before the next minute.

This module reconstructs the counts for any time of a session store, for training and evaluation;
``live_windows.py`` of serving keeps them for the present. Memory: 12 bytes an interaction at most.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.sessions.store import SessionStore

WINDOWS_MINUTES: Final = (5, 15, 60, 360)
FEATURES: Final = ("live_5m", "live_15m", "live_1h", "live_6h")
MINUTE_US: Final = 60_000_000
SMOOTHING: Final = 20.0
"""Interactions that belong to no item, in each window."""

_BLOCK_MINUTES: Final = 15


class LiveShares:
    """Shares of a store's interactions in the windows before any time.

    Args:
        store: the interactions, of all users; rows from ``items`` on are passed over.
        items: length of the catalogue.
    """

    def __init__(self, store: SessionStore, items: int) -> None:
        rows, times = np.asarray(store.item_rows), np.asarray(store.timestamps_us)
        kept = rows < items
        minute = times[kept] // MINUTE_US
        self._items = items
        self._minutes = _Buckets(minute, rows[kept], items)
        self._blocks = _Buckets(minute // _BLOCK_MINUTES, rows[kept], items)
        self._scratch = np.zeros((len(WINDOWS_MINUTES), items), np.float32)

    def of_catalogue(self, times_us: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the shares of all items, float32 ``[windows, n, items]``, at times int64 [n]."""
        out = np.zeros((len(WINDOWS_MINUTES), len(times_us), self._items), np.float32)
        _count(out, np.empty((1, 0), np.int64), True, True, *self._inputs(times_us))
        return out

    def of_items(
        self, times_us: NDArray[np.int64], rows: NDArray[np.integer[Any]]
    ) -> NDArray[np.float32]:
        """Return the shares of the asked items, float32 ``[windows, n, count]``.

        Args:
            times_us: int64 ``[n]``, microseconds since the epoch.
            rows: item rows, ``[n, count]``, or ``[count]`` asked at every time; negative rows get
                zeros.
        """
        shared = rows.ndim == 1
        asked = np.ascontiguousarray(rows[None] if shared else rows, np.int64)
        out = np.zeros((len(WINDOWS_MINUTES), len(times_us), asked.shape[1]), np.float32)
        _count(out, asked, shared, False, *self._inputs(times_us))
        return out

    def _inputs(self, times_us: NDArray[np.int64]) -> Any:
        minutes, blocks = self._minutes, self._blocks
        now = np.asarray(times_us) // MINUTE_US
        return (
            now,
            np.argsort(now, kind="stable"),
            np.array(WINDOWS_MINUTES),
            minutes.keys,
            minutes.offsets,
            minutes.rows,
            minutes.counts,
            blocks.keys,
            blocks.offsets,
            blocks.rows,
            blocks.counts,
            self._scratch,
        )


def minute_counts(
    store: SessionStore, until_us: int, minutes: int = WINDOWS_MINUTES[-1]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Count the interactions of the last minutes up to a time, by minute and item.

    Args:
        store: the interactions.
        until_us: microseconds since the epoch, inclusive.
        minutes: how many, the one that ``until_us`` lies in included.

    Returns:
        Minute since the epoch int64 ``[k]``, item row int32 ``[k]`` and count int32 ``[k]``, by
        minute, then item.
    """
    rows, minute = np.asarray(store.item_rows), np.asarray(store.timestamps_us) // MINUTE_US
    last = until_us // MINUTE_US
    kept = (minute > last - minutes) & (store.timestamps_us <= until_us)
    buckets = _Buckets(minute[kept], rows[kept], int(rows.max(initial=0)) + 1)
    return np.repeat(buckets.keys, np.diff(buckets.offsets)), buckets.rows, buckets.counts


class _Buckets:
    """Counts by time bucket and item, only of buckets with any: CSR over ``keys``."""

    def __init__(self, key: NDArray[np.int64], rows: NDArray[np.int32], items: int) -> None:
        pair, counts = np.unique(key * items + rows, return_counts=True)
        bucket = pair // items
        self.keys, first = np.unique(bucket, return_index=True)
        self.offsets = np.append(first, len(pair)).astype(np.int64)
        self.rows = (pair % items).astype(np.int32)
        self.counts = counts.astype(np.int32)


@compiled
def _add(
    keys: NDArray[np.int64],
    offsets: NDArray[np.int64],
    rows: NDArray[np.int32],
    counts: NDArray[np.int32],
    low: int,
    high: int,
    out: NDArray[np.float32],
) -> None:
    """Add the buckets ``low .. high - 1`` to ``out [items]``."""
    bucket = np.searchsorted(keys, low)
    while bucket < len(keys) and keys[bucket] < high:
        for entry in range(offsets[bucket], offsets[bucket + 1]):
            out[rows[entry]] += counts[entry]
        bucket += 1


@compiled
def _count(
    out: NDArray[np.float32],
    asked: NDArray[np.int64],
    shared: bool,
    everything: bool,
    now: NDArray[np.int64],
    order: NDArray[np.int64],
    windows: NDArray[np.int64],
    minute_keys: NDArray[np.int64],
    minute_offsets: NDArray[np.int64],
    minute_rows: NDArray[np.int32],
    minute_counts: NDArray[np.int32],
    block_keys: NDArray[np.int64],
    block_offsets: NDArray[np.int64],
    block_rows: NDArray[np.int32],
    block_counts: NDArray[np.int32],
    scratch: NDArray[np.float32],
) -> None:
    counted = np.int64(-1)
    for place in range(len(order)):
        request = order[place]
        if place == 0 or now[request] != counted:
            counted = now[request]
            scratch.fill(0.0)
            for window in range(len(windows)):
                low = counted - windows[window]
                # Whole blocks inside the window are added at once, the edges minute by minute.
                first_block = -(-low // _BLOCK_MINUTES)
                last_block = counted // _BLOCK_MINUTES
                if first_block <= last_block:
                    _add(
                        minute_keys,
                        minute_offsets,
                        minute_rows,
                        minute_counts,
                        low,
                        first_block * _BLOCK_MINUTES,
                        scratch[window],
                    )
                    _add(
                        block_keys,
                        block_offsets,
                        block_rows,
                        block_counts,
                        first_block,
                        last_block,
                        scratch[window],
                    )
                    low = last_block * _BLOCK_MINUTES
                _add(
                    minute_keys,
                    minute_offsets,
                    minute_rows,
                    minute_counts,
                    low,
                    counted,
                    scratch[window],
                )
            # Loops, for numba takes seconds to compile an assignment that may broadcast.
            for window in range(len(windows)):
                total = np.float32(scratch[window].sum() + SMOOTHING)
                for item in range(scratch.shape[1]):
                    scratch[window, item] /= total
        if everything:
            for window in range(len(windows)):
                for item in range(scratch.shape[1]):
                    out[window, request, item] = scratch[window, item]
        else:
            mine = asked[0] if shared else asked[request]
            for column in range(len(mine)):
                if mine[column] >= 0:
                    for window in range(len(windows)):
                        out[window, request, column] = scratch[window, mine[column]]

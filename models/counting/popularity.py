"""Popularity: of all training, of its last hours, of the last minutes, and of the user alone.

The last two follow Ji, Sun, Zhang and Liu, "A re-visit of the popularity baseline in recommender
systems", SIGIR 2020: popularity as of the request's time is a far stronger baseline than that of
the whole training data; and Hu, He, Luo, Zhang, Xiao and Ji (TIFU-KNN, SIGIR 2020): a user's own
frequencies lead where people buy the same things again.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.sessions.store import SessionStore
from models.counting.context import context
from models.counting.ranker import CountingRanker


class Popularity(CountingRanker):
    """Scores an item by its training interactions, of all time or of the last ``window_us``.

    Args:
        store: see `CountingRanker`; not read.
        items: number of item rows.
        window_us: counts only the interactions of this long before the end of training,
            microseconds; None counts all.
        before_us: the end of training, exclusive, microseconds since the epoch (UTC); None is just
            after the last training interaction. Later ones are ignored.
        name: in every table; None for "popularity" or "recent popularity".

    Raises:
        InputError: the window is not positive.
    """

    def __init__(
        self,
        store: SessionStore,
        items: int,
        *,
        window_us: int | None = None,
        before_us: int | None = None,
        name: str | None = None,
    ) -> None:
        if window_us is not None:
            _check_window(window_us)
        usual = "popularity" if window_us is None else "recent popularity"
        super().__init__(store, items, name=name or usual)
        self._window_us, self._before_us = window_us, before_us
        self._scores = np.zeros(items, np.float32)

    def score(
        self, requests: Requests, candidates: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        """Score without a dense row per request; see `CountingRanker.score`."""
        if candidates is None:
            return np.broadcast_to(self._ranked(), (len(requests), self._items))
        scores = self._ranked()[np.maximum(candidates, 0)]
        scores[candidates < 0] = -np.inf
        return scores

    def _counted_rows(self, training: SessionStore) -> NDArray[np.int32]:
        if self._before_us is None:
            return training.item_rows
        return training.item_rows[training.timestamps_us < self._before_us]

    def _fit(self, training: SessionStore) -> None:
        if self._window_us is None:
            self._scores = self._counts.astype(np.float32)
            return
        rows, times = training.item_rows, training.timestamps_us
        end_us = int(times.max()) + 1 if self._before_us is None else self._before_us
        recent = (times >= end_us - self._window_us) & (times < end_us) & (rows < self._items)
        self._scores = np.bincount(rows[recent], minlength=self._items).astype(np.float32)

    def _evidence(self, requests: Requests) -> NDArray[np.float32]:
        return np.broadcast_to(self._scores, (len(requests), self._items))

    def _ranked(self) -> NDArray[np.float32]:
        if self._fallback is None:
            raise InputError(f"{self.name} was not fitted; call fit with the training sessions")
        return np.where(self._scores > 0, self._scores, self._fallback)


class LivePopularity(CountingRanker):
    """Scores an item by everybody's interactions in the ``window_us`` before the request.

    Counts the history store from ``time - window_us`` (inclusive) to the request's time
    (exclusive), whoever interacted and whether or not training had it: what a serving system
    knows when it is asked. Items outside the window follow by training popularity.

    Args:
        store: the whole log.
        items: number of item rows.
        window_us: microseconds, above 0.

    Raises:
        InputError: the window is not positive.
    """

    def __init__(
        self, store: SessionStore, items: int, *, window_us: int, name: str = "live popularity"
    ) -> None:
        _check_window(window_us)
        super().__init__(store, items, name=name)
        self._window_us = window_us
        known = np.flatnonzero(store.item_rows < items)
        order = known[np.argsort(store.timestamps_us[known], kind="stable")]
        self._times_us = store.timestamps_us[order]
        self._rows = store.item_rows[order]

    def _fit(self, training: SessionStore) -> None:
        """Need nothing but the popularity that the base class counts."""

    def _evidence(self, requests: Requests) -> NDArray[np.float32]:
        now_us = self._store.timestamps_us[requests.interaction]
        order = np.argsort(now_us, kind="stable")
        start = np.searchsorted(self._times_us, now_us[order] - self._window_us)
        end = np.searchsorted(self._times_us, now_us[order])
        counts = np.zeros((len(requests), self._items), np.float32)
        _count_windows(self._rows, start, end, order, counts)
        return counts


class PersonalPopularity(CountingRanker):
    """Scores an item by how often its user chose it before, the more recent one first in a tie.

    Args:
        store: the histories.
        items: number of item rows.
    """

    def __init__(
        self, store: SessionStore, items: int, *, name: str = "personal popularity"
    ) -> None:
        super().__init__(store, items, name=name)

    def _fit(self, training: SessionStore) -> None:
        """Need nothing but the popularity that the base class counts."""

    def _evidence(self, requests: Requests) -> NDArray[np.float32]:
        past = context(self._store, requests, self._items)
        owner = past.owner()
        counts = np.zeros((len(requests), self._items), np.float32)
        np.add.at(counts, (owner, past.rows), np.float32(1))
        # Below 1, so that recency never outweighs a count.
        recency = (past.length[owner] - past.age) / (past.length[owner] + 1.0)
        latest = np.zeros_like(counts)
        np.maximum.at(latest, (owner, past.rows), recency.astype(np.float32))
        return counts + latest


def _check_window(window_us: int) -> None:
    if window_us < 1:
        raise InputError(f"the popularity window is {window_us} us; expected at least 1 us")


@compiled
def _count_windows(rows: Any, start: Any, end: Any, target: Any, counts: Any) -> None:
    """Write the counts of ``rows[start[i]:end[i]]`` to ``counts[target[i]]``; windows ascend."""
    running = np.zeros(counts.shape[1], np.float32)
    low = high = 0
    for i in range(len(start)):
        if start[i] >= high:
            running[:] = 0
            low = high = start[i]
        while high < end[i]:
            running[rows[high]] += 1
            high += 1
        while low < start[i]:
            running[rows[low]] -= 1
            low += 1
        counts[target[i]] = running

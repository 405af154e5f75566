"""What all counting rankers share: the interface, and what is ranked where nothing was counted.

A ranker's evidence for an item is a number above zero; items without evidence follow those with
it, by their popularity in training, so a user without history is shown the popular items. An
optional reminder (reminder.py) is added to the evidence.

Costs a dense row of scores, 4 bytes an item, for every request in work, candidates or not; blocks
of requests keep that below 64 MB.
"""

from abc import ABC, abstractmethod
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.sessions.store import SessionStore
from models.counting.reminder import Reminder

_SCORES_PER_BLOCK: Final = 1 << 24


class CountingRanker(ABC):
    """Counts training sessions; scores by what it counted and the user's history.

    Args:
        store: the histories at request time: everything of a user before the request. Rows at or
            above ``items`` are unknown and skipped.
        items: number of item rows, at least 1.
        name: in every table.
        reminder: adds the user's own past items; None for none.

    Raises:
        InputError: ``items`` is not positive.
    """

    def __init__(
        self, store: SessionStore, items: int, *, name: str, reminder: Reminder | None = None
    ) -> None:
        if items < 1:
            raise InputError(f"{name}: items is {items}; expected a number of at least 1")
        self._store = store
        self._items = items
        self._reminder = reminder
        self._fallback: NDArray[np.float32] | None = None
        self._counts = np.zeros(items, np.int64)
        self.name = name if reminder is None else f"{name} + reminder"

    @property
    def items(self) -> int:
        """Number of item rows ranked."""
        return self._items

    @property
    def counts(self) -> NDArray[np.int64]:
        """Training interactions of each item, int64 ``[items]``; zeros before :meth:`fit`."""
        return self._counts

    def fit(self, training: SessionStore) -> Self:
        """Count ``training`` and forget what was counted before.

        Raises:
            InputError: it has no interaction with a known item.
        """
        rows = self._counted_rows(training)
        counts = np.bincount(rows[rows < self._items], minlength=self._items).astype(np.int64)
        if not counts.any():
            raise InputError(
                f"{self.name} cannot be fitted: none of the {len(rows)} training interactions has "
                f"an item row below {self._items}; give a training part with known items"
            )
        self._counts = counts
        self._fallback = (counts / (counts.max() + 1.0) - 1.0).astype(np.float32)
        self._fit(training)
        return self

    def score(
        self, requests: Requests, candidates: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        """Score the next interaction; see `hiertcn.evaluation.protocol.Ranker`.

        Args:
            requests: at most 512.
            candidates: int32 ``[batch, count]`` padded with -1, or None for all items.

        Returns:
            float32 ``[batch, count]`` or ``[batch, items]``: above 0 with evidence, in [-1, 0)
            without it, -inf for padding.

        Raises:
            InputError: the ranker was not fitted.
        """
        if candidates is None:
            return self._all_scores(requests)
        out = np.empty(candidates.shape, np.float32)
        step = max(1, _SCORES_PER_BLOCK // self._items)
        for start in range(0, len(requests), step):
            block = slice(start, start + step)
            asked = candidates[block]
            scores = self._all_scores(requests.take(block))
            out[block] = np.take_along_axis(scores, np.maximum(asked, 0), 1)
        out[candidates < 0] = -np.inf
        return out

    def recommend(self, requests: Requests, k: int) -> NDArray[np.int32]:
        """Return the ``k`` best item rows, best first, ties by popularity, then by row.

        Returns:
            int32 ``[batch, k]``, padded with -1 where there are fewer items.

        Raises:
            InputError: ``k`` is not positive, or the ranker was not fitted.
        """
        out = np.empty((len(requests), k), np.int32)
        step = max(1, _SCORES_PER_BLOCK // self._items)
        for start in range(0, max(len(requests), 1), step):
            block = slice(start, start + step)
            out[block] = best_rows(self._all_scores(requests.take(block)), self._counts, k)
        return out

    def _counted_rows(self, training: SessionStore) -> NDArray[np.int32]:
        """Return the item rows whose number is their popularity."""
        return training.item_rows

    @abstractmethod
    def _fit(self, training: SessionStore) -> None:
        """Count what :meth:`_evidence` needs."""

    @abstractmethod
    def _evidence(self, requests: Requests) -> NDArray[np.float32]:
        """Return float32 ``[batch, items]``: 0 where nothing speaks for an item, else above it."""

    def _all_scores(self, requests: Requests) -> NDArray[np.float32]:
        if self._fallback is None:
            raise InputError(f"{self.name} was not fitted; call fit with the training sessions")
        evidence = self._evidence(requests)
        if self._reminder is not None:
            evidence = self._reminder.mix(evidence, self._store, requests)
        return np.where(evidence > 0, evidence, self._fallback)


def best_rows(
    scores: NDArray[np.float32], popularity: NDArray[np.int64] | NDArray[np.float32], k: int
) -> NDArray[np.int32]:
    """Return the columns of the ``k`` largest scores: int32 ``[n, k]``, padded with -1.

    Args:
        scores: float32 ``[n, items]``.
        popularity: ``[items]``; the larger one wins a tie of scores, then the lower column.
        k: at least 1.

    Raises:
        InputError: ``k`` is not positive.
    """
    if k < 1:
        raise InputError(f"the number of recommendations is {k}; expected at least 1")
    popular_first = np.argsort(-popularity, kind="stable")
    order = np.argsort(-scores[:, popular_first], axis=1, kind="stable")[:, :k]
    found = np.full((len(scores), k), -1, np.int32)
    found[:, : order.shape[1]] = popular_first[order]
    return found

"""The rankers by past embeddings that HierTCN is measured against (HierTCN section 4.2.3).

The moving average (MV) scores an item by the dot product with the mean embedding of the user's
last ``window`` items, MaxItem by its largest dot product with any of them. Both read the item table
without its last coordinate, which is a popularity prior and not part of the embedding; a user
without history gives them nothing to go by, and they rank by that prior. Both keep the table as
float32 in memory; MaxItem costs ``window`` times MV. Rankers that count are in models/counting.
"""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.items.table import ItemTable
from hiertcn.sessions.store import SessionStore, ranges
from models.counting.ranker import best_rows


class MV:
    """Moving average: the dot product with the mean of the user's last ``window`` embeddings.

    Args:
        store: the histories.
        table: the embeddings; the last coordinate is left out.
        window: size of the pool of past items, P_t in the paper.

    Raises:
        InputError: the window is not positive, or the table has no coordinate beside the prior.
    """

    name = "MV"

    def __init__(self, store: SessionStore, table: ItemTable, *, window: int = 20) -> None:
        self._pools = _PastItems(store, table, window)

    @property
    def items(self) -> int:
        """Number of item rows the table has."""
        return self._pools.items

    def fit(self, training: SessionStore) -> Self:
        """Learn nothing: the item table says it all. For the interface of `CountingRanker`."""
        return self

    def recommend(self, requests: Requests, k: int) -> NDArray[np.int32]:
        """Return the ``k`` best item rows, int32 ``[batch, k]``, ties by the popularity prior.

        Raises:
            InputError: ``k`` is not positive.
        """
        return best_rows(self.score(requests, None), self._pools.prior, k)

    def score(
        self, requests: Requests, candidates: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        """Score candidates ``[batch, count]`` (padded with -1), or all items ``[batch, items]``."""
        vectors, owner = self._pools.of(requests)
        means = np.zeros((len(requests), vectors.shape[1]), np.float32)
        np.add.at(means, owner, vectors)
        counts = np.bincount(owner, minlength=len(requests))
        means /= np.maximum(counts, 1)[:, None]
        if candidates is None:
            scores = means @ self._pools.catalogue.T
        else:
            scores = np.einsum("bcd,bd->bc", self._pools.embeddings(candidates), means)
        return self._pools.finish(scores, counts, candidates)


class MaxItem:
    """The largest dot product with any of the user's last ``window`` embeddings.

    Arguments and errors are those of :class:`MV`.
    """

    name = "MaxItem"

    def __init__(self, store: SessionStore, table: ItemTable, *, window: int = 20) -> None:
        self._pools = _PastItems(store, table, window)

    @property
    def items(self) -> int:
        """Number of item rows the table has."""
        return self._pools.items

    def fit(self, training: SessionStore) -> Self:
        """Learn nothing: the item table says it all. For the interface of `CountingRanker`."""
        return self

    def recommend(self, requests: Requests, k: int) -> NDArray[np.int32]:
        """Return the ``k`` best item rows, int32 ``[batch, k]``, ties by the popularity prior.

        Raises:
            InputError: ``k`` is not positive.
        """
        return best_rows(self.score(requests, None), self._pools.prior, k)

    def score(
        self, requests: Requests, candidates: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        """Score candidates ``[batch, count]`` (padded with -1), or all items ``[batch, items]``."""
        vectors, owner = self._pools.of(requests)
        counts = np.bincount(owner, minlength=len(requests))
        width = self.items if candidates is None else candidates.shape[1]
        scores = np.zeros((len(requests), width), np.float32)
        ends = np.cumsum(counts)
        for request in np.flatnonzero(counts):
            pool = vectors[ends[request] - counts[request] : ends[request]]
            asked = (
                self._pools.catalogue
                if candidates is None
                else self._pools.embeddings(candidates[request])
            )
            scores[request] = (pool @ asked.T).max(axis=0)
        return self._pools.finish(scores, counts, candidates)


class _PastItems:
    """The last ``window`` items of each request's user, and the table without its prior."""

    def __init__(self, store: SessionStore, table: ItemTable, window: int) -> None:
        if window < 1:
            raise InputError(f"the window of past items is {window}; expected a number >= 1")
        if table.dim < 2:
            raise InputError(
                f"the item table {table.directory} has {table.dim} coordinate; expected an "
                "embedding and the popularity prior as the last one"
            )
        self._store, self._table, self._window = store, table, window
        vectors = table.gather(np.arange(len(table)))
        self.catalogue = np.ascontiguousarray(vectors[:, :-1])
        self.prior = np.ascontiguousarray(vectors[:, -1])

    @property
    def items(self) -> int:
        return len(self._table)

    def of(self, requests: Requests) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return past items' embeddings ``[k, dim - 1]``, oldest first, and whose each is."""
        end = requests.interaction
        start = np.maximum(requests.history_start(self._store), end - self._window)
        rows = self._store.item_rows[ranges(start, end - start)]
        owner = np.repeat(np.arange(len(requests)), end - start)
        known = rows < self.items
        return self.catalogue[rows[known]], owner[known]

    def embeddings(self, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        return self.catalogue[np.maximum(candidates, 0)]

    def finish(
        self,
        scores: NDArray[np.float32],
        counts: NDArray[np.int64],
        candidates: NDArray[np.int32] | None,
    ) -> NDArray[np.float32]:
        """Rank users without history by the prior, and padding last."""
        empty = counts == 0
        if candidates is None:
            scores[empty] = self.prior
            return scores
        scores[empty] = self.prior[np.maximum(candidates[empty], 0)]
        scores[candidates < 0] = -np.inf
        return scores

"""Negatives a target is trained against: one pool shared by a batch, and what the user was shown.

The shared pool joins some of the batch's own targets (drawn as often as items are popular) with
random items drawn from a power of the popularity mixed with uniform draws, so that every item can
be drawn. Each entry carries the logarithm of how often its item is expected in the pool, for the
logQ correction of the softmax. A catalogue no larger than the pool would be is used whole, once
each, which makes the softmax exact.

Draws depend on the generator given and nothing else, so a resumed run repeats them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.sessions.store import SessionStore


@dataclass(frozen=True)
class Pool:
    """Negatives shared by all targets of a batch.

    ``rows`` int64 ``[m]``, repeats allowed; ``log_expected`` float32 ``[m]``.
    """

    rows: NDArray[np.int64]
    log_expected: NDArray[np.float32]


class PoolSampler:
    """Draws the shared pool.

    Args:
        counts: ``[items]``, how often each item was a target in training.
        random: random items per batch.
        in_batch: at most this many of the batch's targets join the pool.
        power: random draws are half uniform, half proportional to ``counts ** power``.

    Raises:
        InputError: there is no interaction, or a size is negative.
    """

    def __init__(
        self, counts: NDArray[np.int64], *, random: int, in_batch: int, power: float = 0.75
    ) -> None:
        if len(counts) == 0 or counts.sum() == 0:
            raise InputError("no item has an interaction to train on; expected at least one")
        if min(random, in_batch) < 0:
            raise InputError(
                f"random and in-batch negatives are {random} and {in_batch}; expected whole "
                "numbers >= 0"
            )
        self.whole_catalogue = len(counts) <= random + in_batch
        self._items = len(counts)
        self._random = random
        self._in_batch = in_batch
        self._target_share = counts / counts.sum()
        weights = counts.astype(np.float64) ** power
        self._share = 0.5 / self._items + 0.5 * weights / weights.sum()
        self._cumulative = np.cumsum(self._share)
        self._all = Pool(np.arange(self._items), np.zeros(self._items, np.float32))

    def draw(self, targets: NDArray[np.int64], rng: np.random.Generator) -> Pool:
        """Return the pool for a batch with the target rows ``[n]``."""
        if self.whole_catalogue:
            return self._all
        uniform = rng.random(self._random) * self._cumulative[-1]
        rows = np.searchsorted(self._cumulative, uniform, side="right")
        rows = np.minimum(rows, self._items - 1)
        # Of the rows alone: a step must not cost as much as the catalogue is long.
        if not self._in_batch:
            return Pool(rows, np.log(self._random * self._share[rows]).astype(np.float32))
        if len(targets) > self._in_batch:
            targets = rng.choice(targets, self._in_batch, replace=False)
        rows = np.concatenate([targets, rows])
        expected = self._random * self._share[rows] + len(targets) * self._target_share[rows]
        return Pool(rows, np.log(expected).astype(np.float32))


@dataclass(frozen=True)
class ShownItems:
    """Items shown with each interaction but not chosen, without padding.

    ``rows`` int64 ``[k]``; item ``i`` was the ``place[i]``-th one kept of interaction ``owner[i]``
    (int64 ``[k]`` each). ``interactions`` and ``width`` (the longest list) are the padded shape.
    """

    rows: NDArray[np.int64]
    owner: NDArray[np.int64]
    place: NDArray[np.int64]
    interactions: int
    width: int

    def padded(self) -> NDArray[np.int64]:
        """Return the item rows, int64 ``[interactions, width]``, -1 on padding."""
        out = np.full((self.interactions, self.width), -1, np.int64)
        out[self.owner, self.place] = self.rows
        return out


def shown_negatives(
    store: SessionStore, interactions: NDArray[np.int64], most: int | None = None
) -> ShownItems:
    """Return the items shown at each interaction but the chosen one.

    Args:
        store: a store with impressions.
        interactions: int64 ``[n]``.
        most: keep the first ``most`` of longer lists; None keeps all.
    """
    rows, counts = store.impressions(interactions)
    owner = np.repeat(np.arange(len(interactions)), counts)
    kept = rows != store.item_rows[interactions][owner]
    rows, owner = rows[kept], owner[kept]
    counts = np.bincount(owner, minlength=len(interactions))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(counts.max(initial=0))
    if most is not None and width > most:
        fits = place < most
        rows, owner, place, width = rows[fits], owner[fits], place[fits], most
    return ShownItems(rows.astype(np.int64), owner, place, len(interactions), width)

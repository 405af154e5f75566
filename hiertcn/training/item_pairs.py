"""Pairs the item encoder learns from: held-out edges, positive pairs, negatives.

All draws come from generators made of (seed, epoch), so a resumed run sees what an unbroken one
would have seen.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiertcn.graph.csr import CSR
from hiertcn.training.item_hard_negatives import RANKS, HardNegatives


@dataclass(frozen=True, eq=False)
class HeldOutEdges:
    """Edges set aside to measure by, absent from the graph that is trained on.

    Attributes:
        training: the graph without them, in either direction.
        queries, answers: int64 [edges], item rows.
    """

    training: CSR
    queries: NDArray[np.int64]
    answers: NDArray[np.int64]


def hold_out_edges(csr: CSR, *, share: float, most: int, seed: int) -> HeldOutEdges:
    """Set a share of the item pairs aside, at most ``most`` of them, drawn by weight.

    By weight, so that what is asked for is what users do again rather than chance meetings. Only
    pairs of which both items have other neighbors are chosen, so that what is measured is the
    encoder and not a lack of data. Each pair is asked in one direction, drawn by the seed.
    """
    sources = np.repeat(np.arange(csr.items), csr.degrees)
    low = np.minimum(sources, csr.indices)
    high = np.maximum(sources, csr.indices)
    keys = low.astype(np.int64) * csr.items + high
    degrees = csr.degrees
    stands = (degrees[low] > 1) & (degrees[high] > 1)
    eligible, first = np.unique(keys[stands], return_index=True)
    rng = np.random.default_rng([seed, 0])
    wanted = min(int(len(eligible) * share), most)
    # Exponential clocks: the first to ring are a draw by weight without replacement.
    clocks = rng.exponential(size=len(eligible)) / csr.weights[stands][first]
    held = eligible[np.sort(np.argsort(clocks, kind="stable")[:wanted])]
    stays = ~np.isin(keys, held)
    counts = np.bincount(sources[stays], minlength=csr.items)
    training = CSR(
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        indices=csr.indices[stays],
        weights=csr.weights[stays],
    )
    ends = np.stack([held // max(csr.items, 1), held % max(csr.items, 1)])
    flip = rng.integers(0, 2, wanted)
    columns = np.arange(wanted)
    return HeldOutEdges(training, ends[flip, columns], ends[1 - flip, columns])


@dataclass(frozen=True, eq=False)
class PairBatch:
    """One step's item rows.

    Attributes:
        queries, positives: int64 [batch].
        shared: int64 [negatives], uniform items every query is compared with.
        hard: int64 [batch, hard], items that resemble their query, see ``item_hard_negatives``.
    """

    queries: NDArray[np.int64]
    positives: NDArray[np.int64]
    shared: NDArray[np.int64]
    hard: NDArray[np.int64]


class PairSampler:
    """Draws pairs in proportion to a power of the edges' weights."""

    def __init__(
        self,
        csr: CSR,
        *,
        weight_power: float,
        hard_ranks: tuple[int, int] = RANKS,
        seed: int = 0,
    ) -> None:
        self._csr = csr
        self._hard = HardNegatives(csr, ranks=hard_ranks, seed=seed)
        self._sources = np.repeat(np.arange(csr.items), csr.degrees)
        mass = np.asarray(csr.weights, np.float64) ** weight_power
        self._cumulative = np.cumsum(mass)
        shares = np.bincount(csr.indices, weights=mass, minlength=csr.items)
        self.positive_shares: NDArray[np.float64] = shares / max(float(shares.sum()), 1e-300)
        """Probability that a drawn pair's positive is this item, float64 [items]."""

    def draw(self, rng: np.random.Generator, batch: int, shared: int, hard: int) -> PairBatch:
        """Draw one step's pairs and negatives."""
        points = rng.random(batch) * self._cumulative[-1]
        edges = np.minimum(np.searchsorted(self._cumulative, points), len(self._cumulative) - 1)
        queries = self._sources[edges]
        drawn = rng.integers(0, self._csr.items, shared)
        none = np.empty((batch, 0), np.int64)
        return PairBatch(
            queries=queries,
            positives=self._csr.indices[edges].astype(np.int64),
            shared=drawn,
            hard=self._hard.draw(rng, queries, hard) if hard else none,
        )

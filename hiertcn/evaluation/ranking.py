"""The rank of every request's target under every ranker, and the best candidates of a few.

Requests go to the rankers in slices of at most 512 and at most about 16 M scores (64 MB), so memory
does not grow with the number of requests. The cost beside the rankers' own: one comparison per
score, 0.1 s for 20,000 requests against 4,000 items.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.evaluation.metrics import target_ranks
from hiertcn.evaluation.pools import (
    CandidateSource,
    Pools,
    impression_counts,
    impression_pools,
    sample_size,
    sampled_pools,
    slices_within,
    uses_impressions,
)
from hiertcn.evaluation.protocol import Ranker, Requests, SessionColumns

Ties = Literal["last", "popularity"]
Mask = Literal["none", "last-item", "session"]

TIES: Final = ("last", "popularity")
MASKS: Final = ("none", "last-item", "session")

_CATALOGUE_SCORES = 1 << 24
# Rankers gather one vector per candidate: 512 x 512 x 128 float32 are 128 MB.
_POOL_SCORES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class RankingRules:
    """Against which candidates, and how, a target is ranked.

    Attributes:
        candidates: the pool of a request, see `pools.CandidateSource`.
        ties: ``last`` ranks a target behind all others of equal score; ``popularity`` behind those
            of equal score that are at least as popular.
        mask: items that are ranked last for every ranker: ``none``, the ``last-item`` seen in the
            running session, or all items of the running ``session``. A target that the mask hits
            is last of its pool.
        popularity: int64 [items], for ``ties="popularity"``.
        seed: seed of the random sample of candidates.

    Raises:
        InputError: a rule is unknown, or ties are broken by a popularity that is not given.
    """

    candidates: CandidateSource = "auto"
    ties: Ties = "last"
    mask: Mask = "none"
    popularity: NDArray[np.int64] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ties not in TIES:
            raise InputError(f"ties is {self.ties!r}; expected one of {', '.join(TIES)}")
        if self.mask not in MASKS:
            raise InputError(f"mask is {self.mask!r}; expected one of {', '.join(MASKS)}")
        if self.ties == "popularity" and self.popularity is None:
            raise InputError(
                "ties is 'popularity' but popularity is None; expected the interactions of each "
                "item, int64 [items]"
            )


class Ranking:
    """The ranks of all targets under some rankers.

    Args:
        rankers: asked about the same candidates.
        store: what the requests point into.
        requests: what to rank.
        items: size of the catalogue.
        rules: see `RankingRules`.

    Attributes:
        ranks: int64 [rankers, n], from 1, once `rank_all` has run.
        pool_size: int64 [n], candidates of each request with its target.
        from_impressions: bool [n], which pools are what was shown.
        targets_added: how many of those were shown without their target.
        nan_scores: NaN scores of each ranker's candidates.
        seconds: spent in each ranker's `Ranker.score`.

    Raises:
        InputError: the candidates cannot be had for these requests, or the popularity has another
            length than the catalogue.
    """

    def __init__(
        self,
        rankers: Sequence[Ranker],
        store: SessionColumns,
        requests: Requests,
        items: int,
        rules: RankingRules,
    ) -> None:
        self._rankers, self._store, self._requests = rankers, store, requests
        self._items, self._rules = items, rules
        self._sample = sample_size(rules.candidates)
        self._popularity = rules.popularity if rules.ties == "popularity" else None
        if self._popularity is not None and len(self._popularity) != items:
            raise InputError(
                f"popularity has {len(self._popularity)} entries; expected one for each of the "
                f"{items} items"
            )
        self.from_impressions = uses_impressions(store, requests, rules.candidates)
        self.ranks = np.zeros((len(rankers), len(requests)), dtype=np.int64)
        self.pool_size = np.zeros(len(requests), dtype=np.int64)
        self.targets_added = 0
        self.nan_scores = [0] * len(rankers)
        self.seconds = [0.0] * len(rankers)

    def rank_all(self) -> None:
        """Fill the attributes.

        Raises:
            ValueError: a ranker returned scores of another shape than asked for.
        """
        total = len(self._requests) * len(self._rankers)
        with tqdm(total=total, desc="evaluate", unit="request", mininterval=2) as progress:
            for chosen, budget, width, pools_of in self._kinds():
                for part in slices_within(width, budget):
                    self._rank(chosen[part], pools_of, progress)

    def top(self, chosen: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Return the best candidates of a few requests.

        Equal scores are in the order of the item rows. Masked items and those without a score are
        left out.

        Args:
            chosen: int64 [n], which requests, at most `MAX_REQUESTS_PER_CALL`.
            count: how many items.

        Returns:
            int64 [rankers, n, count] item rows, best first, -1 where there is no further one.
        """
        found = np.full((len(self._rankers), len(chosen), count), -1, dtype=np.int64)
        place = np.arange(len(chosen))
        for kind, _, _, pools_of in self._kinds():
            at = place[np.isin(chosen, kind)]
            if len(at) == 0:
                continue
            requests = self._requests.take(chosen[at])
            pools = pools_of(requests)
            for index in range(len(self._rankers)):
                scores, candidates = self._scores(index, requests, pools)
                order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
                rows = order if candidates is None else np.take_along_axis(candidates, order, 1)
                scored = np.take_along_axis(scores, order, 1) > -np.inf
                found[index, at, : order.shape[1]] = np.where(scored, rows, -1)
        return found

    def _kinds(
        self,
    ) -> list[tuple[NDArray[np.int64], int, NDArray[np.int64], Callable[[Requests], Pools | None]]]:
        """Return, for each kind of pool, its requests, a slice's scores, widths and the pools."""
        shown = np.flatnonzero(self.from_impressions)
        others = np.flatnonzero(~self.from_impressions)
        width = impression_counts(self._store, self._requests.take(shown)) + 1
        size = self._items if self._sample is None else self._sample + 1
        return [
            (shown, _POOL_SCORES, width, lambda asked: impression_pools(self._store, asked)),
            (
                others,
                _CATALOGUE_SCORES if self._sample is None else _POOL_SCORES,
                np.full(len(others), size, dtype=np.int64),
                self._pools_elsewhere,
            ),
        ]

    def _pools_elsewhere(self, requests: Requests) -> Pools | None:
        """Return the sampled candidates, or None for the whole catalogue."""
        if self._sample is None:
            return None
        return sampled_pools(requests, self._items, self._sample, self._rules.seed)

    def _rank(
        self,
        chosen: NDArray[np.int64],
        pools_of: Callable[[Requests], Pools | None],
        progress: "tqdm[None]",
    ) -> None:
        requests = self._requests.take(chosen)
        pools = pools_of(requests)
        if pools is None:
            self.pool_size[chosen] = self._items
            column = requests.target_row.astype(np.int64)
        else:
            self.pool_size[chosen] = pools.size
            self.targets_added += int(np.count_nonzero(pools.target_added))
            column = pools.target_column
        for index, ranker in enumerate(self._rankers):
            scores, candidates = self._scores(index, requests, pools, count_nan=True)
            popularity = self._popularity
            if popularity is not None:
                popularity = (
                    popularity[: scores.shape[1]]
                    if candidates is None
                    else popularity[np.maximum(candidates, 0)]
                )
            self.ranks[index, chosen] = target_ranks(
                scores,
                np.where(requests.target_row < ranker.items, column, -1),
                self.pool_size[chosen],
                candidates,
                popularity,
            )
            progress.update(len(requests))

    def _scores(
        self, index: int, requests: Requests, pools: Pools | None, *, count_nan: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int32] | None]:
        """Return one ranker's scores [batch, count] with the mask at -inf, and the candidates."""
        ranker = self._rankers[index]
        if pools is None:
            candidates = None
            # A ranker newer than the catalogue must not be helped or hurt by rows outside it.
            scores = self._ask(index, requests, None)[:, : self._items]
            valid: NDArray[np.bool_] | bool = True
        else:
            # An older release has no vector for newer rows: it must not be asked for them.
            candidates = np.where(pools.candidates < ranker.items, pools.candidates, np.int32(-1))
            scores = self._ask(index, requests, candidates)
            valid = candidates >= 0
        if count_nan:
            self.nan_scores[index] += int(np.count_nonzero(np.isnan(scores) & valid))
        if self._rules.mask != "none":
            scores = np.array(scores)
            owner, rows = _masked(self._store, requests, self._rules.mask)
            if candidates is None:
                inside = rows < scores.shape[1]
                scores[owner[inside], rows[inside]] = -np.inf
            else:
                cells = (np.arange(len(requests))[:, None] << 32) | candidates
                scores[np.isin(cells, (owner << 32) | rows)] = -np.inf
        if not count_nan:
            scores = np.where(np.isnan(scores) | ~np.asarray(valid), np.float32(-np.inf), scores)
        return scores, candidates

    def _ask(
        self, index: int, requests: Requests, candidates: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        ranker = self._rankers[index]
        begin = time.perf_counter()
        scores = np.asarray(ranker.score(requests, candidates))
        self.seconds[index] += time.perf_counter() - begin
        expected = (len(requests), ranker.items) if candidates is None else candidates.shape
        if scores.shape != expected:
            raise ValueError(
                f"ranker {ranker.name!r} returned scores of shape {scores.shape}, expected "
                f"{expected}"
            )
        return scores


def _masked(
    store: SessionColumns, requests: Requests, mask: Mask
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the masked items: the request in the slice and the item row of each, int64 [k]."""
    count = requests.position if mask == "session" else np.minimum(requests.position, 1)
    owner = np.repeat(np.arange(len(requests), dtype=np.int64), count)
    last = np.repeat(np.cumsum(count), count)
    # The k-th of a request's masked items from the end stands k places before its interaction.
    back = last - np.arange(len(owner))
    rows = store.item_rows[requests.interaction[owner] - back].astype(np.int64)
    return owner, rows

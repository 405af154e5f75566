"""Rank the target of every request with every ranker, and average.

Requests go to the rankers in slices of at most 512 and at most about 16 M scores (64 MB), so memory
does not grow with the number of requests. The cost beside the rankers' own: one comparison per
score, 0.1 s for 20,000 requests against 4,000 items.

Does not choose the requests (protocol.py), and does not judge the result (gate.py, report.py).
"""

import logging
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.evaluation.metrics import Metrics, mrr_intervals, summarize, target_ranks
from hiertcn.evaluation.oracle import OracleRanks
from hiertcn.evaluation.pools import (
    CandidateSource,
    impression_counts,
    impression_pools,
    slices_within,
    uses_impressions,
)
from hiertcn.evaluation.protocol import Ranker, Requests, SessionColumns
from hiertcn.evaluation.results import (
    GROUPS,
    LAST_POSITION,
    EvaluationResult,
    OracleResult,
    PositionMetric,
    RankerResult,
)

_CATALOGUE_SCORES = 1 << 24
# Rankers gather one vector per candidate: 512 x 512 x 128 float32 are 128 MB.
_IMPRESSION_SCORES = 1 << 18

_log = logging.getLogger(__name__)


def evaluate(
    rankers: Sequence[Ranker],
    store: SessionColumns,
    requests: Requests,
    *,
    items: int,
    candidates: CandidateSource = "auto",
    oracle: OracleRanks | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> EvaluationResult:
    """Evaluate rankers on the same requests and candidates (section 4.2.2).

    A ranker with a shorter item table than the catalogue (an older release) is not asked about the
    rows it does not know: they rank below all that it knows, so such a target ranks last.

    Args:
        rankers: the rankers; their names must differ.
        store: the session store that the requests point into.
        requests: what to predict, from `build_requests`.
        items: size of the catalogue: item rows ``0 .. items - 1``.
        candidates: ``auto`` ranks against the step's impressions where they are known and against
            the catalogue elsewhere; ``impressions`` and ``catalogue`` insist on one of them.
        oracle: the simulator's ranks of the same requests, from `join_oracle`.
        resamples: bootstrap samples for the intervals of MRR; 0 for no intervals.
        seed: seed of the bootstrap.

    Returns:
        The result; its metrics are NaN if there are no requests.

    Raises:
        InputError: no ranker, two rankers of one name, a target outside the catalogue, or
            impressions demanded where there are none.
        ValueError: a ranker returned scores of another shape than asked for.
    """
    _check(rankers, requests, items)
    from_impressions = uses_impressions(store, requests, candidates)
    scoring = _Scoring(rankers, store, requests, items)
    progress = tqdm(
        total=len(requests) * len(rankers), desc="evaluate", unit="request", mininterval=2
    )
    with progress:
        scoring.rank_against_impressions(np.flatnonzero(from_impressions), progress)
        scoring.rank_against_catalogue(np.flatnonzero(~from_impressions), progress)

    groups = _group_metrics(scoring.ranks, scoring.pool_size, requests, resamples, seed)
    results = tuple(
        RankerResult(
            name=ranker.name,
            groups=groups[index],
            by_position=_by_position(scoring.ranks[index], requests),
            known_items=min(ranker.items, items),
            unknown_targets=int(np.count_nonzero(requests.target_row >= ranker.items)),
            nan_scores=scoring.nan_scores[index],
            seconds=round(scoring.seconds[index], 3),
        )
        for index, ranker in enumerate(rankers)
    )
    for result in results:
        if result.nan_scores:
            _log.warning("%s gave %d NaN scores; they rank last", result.name, result.nan_scores)
    times = np.asarray(store.timestamps_us[requests.interaction])
    return EvaluationResult(
        requests=len(requests),
        users=len(np.unique(requests.user)),
        items=items,
        impression_pools=int(from_impressions.sum()),
        catalogue_pools=int((~from_impressions).sum()),
        single_candidate_pools=int(np.count_nonzero(scoring.pool_size == 1)),
        mean_pool_size=float(scoring.pool_size.mean()) if len(requests) else float("nan"),
        first_us=int(times.min()) if len(requests) else None,
        last_us=int(times.max()) if len(requests) else None,
        rankers=results,
        oracle=_compare(oracle, scoring, requests, [ranker.name for ranker in rankers], seed)
        if oracle is not None and len(requests)
        else None,
    )


class _Scoring:
    """The ranks found so far, one row for each ranker."""

    def __init__(
        self, rankers: Sequence[Ranker], store: SessionColumns, requests: Requests, items: int
    ) -> None:
        self._rankers = rankers
        self._store = store
        self._requests = requests
        self._items = items
        self.ranks = np.zeros((len(rankers), len(requests)), dtype=np.int64)
        self.pool_size = np.zeros(len(requests), dtype=np.int64)
        self.nan_scores = [0] * len(rankers)
        self.seconds = [0.0] * len(rankers)

    def rank_against_impressions(self, chosen: NDArray[np.int64], progress: "tqdm[None]") -> None:
        """Rank the chosen requests, int64 [n], against what was shown."""
        width = impression_counts(self._store, self._requests.take(chosen)) + 1
        for part in slices_within(width, _IMPRESSION_SCORES):
            requests = self._requests.take(chosen[part])
            pools = impression_pools(self._store, requests)
            self.pool_size[chosen[part]] = pools.size
            for index, ranker in enumerate(self._rankers):
                # An older release has no vector for newer rows: it must not be asked for them.
                known = np.where(pools.candidates < ranker.items, pools.candidates, np.int32(-1))
                scores = self._score(index, requests, known)
                known_target = requests.target_row < ranker.items
                self.ranks[index, chosen[part]] = target_ranks(
                    scores, np.where(known_target, pools.target_column, -1), pools.size, known
                )
                self.nan_scores[index] += int(np.count_nonzero(np.isnan(scores) & (known >= 0)))
                progress.update(len(requests))

    def rank_against_catalogue(self, chosen: NDArray[np.int64], progress: "tqdm[None]") -> None:
        """Rank the chosen requests, int64 [n], against all items."""
        self.pool_size[chosen] = self._items
        width = np.full(len(chosen), self._items, dtype=np.int64)
        for part in slices_within(width, _CATALOGUE_SCORES):
            requests = self._requests.take(chosen[part])
            target = requests.target_row.astype(np.int64)
            for index, ranker in enumerate(self._rankers):
                # A ranker newer than the catalogue must not be helped or hurt by rows outside it.
                scores = self._score(index, requests, None)[:, : self._items]
                self.ranks[index, chosen[part]] = target_ranks(
                    scores,
                    np.where(target < ranker.items, target, -1),
                    self.pool_size[chosen[part]],
                )
                self.nan_scores[index] += int(np.count_nonzero(np.isnan(scores)))
                progress.update(len(requests))

    def _score(
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


def _check(rankers: Sequence[Ranker], requests: Requests, items: int) -> None:
    names = [ranker.name for ranker in rankers]
    if not names:
        raise InputError("no ranker to evaluate; give at least one")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"two rankers are called {repeated[0]!r}; give each its own name")
    outside = np.flatnonzero((requests.target_row < 0) | (requests.target_row >= items))
    if len(outside):
        first = int(outside[0])
        raise InputError(
            f"request {first} asks for item row {requests.target_row[first]}, which is outside the "
            f"catalogue of {items} items; evaluate with the item index that the session store was "
            "built with"
        )


def _group_masks(requests: Requests) -> dict[str, NDArray[np.bool_]]:
    first = requests.position == 0
    return dict(zip(GROUPS, (np.ones(len(requests), dtype=np.bool_), first, ~first), strict=True))


def _group_metrics(
    ranks: NDArray[np.int64],
    pool_size: NDArray[np.int64],
    requests: Requests,
    resamples: int,
    seed: int,
) -> list[dict[str, Metrics]]:
    """Return the metrics by group for each row of ``ranks``, int64 [rankers, n]."""
    metrics: list[dict[str, Metrics]] = [{} for _ in ranks]
    for group, mask in _group_masks(requests).items():
        users = requests.user[mask]
        intervals = mrr_intervals(ranks[:, mask], users, resamples, seed)
        for index, interval in enumerate(intervals):
            metrics[index][group] = summarize(ranks[index, mask], pool_size[mask], users, interval)
    return metrics


def _by_position(ranks: NDArray[np.int64], requests: Requests) -> tuple[PositionMetric, ...]:
    place = np.minimum(requests.position + 1, LAST_POSITION)
    count = np.bincount(place, minlength=LAST_POSITION + 1)
    total = np.bincount(place, weights=1.0 / ranks, minlength=LAST_POSITION + 1)
    return tuple(
        PositionMetric(position=int(at), requests=int(count[at]), mrr=float(total[at] / count[at]))
        for at in np.flatnonzero(count)
    )


def _compare(
    oracle: OracleRanks,
    scoring: _Scoring,
    requests: Requests,
    names: Sequence[str],
    seed: int,
) -> OracleResult | None:
    found = np.flatnonzero(oracle.rank > 0)
    if len(found) == 0:
        _log.warning("the oracle knows none of the %d requests; it is left out", len(requests))
        return None
    ranks = oracle.rank.astype(np.int64)
    shown = oracle.candidates.astype(np.int64)
    metrics = _group_metrics(
        ranks[None, found], shown[found], requests.take(found), resamples=1000, seed=seed
    )
    compared = found[shown[found] == scoring.pool_size[found]]
    reciprocal = 1.0 / scoring.ranks[:, compared]
    return OracleResult(
        metrics=metrics[0],
        compared_requests=len(compared),
        compared_mrr=float(np.mean(1.0 / ranks[compared])) if len(compared) else float("nan"),
        ranker_mrr=dict(zip(names, reciprocal.mean(axis=1).tolist(), strict=True))
        if len(compared)
        else {},
    )

"""Rank the target of every request with every ranker, and average.

The ranking (ranking.py) is what takes time; intervals, breakdowns and examples are passes over the
ranks. Does not choose the requests (protocol.py), and does not judge the result (gate.py,
report.py).
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.bootstrap import Intervals, metric_intervals
from hiertcn.evaluation.breakdowns import break_down
from hiertcn.evaluation.examples import ExampleOptions, make_examples
from hiertcn.evaluation.metrics import Metrics, summarize
from hiertcn.evaluation.oracle import OracleRanks
from hiertcn.evaluation.pools import CandidateSource, sample_size
from hiertcn.evaluation.protocol import Ranker, Requests, SessionColumns
from hiertcn.evaluation.ranking import Mask, Ranking, RankingRules, Ties
from hiertcn.evaluation.results import (
    GROUPS,
    LAST_POSITION,
    EvaluationResult,
    OracleResult,
    PositionMetric,
    RankerResult,
)

_log = logging.getLogger(__name__)


def evaluate(
    rankers: Sequence[Ranker],
    store: SessionColumns,
    requests: Requests,
    *,
    items: int,
    candidates: CandidateSource = "auto",
    ties: Ties = "last",
    mask: Mask = "none",
    popularity: NDArray[np.int64] | None = None,
    oracle: OracleRanks | None = None,
    examples: ExampleOptions | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> EvaluationResult:
    """Evaluate rankers on the same requests and candidates (section 4.2.2).

    A ranker with a shorter item table than the catalogue (an older release) is not asked about the
    rows it does not know: they rank below all that it knows, so such a target ranks last.

    Args:
        rankers: the rankers; their names must differ. Paired differences are to the first.
        store: the session store that the requests point into.
        requests: what to predict, from `build_requests`.
        items: size of the catalogue: item rows ``0 .. items - 1``.
        candidates: ``auto`` ranks against the step's impressions where they are known and against
            the catalogue elsewhere; ``impressions`` and ``catalogue`` insist on one of them;
            ``sample:N`` ranks against N random items and the target.
        ties: ``last`` ranks a target behind all others of equal score, ``popularity`` behind those
            of equal score that are at least as popular.
        mask: rank ``none``, the ``last-item`` seen in the running session, or all items of the
            running ``session`` last, for every ranker; a target among them is last of its pool.
        popularity: int64 [items], needed for ``ties="popularity"``.
        oracle: the simulator's ranks of the same requests, from `join_oracle`.
        examples: users to show with their recommendations; None shows none.
        resamples: bootstrap samples for the intervals; 0 for no intervals.
        seed: seed of sampled candidates, of the bootstrap and of the examples.

    Returns:
        The result; its metrics are NaN if there are no requests.

    Raises:
        InputError: no ranker, two rankers of one name, a target outside the catalogue, an unknown
            rule, impressions demanded where there are none, or a sample larger than the catalogue.
        ValueError: a ranker returned scores of another shape than asked for.
    """
    _check(rankers, requests, items)
    rules = RankingRules(
        candidates=candidates, ties=ties, mask=mask, popularity=popularity, seed=seed
    )
    ranking = Ranking(rankers, store, requests, items, rules)
    ranking.rank_all()

    names = [ranker.name for ranker in rankers]
    groups, intervals = _group_metrics(ranking.ranks, ranking.pool_size, requests, resamples, seed)
    results = tuple(
        RankerResult(
            name=ranker.name,
            groups=groups[index],
            by_position=_by_position(ranking.ranks[index], requests),
            known_items=min(ranker.items, items),
            unknown_targets=int(np.count_nonzero(requests.target_row >= ranker.items)),
            nan_scores=ranking.nan_scores[index],
            seconds=round(ranking.seconds[index], 3),
            behind_first=intervals[index].to_first if index else {},
        )
        for index, ranker in enumerate(rankers)
    )
    for result in results:
        if result.nan_scores:
            _log.warning("%s gave %d NaN scores; they rank last", result.name, result.nan_scores)
    times = np.asarray(store.timestamps_us[requests.interaction])
    sample = sample_size(candidates) or 0
    elsewhere = int((~ranking.from_impressions).sum())
    return EvaluationResult(
        requests=len(requests),
        users=len(np.unique(requests.user)),
        items=items,
        impression_pools=int(ranking.from_impressions.sum()),
        catalogue_pools=0 if sample else elsewhere,
        single_candidate_pools=int(np.count_nonzero(ranking.pool_size == 1)),
        mean_pool_size=float(ranking.pool_size.mean()) if len(requests) else float("nan"),
        first_us=int(times.min()) if len(requests) else None,
        last_us=int(times.max()) if len(requests) else None,
        rankers=results,
        oracle=_compare(oracle, ranking, requests, names, seed)
        if oracle is not None and len(requests)
        else None,
        sampled_pools=elsewhere if sample else 0,
        sample=sample,
        targets_added=ranking.targets_added,
        ties=ties,
        mask=mask,
        seed=seed,
        breakdowns=break_down(names, ranking.ranks, ranking.pool_size, store, requests),
        examples=make_examples(names, ranking, store, requests, examples, seed)
        if examples is not None
        else (),
    )


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
) -> tuple[list[dict[str, Metrics]], list[Intervals]]:
    """Return each ranker's metrics by group, and its intervals over all requests.

    ``ranks`` is int64 [rankers, n].
    """
    metrics: list[dict[str, Metrics]] = [{} for _ in ranks]
    of_all: list[Intervals] = []
    for group, mask in _group_masks(requests).items():
        users = requests.user[mask]
        intervals = metric_intervals(ranks[:, mask], pool_size[mask], users, resamples, seed)
        for index, found in enumerate(intervals):
            metrics[index][group] = summarize(
                ranks[index, mask], pool_size[mask], users, found.metrics
            )
        of_all = of_all or intervals
    return metrics, of_all


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
    ranking: Ranking,
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
    metrics, _ = _group_metrics(
        ranks[None, found], shown[found], requests.take(found), resamples=1000, seed=seed
    )
    compared = found[shown[found] == ranking.pool_size[found]]
    reciprocal = 1.0 / ranking.ranks[:, compared]
    return OracleResult(
        metrics=metrics[0],
        compared_requests=len(compared),
        compared_mrr=float(np.mean(1.0 / ranks[compared])) if len(compared) else float("nan"),
        ranker_mrr=dict(zip(names, reciprocal.mean(axis=1).tolist(), strict=True))
        if len(compared)
        else {},
    )

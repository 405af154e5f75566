"""Ranks that ties never favour, and the means over them that the paper reports (section 4.2.2).

Everything is a vectorised pass over ``[batch, count]`` scores or ``[n]`` ranks. Does not build
candidate pools (pools.py) and does not call rankers (evaluate.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError

RECALL_AT: Final = (1, 5, 10, 20)
"""The K of Recall@K."""

METRIC_NAMES: Final = (*(f"recall@{k}" for k in RECALL_AT), "mrr", "mrp")
LOWER_IS_BETTER: Final = frozenset({"mrp"})

_INTERVAL = (0.025, 0.975)
_RESAMPLES_PER_PASS_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Means over a group of requests; NaN where the group is empty.

    Attributes:
        requests: how many requests the means are over.
        users: how many users they come from.
        recall: share of requests whose target is among the first K, by K; higher is better.
        mrr: mean of 1 / rank; higher is better.
        mrp: mean of rank / pool size, the paper's mean rank percentile; lower is better.
        mrr_interval: 95% bootstrap interval of ``mrr`` over users; NaN with fewer than two users.
    """

    requests: int
    users: int
    recall: Mapping[int, float]
    mrr: float
    mrp: float
    mrr_interval: tuple[float, float] = (math.nan, math.nan)

    def value(self, metric: str) -> float:
        """Return the metric called ``recall@K``, ``mrr`` or ``mrp``.

        Raises:
            InputError: there is no metric of that name.
        """
        if metric in ("mrr", "mrp"):
            return float(getattr(self, metric))
        name, _, k = metric.partition("@")
        if name == "recall" and k.isdecimal() and int(k) in self.recall:
            return self.recall[int(k)]
        raise InputError(f"metric {metric!r} is unknown; expected one of {', '.join(METRIC_NAMES)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types; NaN becomes None."""
        return {
            "requests": self.requests,
            "users": self.users,
            **{f"recall@{k}": _or_none(share) for k, share in self.recall.items()},
            "mrr": _or_none(self.mrr),
            "mrr_interval": [_or_none(bound) for bound in self.mrr_interval],
            "mrp": _or_none(self.mrp),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Metrics":
        """Read what `to_dict` wrote."""
        low, high = values["mrr_interval"]
        return cls(
            requests=int(values["requests"]),
            users=int(values["users"]),
            recall={
                int(name.removeprefix("recall@")): _or_nan(share)
                for name, share in values.items()
                if name.startswith("recall@")
            },
            mrr=_or_nan(values["mrr"]),
            mrp=_or_nan(values["mrp"]),
            mrr_interval=(_or_nan(low), _or_nan(high)),
        )


def metric_title(metric: str) -> str:
    """Return how a metric is written in a sentence or table: ``MRR``, ``Recall@10``."""
    return metric.upper() if metric in ("mrr", "mrp") else metric.capitalize()


def target_ranks(
    scores: NDArray[np.floating[Any]],
    target_column: NDArray[np.int64],
    pool_size: NDArray[np.int64],
    candidates: NDArray[np.int32] | None = None,
) -> NDArray[np.int64]:
    """Rank each target: 1 + candidates with a larger score + other candidates with an equal one.

    A tie never helps the ranker, so one constant score for all ranks every target last. A NaN
    or -inf score is "cannot rank": such a target is last of its pool, and such a candidate never
    beats a target that has a score.

    Args:
        scores: float [batch, count].
        target_column: int64 [batch], the target's column; -1 if the ranker does not know the item.
        pool_size: int64 [batch], the number of distinct candidates with the target.
        candidates: int32 [batch, count], -1 where a column is padding; None if none is.

    Returns:
        int64 [batch], from 1 to ``pool_size``.
    """
    known = target_column >= 0
    target_score = np.full(len(scores), -np.inf, dtype=scores.dtype)
    target_score[known] = scores[known, target_column[known]]
    not_below = scores >= target_score[:, None]
    if candidates is not None:
        not_below &= candidates >= 0
    return np.where(target_score > -np.inf, np.count_nonzero(not_below, axis=1), pool_size).astype(
        np.int64
    )


def summarize(
    ranks: NDArray[np.int64],
    pool_size: NDArray[np.int64],
    users: NDArray[np.int64],
    mrr_interval: tuple[float, float] = (math.nan, math.nan),
) -> Metrics:
    """Return the metrics of one group.

    Args:
        ranks: int64 [n], from 1.
        pool_size: int64 [n].
        users: int64 [n].
        mrr_interval: what `mrr_interval` gave for the same group.
    """
    if len(ranks) == 0:
        nothing = dict.fromkeys(RECALL_AT, math.nan)
        return Metrics(requests=0, users=0, recall=nothing, mrr=math.nan, mrp=math.nan)
    return Metrics(
        requests=len(ranks),
        users=len(np.unique(users)),
        recall={k: float(np.mean(ranks <= k)) for k in RECALL_AT},
        mrr=float(np.mean(1.0 / ranks)),
        mrp=float(np.mean(ranks / pool_size)),
        mrr_interval=mrr_interval,
    )


def resampled_means(
    values: NDArray[np.float64], users: NDArray[np.int64], resamples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Return means over bootstrap samples of users, drawn with all their requests.

    Requests of one user are alike, so resampling requests would give intervals that are too
    narrow. All columns share the resamples: differences of columns are paired.

    Args:
        values: float64 [n, columns], for example one column of 1 / rank for each ranker.
        users: int64 [n].
        resamples: how many samples; the cost is ``resamples * users``, 0.1 s for 1000 of 10,000.
        seed: seed of the draw.

    Returns:
        float64 [resamples, columns].
    """
    _, owner = np.unique(users, return_inverse=True)
    count = int(owner.max()) + 1
    sums = np.column_stack(
        [np.bincount(owner, weights=column, minlength=count) for column in values.T]
    )
    sizes = np.bincount(owner, minlength=count).astype(np.float64)
    rng = np.random.default_rng(seed)
    per_pass = max(1, _RESAMPLES_PER_PASS_BYTES // (8 * count))
    means = np.empty((resamples, values.shape[1]))
    for begin in range(0, resamples, per_pass):
        stop = min(begin + per_pass, resamples)
        times_drawn = np.stack(
            [
                np.bincount(rng.integers(0, count, size=count), minlength=count)
                for _ in range(begin, stop)
            ]
        ).astype(np.float64)
        means[begin:stop] = (times_drawn @ sums) / (times_drawn @ sizes)[:, None]
    return means


def mrr_intervals(
    ranks: NDArray[np.int64], users: NDArray[np.int64], resamples: int = 1000, seed: int = 0
) -> list[tuple[float, float]]:
    """Return the 95% bootstrap interval of MRR over users for each ranker.

    Args:
        ranks: int64 [rankers, n].
        users: int64 [n].
        resamples: how many bootstrap samples; 0 for no intervals.
        seed: seed of the draw.

    Returns:
        (low, high) for each ranker; NaN without resamples or with fewer than two users.
    """
    if resamples == 0 or len(users) == 0 or (users == users[0]).all():
        return [(math.nan, math.nan)] * len(ranks)
    means = resampled_means(1.0 / ranks.T, users, resamples, seed)
    low, high = np.quantile(means, _INTERVAL, axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)

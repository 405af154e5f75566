"""Ranks that ties never favour, and the means over them that papers report (section 4.2.2).

Every request has one target, so all metrics are functions of its rank (and MRP of the size of its
pool). Everything is a vectorised pass over ``[batch, count]`` scores or ``[n]`` ranks. Does not
build candidate pools (pools.py), does not call rankers (evaluate.py), and does not resample
(bootstrap.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError

RECALL_AT: Final = (1, 5, 10, 20)
"""The K of Recall@K and NDCG@K."""
MRR_AT: Final = 20
"""The K of MRR@K."""

METRIC_NAMES: Final = (
    *(f"recall@{k}" for k in RECALL_AT),
    *(f"ndcg@{k}" for k in RECALL_AT),
    "mrr",
    f"mrr@{MRR_AT}",
    "mrp",
)
LOWER_IS_BETTER: Final = frozenset({"mrp"})

NO_INTERVAL: Final = (math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Means over a group of requests; NaN where the group is empty or was never measured.

    Attributes:
        requests: how many requests the means are over.
        users: how many users they come from.
        recall: share of requests whose target is among the first K, by K; higher is better.
        mrr: mean of 1 / rank; higher is better.
        mrp: mean of rank / pool size, the paper's mean rank percentile; lower is better.
        ndcg: mean of 1 / log2(1 + rank) where rank <= K and 0 elsewhere, by K; higher is better.
        mrr_at: mean of 1 / rank where rank <= K and 0 elsewhere, K as in `MRR_AT`.
        intervals: 95% bootstrap interval over users, by metric name.
    """

    requests: int
    users: int
    recall: Mapping[int, float]
    mrr: float
    mrp: float
    ndcg: Mapping[int, float] = field(default_factory=dict)
    mrr_at: float = math.nan
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def value(self, metric: str) -> float:
        """Return the metric of one of `METRIC_NAMES`; NaN if an older evaluation lacks it.

        Raises:
            InputError: there is no metric of that name.
        """
        if metric not in METRIC_NAMES:
            raise InputError(
                f"metric {metric!r} is unknown; expected one of {', '.join(METRIC_NAMES)}"
            )
        if metric in ("mrr", "mrp"):
            return float(getattr(self, metric))
        name, _, k = metric.partition("@")
        if name == "mrr":
            return self.mrr_at
        values = self.recall if name == "recall" else self.ndcg
        return values.get(int(k), math.nan)

    def interval(self, metric: str) -> tuple[float, float]:
        """Return the 95% bootstrap interval of a metric; NaN if there is none."""
        return self.intervals.get(metric, NO_INTERVAL)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types; NaN becomes None."""
        return {
            "requests": self.requests,
            "users": self.users,
            **{name: _or_none(self.value(name)) for name in METRIC_NAMES},
            "intervals": {
                name: [_or_none(bound) for bound in self.intervals[name]]
                for name in METRIC_NAMES
                if name in self.intervals
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Metrics":
        """Read what `to_dict` wrote, also in releases that knew fewer metrics."""
        intervals = dict(values.get("intervals", {}))
        if "mrr_interval" in values:
            # Releases before NDCG kept the interval of MRR alone, under this name.
            intervals["mrr"] = values["mrr_interval"]
        return cls(
            requests=int(values["requests"]),
            users=int(values["users"]),
            recall=_by_k("recall@", values),
            mrr=_or_nan(values["mrr"]),
            mrp=_or_nan(values["mrp"]),
            ndcg=_by_k("ndcg@", values),
            mrr_at=_or_nan(values.get(f"mrr@{MRR_AT}")),
            intervals={
                name: (_or_nan(low), _or_nan(high)) for name, (low, high) in intervals.items()
            },
        )


def metric_title(metric: str) -> str:
    """Return how a metric is written in a sentence or table: ``MRR``, ``Recall@10``."""
    return metric.capitalize() if metric.startswith("recall") else metric.upper()


def target_ranks(
    scores: NDArray[np.floating[Any]],
    target_column: NDArray[np.int64],
    pool_size: NDArray[np.int64],
    candidates: NDArray[np.int32] | None = None,
    popularity: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Rank each target: 1 + candidates with a larger score + other candidates with an equal one.

    A tie never helps the ranker, so one constant score for all ranks every target last. A NaN
    or -inf score is "cannot rank": such a target is last of its pool, and such a candidate never
    beats a target that has a score. With ``popularity``, only equal candidates that are at least as
    popular as the target count, so a ranker of few distinct scores is completed by popularity.

    Args:
        scores: float [batch, count].
        target_column: int64 [batch], the target's column; -1 if the ranker does not know the item.
        pool_size: int64 [batch], the number of distinct candidates with the target.
        candidates: int32 [batch, count], -1 where a column is padding; None if none is.
        popularity: int64 [batch, count], or [count] where all requests share their candidates.

    Returns:
        int64 [batch], from 1 to ``pool_size``.
    """
    known = target_column >= 0
    column = np.where(known, target_column, 0)[:, None]
    target_score = np.where(known, np.take_along_axis(scores, column, 1)[:, 0], -np.inf)
    if popularity is None:
        ahead = scores >= target_score[:, None]
    else:
        popularity = np.broadcast_to(popularity, scores.shape)
        ahead = (scores == target_score[:, None]) & (
            popularity >= np.take_along_axis(popularity, column, 1)
        )
        ahead |= scores > target_score[:, None]
    if candidates is not None:
        ahead &= candidates >= 0
    # The target is not below itself, which stands for the 1 that ranks begin with.
    return np.where(target_score > -np.inf, np.count_nonzero(ahead, axis=1), pool_size).astype(
        np.int64
    )


def metric_values(ranks: NDArray[np.int64], pool_size: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what each request adds to each metric, float64 [n, metrics] as in `METRIC_NAMES`.

    Args:
        ranks: int64 [n], from 1.
        pool_size: int64 [n].
    """
    reciprocal = 1.0 / ranks
    gain = 1.0 / np.log2(1.0 + ranks)
    return np.column_stack(
        [
            *(ranks <= k for k in RECALL_AT),
            *(np.where(ranks <= k, gain, 0.0) for k in RECALL_AT),
            reciprocal,
            np.where(ranks <= MRR_AT, reciprocal, 0.0),
            ranks / pool_size,
        ]
    ).astype(np.float64)


def summarize(
    ranks: NDArray[np.int64],
    pool_size: NDArray[np.int64],
    users: NDArray[np.int64],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Metrics:
    """Return the metrics of one group.

    Args:
        ranks: int64 [n], from 1.
        pool_size: int64 [n].
        users: int64 [n].
        intervals: what `bootstrap.metric_intervals` gave for the same group.
    """
    if len(ranks) == 0:
        nothing = dict.fromkeys(RECALL_AT, math.nan)
        return Metrics(
            requests=0, users=0, recall=nothing, mrr=math.nan, mrp=math.nan, ndcg=nothing
        )
    means = dict(
        zip(METRIC_NAMES, metric_values(ranks, pool_size).mean(axis=0).tolist(), strict=True)
    )
    return Metrics(
        requests=len(ranks),
        users=len(np.unique(users)),
        recall=_by_k("recall@", means),
        mrr=means["mrr"],
        mrp=means["mrp"],
        ndcg=_by_k("ndcg@", means),
        mrr_at=means[f"mrr@{MRR_AT}"],
        intervals=intervals or {},
    )


def _by_k(prefix: str, values: Mapping[str, Any]) -> dict[int, float]:
    return {
        int(name.removeprefix(prefix)): _or_nan(value)
        for name, value in values.items()
        if name.startswith(prefix)
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)

"""Bootstrap intervals over users, of metrics and of differences between rankers.

Requests of one user are alike, so resampling requests would give intervals that are too narrow:
users are drawn with replacement, each with all its requests. All rankers and metrics share the
resamples, so differences are paired. The cost is one pass over the values and
``resamples * users * columns`` multiplications.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.metrics import METRIC_NAMES, NO_INTERVAL, metric_values

_INTERVAL: Final = (0.025, 0.975)
_BYTES_PER_PASS: Final = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of a paired difference and its 95% bootstrap interval over users.

    NaN where nothing can be compared; the bounds are NaN with fewer than two users.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of 0."""
        return self.low > 0 or self.high < 0

    def to_list(self) -> list[float | None]:
        """Return mean, low and high as JSON types; NaN becomes None."""
        return [None if math.isnan(value) else value for value in (self.mean, self.low, self.high)]

    @classmethod
    def from_list(cls, values: Any) -> "Difference":
        """Read what `to_list` wrote."""
        mean, low, high = (math.nan if value is None else float(value) for value in values)
        return cls(mean=mean, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """The 95% intervals of one ranker's metrics.

    Attributes:
        metrics: of each metric, by name.
        to_first: of the first ranker's metric minus this ranker's, by name.
    """

    metrics: Mapping[str, tuple[float, float]]
    to_first: Mapping[str, Difference]


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
    if len(users) == 0:
        return np.full((resamples, values.shape[1]), math.nan)
    owner, count = _owners(users)
    return _resampled(_sums(values, owner, count), np.bincount(owner), resamples, seed)


def metric_intervals(
    ranks: NDArray[np.int64],
    pool_size: NDArray[np.int64],
    users: NDArray[np.int64],
    resamples: int = 1000,
    seed: int = 0,
) -> list[Intervals]:
    """Return the 95% intervals of every metric for each ranker.

    Args:
        ranks: int64 [rankers, n], from 1.
        pool_size: int64 [n].
        users: int64 [n].
        resamples: how many bootstrap samples; 0 for no intervals.
        seed: seed of the draw.

    Returns:
        One `Intervals` for each ranker; empty ones without resamples or with fewer than two users.
    """
    if resamples == 0 or len(users) == 0 or (users == users[0]).all():
        return [Intervals(metrics={}, to_first={}) for _ in ranks]
    owner, count = _owners(users)
    # One ranker's values at a time: a column for every metric of all of them would be large.
    sums = np.hstack([_sums(metric_values(row, pool_size), owner, count) for row in ranks])
    means = _resampled(sums, np.bincount(owner), resamples, seed)
    means = means.reshape(resamples, len(ranks), len(METRIC_NAMES))
    low, high = np.quantile(means, _INTERVAL, axis=0)
    difference = sums[:, : len(METRIC_NAMES)].sum(axis=0) - sums.sum(axis=0).reshape(len(ranks), -1)
    difference /= len(users)
    low_difference, high_difference = np.quantile(means[:, :1] - means, _INTERVAL, axis=0)
    return [
        Intervals(
            metrics={
                name: (float(low[row, at]), float(high[row, at]))
                for at, name in enumerate(METRIC_NAMES)
            },
            to_first={
                name: Difference(
                    mean=float(difference[row, at]),
                    low=float(low_difference[row, at]),
                    high=float(high_difference[row, at]),
                )
                for at, name in enumerate(METRIC_NAMES)
            },
        )
        for row in range(len(ranks))
    ]


def paired_difference(
    ranks: NDArray[np.int64],
    other_ranks: NDArray[np.int64],
    pool_size: NDArray[np.int64],
    users: NDArray[np.int64],
    metric: str = "mrr",
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Return the metric of one ranker minus that of another, over the same requests and resamples.

    The draws depend on the seed and on the users alone, so differences of several pairs with one
    seed are over the same resamples.

    Args:
        ranks: int64 [n], from 1.
        other_ranks: int64 [n], the other ranker's ranks of the same requests.
        pool_size: int64 [n].
        users: int64 [n].
        metric: one of `METRIC_NAMES`.
        resamples: how many bootstrap samples, at least 1.
        seed: seed of the draw.

    Raises:
        InputError: the metric is unknown, the arrays differ in length, or there is no resample.
    """
    if metric not in METRIC_NAMES:
        raise InputError(f"metric {metric!r} is unknown; expected one of {', '.join(METRIC_NAMES)}")
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; expected a whole number >= 1")
    lengths = {len(ranks), len(other_ranks), len(pool_size), len(users)}
    if len(lengths) > 1:
        raise InputError(
            f"{len(ranks)} ranks, {len(other_ranks)} other ranks, {len(pool_size)} pool sizes and "
            f"{len(users)} users cannot be paired; expected one of each for every request"
        )
    if len(users) == 0:
        return Difference(mean=math.nan, low=math.nan, high=math.nan)
    column = METRIC_NAMES.index(metric)
    values = (metric_values(ranks, pool_size) - metric_values(other_ranks, pool_size))[:, [column]]
    mean = float(values.mean())
    if (users == users[0]).all():
        return Difference(mean=mean, low=NO_INTERVAL[0], high=NO_INTERVAL[1])
    low, high = np.quantile(resampled_means(values, users, resamples, seed)[:, 0], _INTERVAL)
    return Difference(mean=mean, low=float(low), high=float(high))


def _owners(users: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Return which of the distinct users each request belongs to, and how many there are."""
    _, owner = np.unique(users, return_inverse=True)
    return owner, int(owner.max()) + 1


def _sums(values: NDArray[np.float64], owner: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return np.column_stack(
        [np.bincount(owner, weights=column, minlength=count) for column in values.T]
    )


def _resampled(
    sums: NDArray[np.float64], sizes: NDArray[np.int64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return the means over drawn users of their ``sums`` [users, columns]."""
    count = len(sums)
    rng = np.random.default_rng(seed)
    per_pass = max(1, _BYTES_PER_PASS // (8 * count))
    means = np.empty((resamples, sums.shape[1]))
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

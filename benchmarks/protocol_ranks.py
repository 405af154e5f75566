"""Ranks and metrics of the evaluation protocol: whole catalogue, masked items, ties by popularity.

The rank of a target is 1 + the items with a larger score + the other items with an equal score and
at least its popularity. A target outside the catalogue, or one that the mask removed, is a miss.
"""

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.protocol_data import ProtocolCase
from hiertcn.evaluation.bootstrap import resampled_means
from hiertcn.evaluation.protocol import Ranker, Requests
from hiertcn.sessions.store import ranges

Mask = Literal["last-item", "session"]

MISS: Final = np.iinfo(np.int64).max
"""The rank of a target that cannot be found: its reciprocal counts as nothing."""
GROUPS: Final = ("ALL", "FIRST", "LATER")
METRICS: Final = (
    "recall@1",
    "recall@5",
    "recall@10",
    "recall@20",
    "mrr",
    "mrr@20",
    "ndcg@10",
)

_REQUESTS_PER_CALL: Final = 256
_INTERVAL: Final = (0.025, 0.975)


def rank(
    ranker: Ranker, case: ProtocolCase, mask: Mask = "last-item", requests: Requests | None = None
) -> NDArray[np.int64]:
    """Rank every request's target among the catalogue.

    Args:
        ranker: knows the rows ``0 .. case.items - 1``.
        case: the requests and the catalogue.
        mask: ``last-item`` ranks the item just seen in the session last, ``session`` all items of
            the running session.
        requests: a part of the case's requests; None for all.

    Returns:
        int64 ``[n]``, from 1, or `MISS`.
    """
    asked = case.requests if requests is None else requests
    ranks = np.empty(len(asked), np.int64)
    progress = tqdm(total=len(asked), desc=f"{case.name} {ranker.name}", mininterval=5, leave=False)
    for start in range(0, len(asked), _REQUESTS_PER_CALL):
        part = slice(start, start + _REQUESTS_PER_CALL)
        chosen = asked.take(part)
        scores = np.array(ranker.score(chosen, None)[:, : case.items], np.float32)
        scores[np.isnan(scores)] = -np.inf
        _mask(scores, case, chosen, mask)
        ranks[part] = ranks_of(scores, chosen.target_row, case.popularity)
        progress.update(len(chosen))
    progress.close()
    return ranks


def ranks_of(
    scores: NDArray[np.float32], target: NDArray[np.int32], popularity: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rank targets int32 ``[n]`` by their scores ``[n, items]``; -inf scores are masked items."""
    known = target < scores.shape[1]
    column = np.where(known, target, 0)
    own = scores[np.arange(len(target)), column][:, None]
    popular_enough = popularity[None, :] >= popularity[column][:, None]
    # The target equals itself, which stands for the 1 that ranks begin with.
    ranks = ((scores > own) | ((scores == own) & popular_enough)).sum(1)
    return np.where(known & (own[:, 0] > -np.inf), ranks, MISS).astype(np.int64)


def values_of(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each request's contribution to the `METRICS`, float64 ``[n, metrics]``."""
    reciprocal = np.where(ranks == MISS, 0.0, 1.0 / ranks)
    return np.column_stack(
        [
            *(ranks <= k for k in (1, 5, 10, 20)),
            reciprocal,
            np.where(ranks <= 20, reciprocal, 0.0),
            np.where(ranks <= 10, 1.0 / np.log2(1.0 + np.minimum(ranks, 10)), 0.0),
        ]
    ).astype(np.float64)


def metrics(ranks: NDArray[np.int64], case: ProtocolCase) -> dict[str, dict[str, float]]:
    """Return the means of the `METRICS` by group of `GROUPS`."""
    values = values_of(ranks)
    return {
        group: dict(zip(METRICS, values[chosen].mean(0).tolist(), strict=True))
        for group, chosen in _groups(case.requests).items()
    }


def intervals(
    ranks: Mapping[str, NDArray[np.int64]], case: ProtocolCase, metric: str = "mrr"
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return 95% bootstrap intervals over users of a metric: by group, then by method.

    A key ``a - b`` besides the methods' names holds the interval of the paired difference of the
    first method and each other one, over the same resamples.
    """
    column = METRICS.index(metric)
    names = list(ranks)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for group, chosen in _groups(case.requests).items():
        values = np.column_stack([values_of(ranks[name])[chosen, column] for name in names])
        means = resampled_means(values, case.requests.user[chosen])
        found[group] = {name: _interval(means[:, at]) for at, name in enumerate(names)}
        for at, name in enumerate(names[1:], start=1):
            found[group][f"{names[0]} - {name}"] = _interval(means[:, 0] - means[:, at])
    return found


def _groups(requests: Requests) -> dict[str, NDArray[np.bool_]]:
    first = requests.position == 0
    return {"ALL": np.ones(len(requests), np.bool_), "FIRST": first, "LATER": ~first}


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, _INTERVAL)
    return float(low), float(high)


def _mask(scores: NDArray[np.float32], case: ProtocolCase, requests: Requests, mask: Mask) -> None:
    masked = requests.position if mask == "session" else np.minimum(requests.position, 1)
    rows = case.store.item_rows[ranges(requests.interaction - masked, masked)]
    owner = np.repeat(np.arange(len(requests)), masked)
    known = rows < case.items
    scores[owner[known], rows[known]] = -np.inf

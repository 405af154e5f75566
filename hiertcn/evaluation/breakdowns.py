"""Metrics by what was known before each request: the analyses of the paper's Figures 2 to 4.

Figure 2: by the length of the user's history, in interactions and in sessions. Figure 3: by the
place in the session. Figure 4: by the time since the user's previous session, and also since the
previous interaction. A request without a previous session or interaction has no such time and is
left out there. Bins are fixed, so that two days can be compared; an empty one has no value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.evaluation.metrics import METRIC_NAMES, metric_values
from hiertcn.evaluation.protocol import Requests, SessionColumns

BREAKDOWN_METRICS: Final = ("mrr", "recall@10", "mrp")
"""What is averaged in each bin; the paper's figures show MRP."""

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The metrics of all rankers by one quantity.

    Attributes:
        key: name of the quantity.
        figure: the paper's figure that it stands for.
        title: what the bins are of, with the unit.
        bins: a text for each bin, in order.
        requests: how many requests fall into each bin.
        values: by ranker, then by metric of `BREAKDOWN_METRICS`, the mean in each bin; NaN in an
            empty one.
    """

    key: str
    figure: int
    title: str
    bins: tuple[str, ...]
    requests: tuple[int, ...]
    values: Mapping[str, Mapping[str, tuple[float, ...]]]

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types; NaN becomes None."""
        return {
            "key": self.key,
            "figure": self.figure,
            "title": self.title,
            "bins": list(self.bins),
            "requests": list(self.requests),
            "values": {
                ranker: {
                    metric: [None if math.isnan(mean) else mean for mean in means]
                    for metric, means in metrics.items()
                }
                for ranker, metrics in self.values.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Breakdown":
        """Read what `to_dict` wrote."""
        return cls(
            key=values["key"],
            figure=int(values["figure"]),
            title=values["title"],
            bins=tuple(values["bins"]),
            requests=tuple(values["requests"]),
            values={
                ranker: {
                    metric: tuple(math.nan if mean is None else float(mean) for mean in means)
                    for metric, means in metrics.items()
                }
                for ranker, metrics in values["values"].items()
            },
        )


@dataclass(frozen=True)
class _Quantity:
    """A quantity with the lower limits of its bins; the last bin has no upper limit."""

    key: str
    figure: int
    title: str
    limits: tuple[int, ...]
    bins: tuple[str, ...]


_QUANTITIES: Final = (
    _Quantity(
        "history_interactions",
        2,
        "interactions of the user before",
        (0, 1, 3, 6, 11, 21, 51, 101, 201),
        ("0", "1-2", "3-5", "6-10", "11-20", "21-50", "51-100", "101-200", "201+"),
    ),
    _Quantity(
        "history_sessions",
        2,
        "sessions of the user before",
        (0, 1, 2, 3, 5, 9, 17, 33),
        ("0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33+"),
    ),
    _Quantity(
        "position",
        3,
        "place in the session",
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 31),
        ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10-15", "16-30", "31+"),
    ),
    _Quantity(
        "session_gap",
        4,
        "time since the user's previous session",
        (0, _HOUR, 6 * _HOUR, 12 * _HOUR, _DAY, 2 * _DAY, 4 * _DAY, 7 * _DAY, 14 * _DAY, 30 * _DAY),
        ("<1 h", "1 h", "6 h", "12 h", "1 d", "2 d", "4 d", "7 d", "14 d", "30 d+"),
    ),
    _Quantity(
        "interaction_gap",
        4,
        "time since the user's previous interaction",
        (0, 10, 30, _MINUTE, 5 * _MINUTE, 30 * _MINUTE, 6 * _HOUR, _DAY, 7 * _DAY, 30 * _DAY),
        ("<10 s", "10 s", "30 s", "1 min", "5 min", "30 min", "6 h", "1 d", "7 d", "30 d+"),
    ),
)


def break_down(
    names: Sequence[str],
    ranks: NDArray[np.int64],
    pool_size: NDArray[np.int64],
    store: SessionColumns,
    requests: Requests,
) -> tuple[Breakdown, ...]:
    """Return the metrics by each quantity; nothing without requests.

    Args:
        names: of the rankers.
        ranks: int64 [rankers, n], from 1.
        pool_size: int64 [n].
        store: what the requests point into.
        requests: the requests that were ranked.
    """
    if len(requests) == 0:
        return ()
    columns = [METRIC_NAMES.index(metric) for metric in BREAKDOWN_METRICS]
    values = [metric_values(row, pool_size)[:, columns] for row in ranks]
    measured = _measure(store, requests)
    found = []
    for quantity in _QUANTITIES:
        amount, defined = measured[quantity.key]
        place = np.searchsorted(quantity.limits, amount[defined], side="right") - 1
        # A log whose clock ran backwards has gaps below 0: they are as short as can be.
        place = np.maximum(place, 0)
        counts = np.bincount(place, minlength=len(quantity.bins))
        found.append(
            Breakdown(
                key=quantity.key,
                figure=quantity.figure,
                title=quantity.title,
                bins=quantity.bins,
                requests=tuple(counts.tolist()),
                values={
                    name: {
                        metric: _means(of_ranker[defined, at], place, counts)
                        for at, metric in enumerate(BREAKDOWN_METRICS)
                    }
                    for name, of_ranker in zip(names, values, strict=True)
                },
            )
        )
    return tuple(found)


def _measure(
    store: SessionColumns, requests: Requests
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return each quantity [n] and where it is defined; gaps are in seconds."""
    times = store.timestamps_us
    history = requests.interaction - requests.history_start(store)
    sessions = requests.session - np.asarray(store.user_offsets)[requests.user]
    start = requests.session_start()
    everywhere = np.ones(len(requests), dtype=np.bool_)

    def gap(later: NDArray[np.int64], defined: NDArray[np.bool_]) -> NDArray[np.float64]:
        # Without something before, the interaction is compared with itself.
        before = times[np.where(defined, later - 1, later)]
        seconds: NDArray[np.float64] = (times[later] - before).astype(np.float64) / 1e6
        return seconds

    return {
        "history_interactions": (history.astype(np.float64), everywhere),
        "history_sessions": (sessions.astype(np.float64), everywhere),
        "position": ((requests.position + 1).astype(np.float64), everywhere),
        "session_gap": (gap(start, sessions > 0), sessions > 0),
        "interaction_gap": (gap(requests.interaction, history > 0), history > 0),
    }


def _means(
    values: NDArray[np.float64], place: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[float, ...]:
    sums = np.bincount(place, weights=values, minlength=len(counts))
    return tuple(np.where(counts > 0, sums / np.maximum(counts, 1), math.nan).tolist())

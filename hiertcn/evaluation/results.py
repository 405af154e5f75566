"""What an evaluation found: plain values that JSON, the gate, KFP and the report read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from hiertcn.errors import InputError
from hiertcn.evaluation.bootstrap import Difference
from hiertcn.evaluation.breakdowns import Breakdown
from hiertcn.evaluation.examples import Example
from hiertcn.evaluation.metrics import METRIC_NAMES, Metrics

GROUPS: Final = ("ALL", "FIRST", "LATER")
"""All requests, the first interactions of their session, and the later ones."""

LAST_POSITION: Final = 10
"""The place in the session, from 1, that stands for itself and all later ones."""

ORACLE: Final = "oracle"
"""The name of the oracle's row."""


@dataclass(frozen=True, kw_only=True)
class PositionMetric:
    """MRR at one place of the session.

    Attributes:
        position: place in the session, from 1; the last one stands for itself and all later ones.
        requests: how many requests the mean is over.
        mrr: mean of 1 / rank.
    """

    position: int
    requests: int
    mrr: float


@dataclass(frozen=True, kw_only=True)
class RankerResult:
    """The metrics of one ranker.

    Attributes:
        name: the ranker's name.
        groups: metrics by group, see `GROUPS`.
        by_position: MRR by place in the session; places without requests are left out.
        known_items: item rows that the ranker knows.
        unknown_targets: requests whose target it does not know: each ranked last.
        nan_scores: scores of its candidates that were NaN: each ranked last.
        seconds: time spent in `Ranker.score`.
        behind_first: metrics of the first ranker minus this one's, over all requests, by metric
            name, with paired intervals; empty for the first ranker and without resamples.
    """

    name: str
    groups: Mapping[str, Metrics]
    by_position: tuple[PositionMetric, ...] = ()
    known_items: int = 0
    unknown_targets: int = 0
    nan_scores: int = 0
    seconds: float = 0.0
    behind_first: Mapping[str, Difference] = field(default_factory=dict)

    def value(self, metric: str, group: str = "ALL") -> float:
        """Return a metric of a group, for example ``value("recall@10", "FIRST")``.

        Raises:
            InputError: there is no such metric.
        """
        return self.groups[group].value(metric)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types; NaN becomes None."""
        return {
            "known_items": self.known_items,
            "unknown_targets": self.unknown_targets,
            "nan_scores": self.nan_scores,
            "seconds": self.seconds,
            **{group: metrics.to_dict() for group, metrics in self.groups.items()},
            "by_position": [vars(place) for place in self.by_position],
            "behind_first": {
                metric: difference.to_list() for metric, difference in self.behind_first.items()
            },
        }

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> "RankerResult":
        """Read what `to_dict` wrote."""
        return cls(
            name=name,
            groups={group: Metrics.from_dict(values[group]) for group in GROUPS},
            by_position=tuple(PositionMetric(**place) for place in values["by_position"]),
            known_items=int(values["known_items"]),
            unknown_targets=int(values["unknown_targets"]),
            nan_scores=int(values["nan_scores"]),
            seconds=float(values["seconds"]),
            behind_first={
                metric: Difference.from_list(difference)
                for metric, difference in values.get("behind_first", {}).items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class OracleResult:
    """The simulator's own ranking: how far a model is from the best possible.

    The oracle ranked everything that was shown; a ranker may have had fewer candidates, because
    filters removed rare items. Only requests with as many candidates on both sides are compared.

    Attributes:
        metrics: the oracle's metrics by group, over the requests that the oracle file knows.
        compared_requests: requests whose pool is as large as the oracle's.
        compared_mrr: the oracle's MRR over those.
        ranker_mrr: each ranker's MRR over those.
    """

    metrics: Mapping[str, Metrics]
    compared_requests: int
    compared_mrr: float
    ranker_mrr: Mapping[str, float]

    def share(self, ranker: str) -> float:
        """Return the ranker's MRR as a share of the oracle's; NaN if nothing can be compared."""
        if self.compared_requests == 0 or ranker not in self.ranker_mrr:
            return math.nan
        return self.ranker_mrr[ranker] / self.compared_mrr

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types; NaN becomes None."""
        nothing = self.compared_requests == 0
        return {
            **{group: metrics.to_dict() for group, metrics in self.metrics.items()},
            "compared_requests": self.compared_requests,
            "compared_mrr": None if nothing else self.compared_mrr,
            "ranker_mrr": {} if nothing else dict(self.ranker_mrr),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OracleResult":
        """Read what `to_dict` wrote."""
        mrr = values["compared_mrr"]
        return cls(
            metrics={group: Metrics.from_dict(values[group]) for group in GROUPS},
            compared_requests=int(values["compared_requests"]),
            compared_mrr=math.nan if mrr is None else float(mrr),
            ranker_mrr=dict(values["ranker_mrr"]),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """All rankers on the same requests.

    Attributes:
        requests: how many interactions were predicted.
        users: how many users they come from.
        items: size of the catalogue, in items.
        impression_pools: requests ranked against what was shown.
        catalogue_pools: requests ranked against the whole catalogue.
        single_candidate_pools: requests whose only candidate is the target: rank 1 for everyone.
        mean_pool_size: mean number of candidates; NaN without requests.
        first_us: time of the earliest predicted interaction, microseconds; None without requests.
        last_us: time of the latest one.
        rankers: one result for each ranker, in the order they were given.
        oracle: the simulator's own ranking, if there is one.
        sampled_pools: requests ranked against a random sample of the catalogue.
        sample: how many items were drawn beside the target; 0 if none were.
        targets_added: requests whose target was not among what was shown, and was added to it.
        ties: see `ranking.RankingRules`.
        mask: see `ranking.RankingRules`.
        seed: seed of the sampled candidates, of the bootstrap and of the examples.
        breakdowns: metrics by what was known before, see `breakdowns.break_down`.
        examples: a few users with their recommendations.
    """

    requests: int
    users: int
    items: int
    impression_pools: int
    catalogue_pools: int
    single_candidate_pools: int
    mean_pool_size: float
    first_us: int | None
    last_us: int | None
    rankers: tuple[RankerResult, ...]
    oracle: OracleResult | None = None
    sampled_pools: int = 0
    sample: int = 0
    targets_added: int = 0
    ties: str = "last"
    mask: str = "none"
    seed: int = 0
    breakdowns: tuple[Breakdown, ...] = ()
    examples: tuple[Example, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rankers."""
        return tuple(ranker.name for ranker in self.rankers)

    def ranker(self, name: str) -> RankerResult:
        """Return the result of one ranker.

        Raises:
            InputError: no ranker of that name was evaluated.
        """
        for ranker in self.rankers:
            if ranker.name == name:
                return ranker
        raise InputError(
            f"ranker {name!r} was not evaluated; expected one of {', '.join(self.names) or 'none'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types; NaN becomes None."""
        return {
            "requests": self.requests,
            "users": self.users,
            "items": self.items,
            "impression_pools": self.impression_pools,
            "catalogue_pools": self.catalogue_pools,
            "single_candidate_pools": self.single_candidate_pools,
            "mean_pool_size": None if math.isnan(self.mean_pool_size) else self.mean_pool_size,
            "first_us": self.first_us,
            "last_us": self.last_us,
            "rankers": {ranker.name: ranker.to_dict() for ranker in self.rankers},
            "oracle": None if self.oracle is None else self.oracle.to_dict(),
            **{name: getattr(self, name) for name in _LATER_FIELDS},
            "breakdowns": [breakdown.to_dict() for breakdown in self.breakdowns],
            "examples": [example.to_dict() for example in self.examples],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationResult":
        """Read what `to_dict` wrote, also in releases that measured less.

        Raises:
            InputError: a field is missing, so this is not an evaluation.
        """
        try:
            size = values["mean_pool_size"]
            oracle = values["oracle"]
            return cls(
                **{name: values[name] for name in _PLAIN_FIELDS},
                mean_pool_size=math.nan if size is None else float(size),
                rankers=tuple(
                    RankerResult.from_dict(name, ranker)
                    for name, ranker in values["rankers"].items()
                ),
                oracle=None if oracle is None else OracleResult.from_dict(oracle),
                **{name: values[name] for name in _LATER_FIELDS if name in values},
                breakdowns=tuple(map(Breakdown.from_dict, values.get("breakdowns", ()))),
                examples=tuple(map(Example.from_dict, values.get("examples", ()))),
            )
        except KeyError as error:
            raise InputError(
                f"the evaluation has no field {error}; expected what EvaluationResult.to_dict "
                "writes, so run the evaluation again"
            ) from None


_PLAIN_FIELDS = (
    "requests",
    "users",
    "items",
    "impression_pools",
    "catalogue_pools",
    "single_candidate_pools",
    "first_us",
    "last_us",
)
_LATER_FIELDS = ("sampled_pools", "sample", "targets_added", "ties", "mask", "seed")
"""Plain fields that an older evaluation lacks."""


def kfp_metrics(result: EvaluationResult) -> dict[str, float]:
    """Return every ranker's metrics for `kfp.dsl.Metrics.log_metric`.

    Names are like ``HierTCN recall@10``; undefined metrics are left out. KFP keeps numbers only.
    """
    metrics: dict[str, float] = {"requests": float(result.requests)}
    rows = {ranker.name: ranker.groups["ALL"] for ranker in result.rankers}
    if result.oracle is not None:
        rows[ORACLE] = result.oracle.metrics["ALL"]
    for name, group in rows.items():
        for metric in METRIC_NAMES:
            value = group.value(metric)
            if not math.isnan(value):
                metrics[f"{name} {metric}"] = value
    return metrics

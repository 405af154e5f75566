"""The promotion gate: may this release take over from the one that serves?

A release passes if its challenger is not worse than any baseline, and not worse than the serving
release by more than a tolerance. Without a serving release only the baselines count. Whatever
cannot be judged (too few requests, an undefined metric, NaN scores) is refused: the release that
serves is known to work.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hiertcn.errors import InputError
from hiertcn.evaluation.metrics import LOWER_IS_BETTER, metric_title
from hiertcn.evaluation.results import EvaluationResult


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One comparison of the gate.

    Attributes:
        opponent: name of the ranker compared with.
        role: ``serving`` or ``baseline``.
        challenger_value: the challenger's metric; None if undefined.
        opponent_value: the opponent's metric; None if undefined.
        limit: the worst value that passes; None if undefined.
        passed: whether the challenger is at or on the better side of the limit.
    """

    opponent: str
    role: str
    challenger_value: float | None
    opponent_value: float | None
    limit: float | None
    passed: bool


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """Whether a release may serve, and why.

    Attributes:
        passed: publish it, or leave everything as it is.
        reason: one sentence for the operator.
        challenger: name of the ranker judged.
        metric: name of the metric it was judged by.
        tolerance: relative loss against the serving release that still passes.
        checks: the comparisons, empty if it never came to them.
    """

    passed: bool
    reason: str
    challenger: str = ""
    metric: str = ""
    tolerance: float = 0.0
    checks: tuple[GateCheck, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GateDecision":
        """Read what `to_dict` wrote."""
        checks = tuple(GateCheck(**check) for check in values["checks"])
        return cls(**{**values, "checks": checks})


def decide(
    result: EvaluationResult,
    *,
    challenger: str = "HierTCN",
    serving: str | None = None,
    baselines: Sequence[str] = ("popularity",),
    metric: str = "mrr",
    tolerance: float = 0.02,
    min_requests: int = 1,
) -> GateDecision:
    """Decide whether the challenger may replace the serving release.

    Args:
        result: the evaluation of all of them on the same requests.
        challenger: name of the new release's ranker.
        serving: name of the serving release's ranker; None if nothing serves yet.
        baselines: names of rankers that it must be at least as good as, without tolerance.
        metric: ``mrr``, ``mrp`` (lower is better) or ``recall@K``, over all requests.
        tolerance: share of the serving release's value that may be lost, from 0 to below 1.
        min_requests: fewer evaluated requests than this are too few to judge by.

    Raises:
        InputError: a ranker that was not evaluated, an unknown metric, or a bad tolerance.
    """
    if not 0 <= tolerance < 1:
        raise InputError(
            f"the gate's tolerance is {tolerance}; expected a share from 0 to below 1, such as 0.02"
        )
    value = result.ranker(challenger).value(metric)
    opponents = [(name, "baseline", 0.0) for name in baselines]
    if serving is not None:
        opponents.insert(0, (serving, "serving", tolerance))
    checks = tuple(
        _check(name, role, value, result.ranker(name).value(metric), metric, slack)
        for name, role, slack in opponents
    )

    trouble = _unjudgeable(result, challenger, metric, value, min_requests)
    failed = [check for check in checks if not check.passed]
    if trouble:
        reason = f"refused: {trouble}"
    elif failed:
        reason = "refused: " + "; ".join(_explain(check, challenger, metric) for check in failed)
    elif checks:
        reason = "passed: " + "; ".join(_explain(check, challenger, metric) for check in checks)
    else:
        reason = (
            f"passed: {metric_title(metric)} of {challenger} is {value:.4g} and there was nothing "
            "to beat"
        )
    return GateDecision(
        passed=not trouble and not failed,
        reason=reason,
        challenger=challenger,
        metric=metric,
        tolerance=tolerance,
        checks=checks,
    )


def _unjudgeable(
    result: EvaluationResult, challenger: str, metric: str, value: float, min_requests: int
) -> str:
    """Return why the challenger cannot be judged, or nothing."""
    needed = max(1, min_requests)
    if result.requests < needed:
        return (
            f"{result.requests} requests were evaluated and the gate needs at least {needed}; "
            "evaluate a longer range"
        )
    nan_scores = result.ranker(challenger).nan_scores
    if nan_scores:
        return f"{challenger} gave {nan_scores} NaN scores; look at its training curve"
    if math.isnan(value):
        return f"the {metric_title(metric)} of {challenger} is not a number"
    return ""


def _check(
    opponent: str, role: str, value: float, against: float, metric: str, tolerance: float
) -> GateCheck:
    lower_is_better = metric in LOWER_IS_BETTER
    limit = against * (1 + tolerance if lower_is_better else 1 - tolerance)
    # A comparison with NaN is false on both sides, so what is undefined never passes.
    passed = value <= limit if lower_is_better else value >= limit
    return GateCheck(
        opponent=opponent,
        role=role,
        challenger_value=_or_none(value),
        opponent_value=_or_none(against),
        limit=_or_none(limit),
        passed=bool(passed),
    )


def _explain(check: GateCheck, challenger: str, metric: str) -> str:
    title = metric_title(metric)
    if check.opponent_value is None or check.challenger_value is None or check.limit is None:
        return f"the {title} of {check.opponent} is not a number, so nothing can be compared"
    role = "the serving" if check.role == "serving" else "the baseline"
    relation = "not worse" if check.passed else "worse"
    allowed = "" if check.limit == check.opponent_value else f", allowing {check.limit:.4g}"
    return (
        f"{title} of {challenger} is {check.challenger_value:.4g}, {relation} than that of {role} "
        f"{check.opponent} ({check.opponent_value:.4g}{allowed})"
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value

"""The report's sections on what was measured, how the rankers compare, and what the gate said."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime

from markupsafe import Markup

from hiertcn.evaluation.figures import Interval, Series, interval_chart, line_chart
from hiertcn.evaluation.gate import GateDecision
from hiertcn.evaluation.metrics import LOWER_IS_BETTER, METRIC_NAMES, Metrics, metric_title
from hiertcn.evaluation.report_parts import (
    Cell,
    Chart,
    Row,
    Section,
    Table,
    Tile,
    best_of,
    number,
    share,
)
from hiertcn.evaluation.results import (
    LAST_POSITION,
    ORACLE,
    EvaluationResult,
    OracleResult,
    RankerResult,
)


def result_sections(
    evaluation: EvaluationResult, challenger: str, serving: str | None
) -> list[Section]:
    """Return the sections on the protocol, the results, and the places in the session."""
    return [
        Section("measured", "What was measured", paragraphs=_protocol(evaluation)),
        _results(evaluation, challenger, serving),
        _positions(evaluation, challenger),
    ]


def gate_section(gate: GateDecision) -> Section:
    """Return the comparisons behind the gate's decision."""
    return Section(
        "gate",
        "Gate",
        paragraphs=(
            f"A release may serve if the {metric_title(gate.metric)} of {gate.challenger} is not "
            "worse than that of any baseline, and not worse than the serving release's by more "
            f"than {gate.tolerance:.1%} of it.",
        ),
        tables=(
            Table(
                f"{gate.challenger} against each opponent, by {metric_title(gate.metric)}",
                ("Opponent", "Role", "Opponent's value", "Limit", gate.challenger, "Verdict"),
                tuple(
                    Row(
                        check.opponent,
                        (
                            Cell(check.role),
                            Cell(share(_number(check.opponent_value))),
                            Cell(share(_number(check.limit))),
                            Cell(share(_number(check.challenger_value))),
                            Cell("✓ passed" if check.passed else "✗ refused", not check.passed),
                        ),
                    )
                    for check in gate.checks
                ),
            ),
        ),
    )


def tiles(evaluation: EvaluationResult, challenger: str, serving: str | None) -> list[Tile]:
    """Return the figures for the head of the page."""
    if challenger not in evaluation.names or evaluation.requests == 0:
        return []
    ours = evaluation.ranker(challenger)
    found = [
        Tile(share(ours.value("mrr")), f"MRR of {challenger}"),
        Tile(share(ours.value("recall@10")), f"Recall@10 of {challenger}"),
    ]
    for name in evaluation.names:
        if name == serving or (name == "popularity" and serving is None):
            theirs = evaluation.ranker(name).value("mrr")
            if theirs > 0:
                change = ours.value("mrr") / theirs - 1
                found.append(Tile(f"{change:+.1%}", f"MRR against {name}"))
    if evaluation.oracle is not None:
        reached = evaluation.oracle.share(challenger)
        if math.isfinite(reached):
            found.append(Tile(f"{reached:.1%}", "of the best possible MRR (oracle)"))
    return found


def _protocol(evaluation: EvaluationResult) -> tuple[str, ...]:
    if evaluation.requests == 0:
        return ("No interaction fell into the evaluated range, so nothing was measured.",)
    catalogue = f"all {number(evaluation.items)} items"
    shown = (
        f"the items shown at its step (with the target "
        f"{number(evaluation.mean_pool_size)} candidates on average)"
    )
    if evaluation.catalogue_pools == 0:
        pool = shown
    elif evaluation.impression_pools == 0:
        pool = catalogue
    else:
        pool = (
            f"the items shown at its step where the log tells them "
            f"({number(evaluation.impression_pools)} times), else against {catalogue}"
        )
    sentences = [
        f"Each of {number(evaluation.requests)} interactions by {number(evaluation.users)} users "
        f"between {_time(evaluation.first_us)} and {_time(evaluation.last_us)} was predicted from "
        f"everything its user did before it, and ranked against {pool}. "
        "A tie never helps a ranker, an item that a ranker does not know ranks last, and the range "
        "beside an MRR is its 95% bootstrap interval over users."
    ]
    if evaluation.single_candidate_pools:
        sentences.append(
            f"In {number(evaluation.single_candidate_pools)} of the requests the target was the "
            "only candidate, which every ranker gets right."
        )
    return tuple(sentences)


def _results(evaluation: EvaluationResult, challenger: str, serving: str | None) -> Section:
    rankers = evaluation.rankers
    columns = tuple(metric_title(name) for name in METRIC_NAMES)
    arrows = tuple("↓" if name in LOWER_IS_BETTER else "↑" for name in METRIC_NAMES)
    best = {
        name: best_of((r.value(name) for r in rankers), name in LOWER_IS_BETTER)
        for name in METRIC_NAMES
    }
    rows = [
        Row(
            ranker.name,
            tuple(_metric_cell(ranker.groups["ALL"], name, best[name]) for name in METRIC_NAMES),
            kind="challenger" if ranker.name == challenger else "",
            note=_role(ranker, challenger, serving, evaluation.items),
        )
        for ranker in rankers
    ]
    paragraphs: tuple[str, ...] = ()
    if evaluation.oracle is not None:
        oracle = evaluation.oracle
        rows.append(
            Row(
                ORACLE,
                tuple(_metric_cell(oracle.metrics["ALL"], name) for name in METRIC_NAMES),
                kind="oracle",
                note=f"best possible, {number(oracle.metrics['ALL'].requests)} requests",
            )
        )
        paragraphs = (_oracle_sentence(oracle, challenger),)
    return Section(
        "results",
        "Results",
        paragraphs=paragraphs,
        tables=(
            Table(
                "All requests; the best of each column in bold, ↑ higher is better, "
                "↓ lower is better",
                (
                    "Ranker",
                    *(f"{title} {arrow}" for title, arrow in zip(columns, arrows, strict=True)),
                ),
                tuple(rows),
            ),
        ),
        charts=(_interval_chart(rankers),) if evaluation.requests else (),
    )


def _positions(evaluation: EvaluationResult, challenger: str) -> Section:
    rankers = evaluation.rankers
    best = {
        (group, metric): best_of((r.value(metric, group) for r in rankers), False)
        for group in ("FIRST", "LATER")
        for metric in ("recall@10", "mrr")
    }
    rows = [
        _group_row(ranker.name, ranker.groups, best, "challenger" * (ranker.name == challenger))
        for ranker in rankers
    ]
    if evaluation.oracle is not None:
        rows.append(_group_row(ORACLE, evaluation.oracle.metrics, {}, "oracle"))
    counts = rankers[0].groups if rankers else {}
    first, later = (counts[group].requests if counts else 0 for group in ("FIRST", "LATER"))
    charts: tuple[Chart, ...] = ()
    if any(len(ranker.by_position) > 1 for ranker in rankers):
        charts = (_position_chart(rankers),)
    return Section(
        "positions",
        "First and later interactions of a session",
        paragraphs=(
            f"The first interaction of a session ({number(first)} requests) can only be predicted "
            f"from earlier sessions; later ones ({number(later)}) also from the session so far.",
        ),
        tables=(
            Table(
                "By place in the session; the best of each column in bold",
                (
                    "Ranker",
                    "First: Recall@10",
                    "First: MRR",
                    "Later: Recall@10",
                    "Later: MRR",
                ),
                tuple(rows),
            ),
        ),
        charts=charts,
    )


def _group_row(
    name: str,
    groups: Mapping[str, Metrics],
    best: Mapping[tuple[str, str], float],
    kind: str,
) -> Row:
    cells = tuple(
        _metric_cell(groups[group], metric, best.get((group, metric), math.nan))
        for group in ("FIRST", "LATER")
        for metric in ("recall@10", "mrr")
    )
    return Row(name, cells, kind)


def _metric_cell(metrics: Metrics, name: str, best: float = math.nan) -> Cell:
    value = metrics.value(name)
    detail = ""
    if name == "mrr" and all(math.isfinite(bound) for bound in metrics.mrr_interval):
        low, high = metrics.mrr_interval
        detail = f"{low:.4f} to {high:.4f}"
    return Cell(share(value), best=value == best, detail=detail)


def _role(ranker: RankerResult, challenger: str, serving: str | None, items: int) -> str:
    notes = []
    if ranker.name == challenger:
        notes.append("this release")
    if ranker.name == serving:
        notes.append("serving now")
    if ranker.known_items < items:
        notes.append(f"knows {number(ranker.known_items)} items")
    if ranker.unknown_targets:
        notes.append(f"{number(ranker.unknown_targets)} targets unknown")
    if ranker.nan_scores:
        notes.append(f"{number(ranker.nan_scores)} NaN scores")
    return ", ".join(notes)


def _oracle_sentence(oracle: OracleResult, challenger: str) -> str:
    known = (
        "The oracle ranks with the very probabilities that the simulator drew the choices from, so "
        "no model can expect to do better."
    )
    reached = oracle.share(challenger)
    if not math.isfinite(reached):
        return known + " It ranked other candidates, so its distance cannot be told."
    return (
        f"{known} On the {number(oracle.compared_requests)} requests where both ranked equally "
        f"many candidates its MRR is {share(oracle.compared_mrr)}, of which {challenger} reaches "
        f"{reached:.1%}."
    )


def _interval_chart(rankers: tuple[RankerResult, ...]) -> Chart:
    metrics = [ranker.groups["ALL"] for ranker in rankers]
    rows = [Interval(value=m.mrr, low=m.mrr_interval[0], high=m.mrr_interval[1]) for m in metrics]
    return Chart(
        "MRR with its 95% interval",
        Markup(interval_chart("mrr-intervals", rows, x_label="MRR")),
        tuple(ranker.name for ranker in rankers),
        "MRR and its interval for each ranker; the results table holds the same values.",
        numbered=True,
    )


def _position_chart(rankers: tuple[RankerResult, ...]) -> Chart:
    places = {place.position for ranker in rankers for place in ranker.by_position}
    series = [
        Series(
            label=ranker.name,
            x=[place.position for place in ranker.by_position],
            y=[place.mrr for place in ranker.by_position],
        )
        for ranker in rankers
    ]
    svg = line_chart(
        "mrr-by-position",
        series,
        x_label="place in the session",
        y_label="MRR",
        x_ticks=[(place, _place(place)) for place in sorted(places)],
        from_zero=True,
    )
    told = "; ".join(
        f"{ranker.name}: "
        + ", ".join(f"{_place(place.position)}: {share(place.mrr)}" for place in ranker.by_position)
        for ranker in rankers
    )
    return Chart(
        "MRR by place in the session",
        Markup(svg),
        tuple(ranker.name for ranker in rankers),
        f"MRR by place in the session. {told}.",
    )


def _place(position: int) -> str:
    return f"{position}+" if position == LAST_POSITION else str(position)


def _time(instant_us: int | None) -> str:
    if instant_us is None:
        return "an unknown time"
    return datetime.fromtimestamp(instant_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _number(value: float | None) -> float:
    return math.nan if value is None else value

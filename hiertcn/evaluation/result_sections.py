"""The report's sections on what was measured and how the rankers compare."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from markupsafe import Markup

from hiertcn.evaluation.analysis_sections import breakdown_section, example_section
from hiertcn.evaluation.bootstrap import Difference
from hiertcn.evaluation.figures import Interval, Series, interval_chart, line_chart
from hiertcn.evaluation.metrics import LOWER_IS_BETTER, Metrics, metric_title
from hiertcn.evaluation.report_parts import (
    NO_VALUE,
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

_SHOWN: Final = (
    "recall@1",
    "recall@5",
    "recall@10",
    "recall@20",
    "ndcg@10",
    "mrr",
    "mrr@20",
    "mrp",
)
"""The metrics of the results table; the others are in evaluation.json."""
_COMPARED: Final = ("recall@10", "ndcg@10", "mrr")


def result_sections(
    evaluation: EvaluationResult, challenger: str, serving: str | None
) -> list[Section]:
    """Return the sections on the protocol, the results, the analyses and the examples."""
    sections = [
        Section("measured", "What was measured", paragraphs=_protocol(evaluation)),
        _results(evaluation, challenger, serving),
        _positions(evaluation, challenger),
    ]
    if evaluation.breakdowns:
        sections.append(breakdown_section(evaluation.breakdowns))
    if evaluation.examples:
        sections.append(example_section(evaluation.examples))
    return sections


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
            found.append(
                Tile(
                    f"{reached:.1%}",
                    "of the best possible MRR, where the oracle ranks the same items",
                )
            )
    return found


def _protocol(evaluation: EvaluationResult) -> tuple[str, ...]:
    if evaluation.requests == 0:
        return ("No interaction fell into the evaluated range, so nothing was measured.",)
    catalogue = f"all {number(evaluation.items)} items"
    shown = (
        f"the items shown at its step (with the target "
        f"{number(evaluation.mean_pool_size)} candidates on average)"
    )
    elsewhere = catalogue
    if evaluation.sampled_pools:
        elsewhere = (
            f"{number(evaluation.sample)} items drawn at random from {catalogue} (the same for "
            f"every ranker, seed {evaluation.seed}) and the target"
        )
    if evaluation.impression_pools == evaluation.requests:
        pool = shown
    elif evaluation.impression_pools == 0:
        pool = elsewhere
    else:
        pool = (
            f"the items shown at its step where the log tells them "
            f"({number(evaluation.impression_pools)} times), else against {elsewhere}"
        )
    tie = "A tie never helps a ranker"
    if evaluation.ties == "popularity":
        tie = "A tie is won by items at least as popular as the target"
    sentences = [
        f"Each of {number(evaluation.requests)} interactions by {number(evaluation.users)} users "
        f"between {_time(evaluation.first_us)} and {_time(evaluation.last_us)} was predicted from "
        f"everything its user did before it, and ranked against {pool}. "
        f"{tie}, an item that a ranker does not know ranks last, and the range beside a value is "
        "its 95% bootstrap interval over users."
    ]
    if evaluation.single_candidate_pools:
        sentences.append(
            f"In {number(evaluation.single_candidate_pools)} of the requests the target was the "
            "only candidate, which every ranker gets right."
        )
    if evaluation.targets_added:
        sentences.append(
            f"In {number(evaluation.targets_added)} of the requests the target was not among the "
            "items shown and was added to them."
        )
    if evaluation.mask != "none":
        masked = {
            "last-item": "The item just seen in the running session is ranked last",
            "session": "All items of the running session are ranked last",
        }[evaluation.mask]
        sentences.append(f"{masked} by every ranker.")
    return tuple(sentences)


def _results(evaluation: EvaluationResult, challenger: str, serving: str | None) -> Section:
    rankers = evaluation.rankers
    columns = tuple(metric_title(name) for name in _SHOWN)
    arrows = tuple("↓" if name in LOWER_IS_BETTER else "↑" for name in _SHOWN)
    best = {
        name: best_of((r.value(name) for r in rankers), name in LOWER_IS_BETTER) for name in _SHOWN
    }
    rows = [
        Row(
            ranker.name,
            tuple(_metric_cell(ranker.groups["ALL"], name, best[name]) for name in _SHOWN),
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
                tuple(_metric_cell(oracle.metrics["ALL"], name) for name in _SHOWN),
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
            *_differences(evaluation),
        ),
        charts=(_interval_chart(rankers),) if evaluation.requests else (),
    )


def _differences(evaluation: EvaluationResult) -> tuple[Table, ...]:
    """Return the first ranker against each other one, or nothing without paired intervals."""
    others = [ranker for ranker in evaluation.rankers if ranker.behind_first]
    if not others:
        return ()
    first = evaluation.rankers[0].name
    return (
        Table(
            f"{first} minus each other ranker, with the 95% interval of the paired difference; in "
            "bold where 0 is outside of it",
            ("Against", *(metric_title(name) for name in _COMPARED)),
            tuple(
                Row(
                    ranker.name,
                    tuple(_difference_cell(ranker.behind_first[name]) for name in _COMPARED),
                )
                for ranker in others
            ),
        ),
    )


def _difference_cell(difference: Difference) -> Cell:
    detail = ""
    if math.isfinite(difference.low):
        detail = f"{difference.low:+.4f} to {difference.high:+.4f}"
    text = f"{difference.mean:+.4f}" if math.isfinite(difference.mean) else NO_VALUE
    return Cell(text, best=difference.excludes_zero, detail=detail)


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
    # With breakdowns, the one by place tells the same.
    if not evaluation.breakdowns and any(len(ranker.by_position) > 1 for ranker in rankers):
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
    low, high = metrics.interval(name)
    if math.isfinite(low) and math.isfinite(high):
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
    bounds = [m.interval("mrr") for m in metrics]
    rows = [
        Interval(value=m.mrr, low=low, high=high)
        for m, (low, high) in zip(metrics, bounds, strict=True)
    ]
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

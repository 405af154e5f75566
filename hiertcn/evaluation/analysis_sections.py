"""The report's sections on when the rankers do well, and on what they recommend to a few users."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from markupsafe import Markup

from hiertcn.evaluation.breakdowns import Breakdown
from hiertcn.evaluation.examples import Example
from hiertcn.evaluation.figures import Series, line_chart
from hiertcn.evaluation.metrics import metric_title
from hiertcn.evaluation.report_parts import (
    NO_VALUE,
    Cell,
    Chart,
    Row,
    Section,
    Table,
    number,
    share,
)

_DRAWN: Final = ("mrr", "recall@10")


def breakdown_section(breakdowns: Sequence[Breakdown]) -> Section:
    """Return the analyses of the paper's Figures 2 to 4, a chart for each quantity and metric."""
    return Section(
        "breakdowns",
        "By history, place and pause",
        paragraphs=(
            "The analyses of the HierTCN paper's Figures 2 (length of the history), 3 (place in "
            "the session) and 4 (time gap). A bin holds everything from its value to the next one; "
            "bins without a request are left out.",
        ),
        tables=tuple(_counts(breakdown) for breakdown in breakdowns),
        charts=tuple(
            _chart(breakdown, metric)
            for breakdown in breakdowns
            if any(breakdown.requests)
            for metric in _DRAWN
        ),
    )


def example_section(examples: Sequence[Example]) -> Section:
    """Return what a few users did and what each ranker would recommend (the paper's Figure 5)."""
    tables: list[Table] = []
    for example in examples:
        tables += [_past(example), _recommended(example)]
    return Section(
        "examples",
        "Recommendations to a few users",
        paragraphs=(
            "Drawn at random among the users with at least two earlier sessions, as in the HierTCN "
            "paper's Figure 5. In bold the item that the user went on to.",
        ),
        tables=tuple(tables),
    )


def _counts(breakdown: Breakdown) -> Table:
    return Table(
        f"Requests by {breakdown.title} (Figure {breakdown.figure})",
        ("", *breakdown.bins),
        (Row("Requests", tuple(Cell(number(count)) for count in breakdown.requests)),),
    )


def _chart(breakdown: Breakdown, metric: str) -> Chart:
    title = metric_title(metric)
    filled = [place for place, count in enumerate(breakdown.requests) if count]
    series = [
        Series(label=ranker, x=list(range(len(breakdown.bins))), y=values[metric])
        for ranker, values in breakdown.values.items()
    ]
    svg = line_chart(
        f"{metric}-by-{breakdown.key}",
        series,
        x_label=breakdown.title,
        y_label=title,
        x_ticks=[(place, breakdown.bins[place]) for place in filled],
        from_zero=True,
    )
    told = "; ".join(
        f"{line.label}: "
        + ", ".join(f"{breakdown.bins[place]}: {share(line.y[place])}" for place in filled)
        for line in series
    )
    return Chart(
        f"{title} by {breakdown.title}",
        Markup(svg),
        tuple(breakdown.values),
        f"{title} by {breakdown.title}. {told}.",
    )


def _past(example: Example) -> Table:
    rows = []
    for session in example.sessions:
        items = list(session.items)
        if session.left_out:
            items.insert(0, f"({number(session.left_out)} more)")
        rows.append(
            Row(
                _minute(session.start_us),
                (Cell(" → ".join(items) or NO_VALUE),),
                note="running" if session.running else "",
            )
        )
    before = (
        f", after {number(example.earlier_sessions)} earlier ones"
        if example.earlier_sessions
        else ""
    )
    return Table(
        f"User {example.user}: the last sessions before {_minute(example.time_us)}{before}",
        ("Session (UTC)", "Items"),
        tuple(rows),
        wraps=True,
    )


def _recommended(example: Example) -> Table:
    deepest = max((len(found.items) for found in example.recommendations), default=0)
    rows = [
        Row(
            str(place + 1),
            tuple(
                Cell(found.items[place], best=place == found.target_place)
                if place < len(found.items)
                else Cell(NO_VALUE)
                for found in example.recommendations
            ),
        )
        for place in range(deepest)
    ]
    rows.append(
        Row(
            "Rank of the target",
            tuple(Cell(number(found.target_rank)) for found in example.recommendations),
        )
    )
    return Table(
        f"User {example.user} went on to {example.target}; the best items of each ranker",
        ("Place", *(found.ranker for found in example.recommendations)),
        tuple(rows),
        wraps=True,
    )


def _minute(instant_us: int) -> str:
    return datetime.fromtimestamp(instant_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M")

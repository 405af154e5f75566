"""The report's sections on the data, the item graph and the training curves.

They show what other rooms wrote as JSON: numbers under names, pairs of mean and standard deviation,
and curves as lists. Names they do not know are shown as they are.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup

from hiertcn.evaluation.figures import Series, line_chart
from hiertcn.evaluation.report_parts import NO_VALUE, Cell, Chart, Row, Section, Table, number

_TABLE_1: Final = (
    ("users", "Users", "65,347", "5,923,659"),
    ("items", "Items", "20,778", "74,202,787"),
    ("interactions", "Interactions", "1,450,300", "56,050,857"),
    ("impressions", "Impressions", NO_VALUE, "1,685,877,684"),
    ("sessions", "Sessions", "535,747", "23,354,523"),
    ("impressions_per_event", "Impressions per event", NO_VALUE, "9.8 ± 8.6"),
    ("impressions_per_session", "Impressions per session", NO_VALUE, "25.8 ± 51.1"),
    ("events_per_session", "Events per session", "2.5 ± 3.8", "2.4 ± 3.0"),
    ("sessions_per_user", "Sessions per user", "8.2 ± 7.0", "3.9 ± 4.7"),
    ("events_per_user", "Events per user", "22.2 ± 20.8", "9.7 ± 13.4"),
    ("impressions_per_user", "Impressions per user", NO_VALUE, "284.6 ± 252.0"),
)
"""Rows of the paper's Table 1: name here, title, XING, Pinterest."""

_X_NAMES: Final = ("steps", "step", "epochs", "epoch")
_QUANTILE = re.compile(r"p\d+(\.\d+)?|min|max|mean")


def data_section(statistics: Mapping[str, Any]) -> Section:
    """Return the paper's Table 1 with this data beside it.

    Args:
        statistics: a number, or mean and standard deviation (a mapping or a pair), by the names of
            `_TABLE_1`.
    """
    rows = tuple(
        Row(title, (Cell(_amount(statistics.get(name))), Cell(xing), Cell(pinterest)))
        for name, title, xing, pinterest in _TABLE_1
    )
    return Section(
        "data",
        "Data",
        tables=(
            Table(
                "This data beside the data sets of the HierTCN paper (its Table 1); "
                "mean ± standard deviation",
                ("Statistic", "This data", "XING (paper)", "Pinterest (paper)"),
                rows,
            ),
        ),
    )


def graph_section(statistics: Mapping[str, Any]) -> Section:
    """Return the item graph's counts, and its distributions as a table.

    Args:
        statistics: numbers by name; mappings whose keys are like ``p50`` are quantiles and become
            rows of a table of their own.
    """
    counts: list[Row] = []
    quantiles: dict[tuple[str, ...], list[Row]] = {}
    for name, value in statistics.items():
        if value is None or value == {}:
            continue
        if not isinstance(value, Mapping):
            counts.append(Row(_title(name), (Cell(_spread(value)),)))
        elif all(_QUANTILE.fullmatch(str(part)) for part in value):
            row = Row(
                _title(str(name).removesuffix("_quantiles")),
                tuple(Cell(number(part)) for part in value.values()),
            )
            quantiles.setdefault(tuple(map(str, value)), []).append(row)
        else:
            counts += [
                Row(f"{_title(name)}: {_title(part).lower()}", (Cell(_spread(amount)),))
                for part, amount in value.items()
            ]
    tables = [
        Table("Quantiles over the connected items and edges", ("Quantity", *columns), tuple(rows))
        for columns, rows in quantiles.items()
    ]
    if counts:
        tables.insert(0, Table("What the graph holds", ("Quantity", "Value"), tuple(counts)))
    return Section(
        "graph",
        "Item graph",
        paragraphs=(
            "Two items are connected if one user interacted with both within a short time; the "
            "item encoder learns from these edges.",
        ),
        tables=tuple(tables),
    )


def training_section(encoder_curve: Mapping[str, Any], model_curve: Mapping[str, Any]) -> Section:
    """Return the losses and validation metrics of the item encoder and of HierTCN.

    Args:
        encoder_curve: lists of numbers by name; ``steps`` or ``epochs`` is the horizontal axis, and
            names with ``loss`` in them share a chart. Empty for none.
        model_curve: the same for HierTCN.
    """
    charts = [
        chart
        for who, curve in (("Item encoder", encoder_curve), ("HierTCN", model_curve))
        for chart in _curve_charts(who, curve)
    ]
    paragraphs = () if charts else ("The curves hold no finite point.",)
    return Section("training", "Training", paragraphs=paragraphs, charts=tuple(charts))


def _curve_charts(who: str, curve: Mapping[str, Any]) -> list[Chart]:
    lists = {name: _floats(values) for name, values in curve.items() if _is_numeric(values)}
    axis = next((name for name in _X_NAMES if name in lists), None)
    charts = []
    for is_loss, kind in ((True, "loss"), (False, "validation")):
        series = [
            Series(label=_title(name), x=_places(len(values), lists.get(axis or "")), y=values)
            for name, values in lists.items()
            if name != axis and ("loss" in name) == is_loss
        ]
        series = [line for line in series if line.points()]
        if not series:
            continue
        x_label = "epoch" if axis is None or axis.startswith("epoch") else "step"
        only = series[0].label if len(series) == 1 else kind
        ends = "; ".join(
            f"{line.label}: {number(line.points()[0][1])} to {number(line.points()[-1][1])}"
            for line in series
        )
        charts.append(
            Chart(
                f"{who}: {only[:1].lower()}{only[1:]}",
                Markup(line_chart(f"{who}-{kind}", series, x_label=x_label, y_label=kind)),
                tuple(
                    f"{line.label}, {number(line.points()[0][1])} to {number(line.points()[-1][1])}"
                    for line in series
                ),
                f"First and last value. {ends}.",
            )
        )
    return charts


def _places(count: int, axis: Sequence[float] | None) -> list[float]:
    """Return where ``count`` values stand: on the axis, or evenly over it if it is longer."""
    if axis is None or not axis or count < 2:
        return [float(at) for at in range(1, count + 1)] if not axis else [axis[-1]] * count
    if count == len(axis):
        return list(axis)
    step = (axis[-1] - axis[0]) / (count - 1)
    return [axis[0] + step * at for at in range(count)]


def _is_numeric(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in values
    )


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _amount(value: Any) -> str:
    if isinstance(value, Mapping) and "mean" in value:
        value = (value["mean"], value.get("std"))
    if isinstance(value, list | tuple) and len(value) == 2:
        mean, deviation = (f"{part:.1f}" if _finite(part) else NO_VALUE for part in value)
        return NO_VALUE if mean == NO_VALUE else f"{mean} ± {deviation}"
    return number(value)


def _spread(value: Any) -> str:
    """Return a plain value as it is, and a list of numbers as its range and mean."""
    if not isinstance(value, list | tuple):
        return number(value)
    finite = [float(part) for part in value if _finite(part)]
    if not finite:
        return NO_VALUE
    mean = sum(finite) / len(finite)
    return f"{number(min(finite))} to {number(max(finite))}, mean {number(mean)}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _title(name: Any) -> str:
    words = str(name).replace("_", " ").strip()
    return (words[:1].upper() + words[1:]).replace("mrr", "MRR").replace("Mrr", "MRR")

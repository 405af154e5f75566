"""The building blocks of the report page, as plain values that report.html lays out."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

NO_VALUE = "–"


@dataclass(frozen=True)
class Cell:
    """A value of a table, in bold if it is the best of its column, with a smaller detail."""

    text: str
    best: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table; ``kind`` is its CSS class: ``challenger``, ``oracle`` or nothing."""

    label: str
    cells: tuple[Cell, ...]
    kind: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column is a header for its row; ``wraps`` if its cells are texts."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    wraps: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with its legend; ``description`` is read to those who cannot see it."""

    title: str
    svg: Markup
    legend: tuple[str, ...]
    description: str
    numbered: bool = False


@dataclass(frozen=True)
class Section:
    """One heading with what stands under it; ``key`` is its anchor."""

    key: str
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()


@dataclass(frozen=True)
class Tile:
    """One figure of the page's head."""

    value: str
    label: str


def number(value: Any) -> str:
    """Return a number as the report shows it: thousands separated, four significant digits."""
    if value is None:
        return NO_VALUE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return NO_VALUE
    if value.is_integer() and abs(value) >= 10:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(value: float) -> str:
    """Return a metric between 0 and 1 with four places."""
    return f"{value:.4f}" if math.isfinite(value) else NO_VALUE


def best_of(values: Iterable[float], lower_is_better: bool) -> float:
    """Return the best finite value; NaN, which equals nothing, if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan
    return min(finite) if lower_is_better else max(finite)

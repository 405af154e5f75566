"""Charts as SVG that lives inside a page: follows its colours, light or dark, and its fonts.

Matplotlib draws with placeholder colours that are then replaced by the page's CSS variables
``--ink``, ``--rule``, ``--paper`` and ``--series-1`` to ``--series-6``. Series differ by dash and
marker too, so colour is never the only difference. Legends are the page's business: no text but
numbers and axis labels goes through matplotlib, which costs about 0.2 s a chart.
"""

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SERIES_COLORS: Final = 6
"""How many series colours the page defines; later series start again with another dash."""

_INK = "#010101"
_RULE = "#020202"
_PAPER = "#030303"
_SERIES = tuple(f"#0{index}0909" for index in range(1, SERIES_COLORS + 1))
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_VARIABLES = {
    _INK: "var(--ink)",
    _RULE: "var(--rule)",
    _PAPER: "var(--paper)",
    **{color: f"var(--series-{index})" for index, color in enumerate(_SERIES, start=1)},
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart; points whose y is not finite are left out.

    Attributes:
        label: what the page's legend says.
        x: places on the horizontal axis.
        y: values, as many as ``x``.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]

    def points(self) -> list[tuple[float, float]]:
        """Return the finite points."""
        return [
            (x, y)
            for x, y in zip(self.x, self.y, strict=True)
            if math.isfinite(x) and math.isfinite(y)
        ]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One row of an interval chart.

    Attributes:
        value: where the dot stands.
        low: where its bar begins; not finite for a dot without a bar.
        high: where its bar ends.
    """

    value: float
    low: float
    high: float


def line_chart(
    name: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
) -> str:
    """Return lines over one horizontal axis as an inline ``<svg>`` element.

    Args:
        name: distinguishes the element ids of several charts on a page.
        series: the lines, in the page's legend order.
        x_label: horizontal axis, with its unit.
        y_label: vertical axis, with its unit.
        x_ticks: place and text of each tick; empty for round whole numbers.
        from_zero: whether the vertical axis begins at 0.
    """
    with _styled(name):
        figure, axes = _canvas(6.0, 3.3)
        for index, line in enumerate(series):
            points = line.points()
            if not points:
                continue
            crowded = len(points) > 30
            axes.plot(
                *zip(*points, strict=True),
                color=_SERIES[index % SERIES_COLORS],
                linestyle=_DASHES[index // SERIES_COLORS % len(_DASHES)],
                marker=None if crowded else _MARKERS[index % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.8,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if x_ticks:
            axes.set_xticks([at for at, _ in x_ticks], [text for _, text in x_ticks])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if from_zero:
            axes.set_ylim(bottom=0)
        return _inline_svg(figure)


def interval_chart(name: str, rows: Sequence[Interval], *, x_label: str) -> str:
    """Return one dot with its interval per row, the first on top, as an inline ``<svg>`` element.

    Rows carry a number from 1, which the page's legend explains.
    """
    with _styled(name):
        figure, axes = _canvas(6.0, 0.9 + 0.36 * max(1, len(rows)))
        for index, row in enumerate(rows):
            color = _SERIES[index % SERIES_COLORS]
            if math.isfinite(row.low) and math.isfinite(row.high):
                axes.plot([row.low, row.high], [index, index], color=color, linewidth=5, alpha=0.35)
            if math.isfinite(row.value):
                axes.plot(row.value, index, color=color, marker=_MARKERS[index % len(_MARKERS)])
        axes.set_xlabel(x_label)
        axes.set_yticks(range(len(rows)), [str(index + 1) for index in range(len(rows))])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=_RULE, linewidth=0.8)
        return _inline_svg(figure)


def _styled(name: str) -> AbstractContextManager[None]:
    """Return a context in which text stays text and ids depend on ``name`` alone."""
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "text.parse_math": False,
            "font.size": 9.5,
            "axes.edgecolor": _RULE,
            "axes.labelcolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "text.color": _INK,
        }
    )


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(visible=True, axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _inline_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Matplotlib's style rule would apply to the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    # HTML needs no namespaces and no metadata, and both name outside addresses.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg)
    svg = svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = svg.replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.strip()

"""Charts as SVG text to stand inside an HTML page: no script, no font file, the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Colours that stay apart for colour-blind readers. Source: Okabe and Ito 2008, "Color universal design".
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
# Stand for the page's own colours, which are others in the dark; `_to_svg` puts these in.
INK, GRID = "#010203", "#040506"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
MARKERS = "os^Dv<>P"
_PAGE_COLORS = {INK: "currentColor", GRID: "var(--grid)"}

_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar in a task's name is a dollar
    "svg.fonttype": "none",  # text stays text: selectable, and drawn with the page's fonts
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = BLUE
    points: bool = False
    """Mark each value: for curves of few values."""
    dashed: bool = False
    """Of somebody else, for reference."""


@dataclass(frozen=True)
class Bar:
    """One score with its interval and what guessing would give."""

    label: str
    value: float
    interval: tuple[float, float] | None
    chance: float | None


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    x_scale: Literal["linear", "log"] = "linear",
    y_scale: Literal["linear", "log"] = "linear",
    from_zero: bool = False,
    size: tuple[float, float] = (4.0, 2.7),
    x_label: str = "step",
) -> str:
    """Curves over optimizer steps, or what `x_label` says; `size` in inches of a page of about ten."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, axes = _figure(*size)
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=line.color,
                linewidth=1.6 if line.points else 1.1,
                marker="o" if line.points or len(line.x) < 3 else None,
                markersize=3.5,
                linestyle="--" if line.dashed else "-",
                label=line.label,
            )
        axes.set_xscale(x_scale)
        axes.set_yscale(y_scale)
        for axis, scale in ((axes.xaxis, x_scale), (axes.yaxis, y_scale)):
            if scale == "log":
                _log_ticks(axis, line_values(lines, of_x=axis is axes.xaxis))
                axis.set_minor_formatter(NullFormatter())
        if x_scale == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if y_scale == "linear" and max((abs(value) for line in lines for value in line.y), default=0) >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label + (" (log)" if x_scale == "log" else ""))
        axes.set_ylabel(y_label + (" (log)" if y_scale == "log" else ""))
        axes.set_title(title, loc="left", fontsize=11)
        if len(lines) > 1:
            axes.legend(fontsize=9)
        return _to_svg(figure, title)


@dataclass(frozen=True)
class StepLine:
    """Scores of several steps with their 95 % intervals."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float] | None]
    color: str = BLUE
    marked: bool = False
    """Each value by itself with its interval as an upright line; else a curve with a band."""
    joined: bool = True


def step_chart(title: str, lines: Sequence[StepLine], *, chance: float | None = None, y_label: str = "") -> str:
    """Scores over steps; a dotted line where guessing would stand."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, axes = _figure(4.0, 2.35 + 0.17 * (len(lines) + (chance is not None)))
        for i, line in enumerate(lines):
            style: dict[str, Any] = {"linewidth": 1.3, "marker": "." if len(line.x) < 3 else None}
            if line.marked:
                style = {
                    "marker": MARKERS[i % len(MARKERS)],
                    "markersize": 4,
                    "linestyle": "-" if line.joined else "none",
                }
            axes.plot(line.x, line.y, color=line.color, label=line.label, **style)
            known = [(x, *bounds) for x, bounds in zip(line.x, line.intervals, strict=True) if bounds is not None]
            if line.marked:
                for x, low, high in known:
                    axes.plot((x, x), (low, high), color=line.color, linewidth=1.2, alpha=0.6)
            elif known:
                at, lows, highs = zip(*known, strict=True)
                axes.fill_between(at, lows, highs, color=line.color, alpha=0.14, linewidth=0)
        if chance is not None:
            axes.axhline(chance, color=INK, linestyle=":", linewidth=1.2, label="chance")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left", fontsize=11)
        figure.legend(fontsize=8, loc="outside lower left")
        return _to_svg(figure, title)


def score_chart(
    title: str,
    bars: Sequence[Bar],
    *,
    limits: tuple[float, float] = (0, 1),
    x_label: str = "score with 95 % interval (blue); chance (dashed)",
    width: float = 8.2,
) -> str:
    """Scores as points with their 95 % interval; a dashed tick where guessing would stand."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, axes = _figure(width, 0.8 + 0.36 * len(bars))
        for row, bar in enumerate(reversed(bars)):
            if bar.interval is not None:
                axes.plot(bar.interval, (row, row), color=BLUE, linewidth=2, solid_capstyle="butt")
                axes.plot(bar.interval, (row, row), color=BLUE, linestyle="none", marker="|", markersize=9)
            axes.plot((bar.value,), (row,), color=BLUE, marker="o", markersize=6)
            if bar.chance is not None:
                axes.plot((bar.chance, bar.chance), (row - 0.36, row + 0.36), color=VERMILLION, linestyle="--")
        axes.set_yticks(range(len(bars)), [bar.label for bar in reversed(bars)])
        axes.set_ylim(-0.6, len(bars) - 0.4)
        axes.set_xlim(*limits)
        axes.set_xlabel(x_label)
        axes.set_title(title, loc="left", fontsize=11)
        return _to_svg(figure, title)


def bar_chart(title: str, bars: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars, each with its number."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title, "axes.grid.axis": "x"}):
        figure, axes = _figure(8.2, 0.8 + 0.28 * len(bars))
        rows = range(len(bars) - 1, -1, -1)
        axes.barh(rows, [value for _, value in bars], color=BLUE, height=0.66)
        for row, (_, value) in zip(rows, bars, strict=True):
            axes.annotate(f"{value:,.0f}", (value, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(rows, [label for label, _ in bars])
        axes.set_axisbelow(True)
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(title, loc="left", fontsize=11)
        return _to_svg(figure, title)


def histogram(title: str, values: Sequence[float], edges: tuple[float, float], n_bins: int) -> str:
    """How many values lie in each of `n_bins` equal parts between the edges; the last part has its end as well."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title, "axes.grid.axis": "y"}):
        figure, axes = _figure(4.4, 2.7)
        axes.hist(values, bins=n_bins, range=edges, color=BLUE, rwidth=0.92)
        axes.set_xlim(*edges)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("points")
        axes.set_ylabel("answers")
        axes.set_title(title, loc="left", fontsize=11)
        return _to_svg(figure, title)


@dataclass(frozen=True)
class Family:
    """Published models of one kind: a curve over their sizes."""

    label: str
    parameters: Sequence[float]
    values: Sequence[float]


def size_chart(title: str, families: Sequence[Family], ours: Bar, parameters: float, *, y_label: str) -> str:
    """Scores over the number of parameters: others' as curves, ours as a star with its interval."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, axes = _figure(5.6, 3.0)
        for i, family in enumerate(families):
            axes.plot(
                family.parameters,
                family.values,
                color=PALETTE[(i + 1) % len(PALETTE)],  # the first one is ours
                marker=MARKERS[i % len(MARKERS)],
                markersize=4.5,
                linewidth=1.0,
                label=family.label,
            )
        if ours.interval is not None:
            axes.plot((parameters, parameters), ours.interval, color=BLUE, linewidth=2)
        axes.plot(
            (parameters,), (ours.value,), color=BLUE, marker="*", markersize=15, linestyle="none", label=ours.label
        )
        if ours.chance is not None:
            axes.axhline(ours.chance, color=INK, linestyle=":", linewidth=1)
            axes.annotate(
                "chance", (1, ours.chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
        axes.set_xscale("log")
        sizes = [parameters, *(size for family in families for size in family.parameters)]
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if max(sizes) < 3e3 * min(sizes) else (1,)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("parameters (log)")
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _to_svg(figure, title)


def heat_color(value: float | None, chance: float | None) -> str:
    """Background of a heat map's cell: blue above chance, vermillion below, fainter the nearer.

    Both are seen apart by colour-blind readers, on white and on black; the number stands in the cell as well.
    """
    if value is None:
        return "transparent"
    middle = 0.5 if chance is None else chance
    away = (value - middle) / max(middle, 1 - middle)
    rgb = "0 114 178" if away >= 0 else "213 94 0"
    return f"rgb({rgb} / {min(0.75, abs(away)):.2f})"


def line_values(lines: Sequence[Line], *, of_x: bool) -> list[float]:
    """All values of one axis."""
    return [value for line in lines for value in (line.x if of_x else line.y)]


def _log_ticks(axis: Any, values: Sequence[float]) -> None:
    """1, 2, 5 over few decades; powers of ten with their SI prefix over many."""
    if max(values) > 1e4 * min(values):
        axis.set_major_locator(LogLocator(subs=(1,)))
        axis.set_major_formatter(EngFormatter(sep=""))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(EngFormatter(sep="") if max(values) >= 1000 else FuncFormatter(_plain_number))


def _plain_number(value: float, _position: int) -> str:
    return f"{value:g}"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _to_svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, color in _PAGE_COLORS.items():
        svg = svg.replace(stand_in, color)
    prefix = re.sub(r"\W+", "-", title.lower()).strip("-")
    # Several charts share a page: element ids must differ between them.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{prefix}" ', 1)

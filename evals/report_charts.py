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
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#666666"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, "#56B4E9", "#000000")

_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar in a task's name is a dollar
    "svg.fonttype": "none",  # text stays text: selectable, and drawn with the page's fonts
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
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
    width: float = 4.0,
) -> str:
    """Curves over optimizer steps; `width` in inches of a page of about ten."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, axes = _figure(width, 2.7)
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=line.color,
                linewidth=1.6 if line.points else 1.1,
                marker="o" if line.points or len(line.x) < 3 else None,
                markersize=3.5,
                label=line.label,
            )
        axes.set_xscale(x_scale)
        axes.set_yscale(y_scale)
        for axis, scale in ((axes.xaxis, x_scale), (axes.yaxis, y_scale)):
            if scale == "log":
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(FuncFormatter(_plain_number))
                axis.set_minor_formatter(NullFormatter())
        if x_scale == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if y_scale == "linear" and max((abs(value) for line in lines for value in line.y), default=0) >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step" + (" (log)" if x_scale == "log" else ""))
        axes.set_ylabel(y_label + (" (log)" if y_scale == "log" else ""))
        axes.set_title(title, loc="left", fontsize=11)
        if len(lines) > 1:
            axes.legend(fontsize=9)
        return _to_svg(figure, title)


def score_chart(title: str, bars: Sequence[Bar]) -> str:
    """Scores from 0 to 1 as points with their 95 % interval; a dashed tick where guessing would stand."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, axes = _figure(8.2, 0.8 + 0.36 * len(bars))
        for row, bar in enumerate(reversed(bars)):
            if bar.interval is not None:
                axes.plot(bar.interval, (row, row), color=BLUE, linewidth=2, solid_capstyle="butt")
                axes.plot(bar.interval, (row, row), color=BLUE, linestyle="none", marker="|", markersize=9)
            axes.plot((bar.value,), (row,), color=BLUE, marker="o", markersize=6)
            if bar.chance is not None:
                axes.plot((bar.chance, bar.chance), (row - 0.36, row + 0.36), color=VERMILLION, linestyle="--")
        axes.set_yticks(range(len(bars)), [bar.label for bar in reversed(bars)])
        axes.set_ylim(-0.6, len(bars) - 0.4)
        axes.set_xlim(0, 1)
        axes.set_xlabel("score with 95 % interval (blue); chance (dashed)")
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
    prefix = re.sub(r"\W+", "-", title.lower()).strip("-")
    # Several charts share a page: element ids must differ between them.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{prefix}" ', 1)

"""A plot as inline SVG for the report's page, drawn by matplotlib.

Matplotlib writes colors as hex values and fonts by name. The page has a light and a dark theme and its own font, so
the colors here are placeholders that become CSS variables (`--s0`, `--soft`, `--rule`), and text stays text without a
font family. Ids are dropped or made unique per figure, because many figures share one page. No text from a run folder
enters a plot: titles are above it in HTML, where they are escaped. Its values stand beside it as JSON, escaped too:
`hover.js` shows those under the pointer.
"""

import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .._outside import visible_line
from .runs import PERCENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_COLORS = 6
LINES = ("solid", "dashed", "dotted")  # the seventh series has the first one's color, dashed

# Colors that occur nowhere else in the SVG, in place of CSS variables.
SERIES = [f"#0a0b0{i}" for i in range(N_COLORS)]
TEXT = "#0a0c00"
RULE = "#0a0c01"

SCALE = {"peak_memory": (1e-9, " GB"), **dict.fromkeys(PERCENT, (100.0, " %"))}
DPI = 72  # that of SVG, where an inch has 72 units

# How the curves of each style are drawn.
STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "faint": {"linewidth": 0.9, "alpha": 0.25},
    "marks": {"linewidth": 1.2, "marker": "o", "markersize": 4.2},
    "dashed": {"linewidth": 1.2, "marker": "o", "markersize": 4.2, "linestyle": (0, (4, 2.5))},
    "stored": {"linestyle": "none", "marker": "o", "markersize": 9.5, "fillstyle": "none", "markeredgewidth": 1.4},
}
# What becomes of matplotlib's SVG in a page: patterns, each with its replacement.
REPLACEMENTS = [
    ("xlink:href", "href"),
    (r' (?:xmlns(?::\w+)?|version)="[^"]*"', ""),
    # The page decides on size and font.
    (r'(<svg[^>]*?) height="[^"]*"', r"\1"),
    (r'(<svg[^>]*?) width="[^"]*"', r"\1"),
    (r'<g id="[^"]*"', "<g"),
    (r"font: ([\d.]+px)[^;\"]*", r"font-size: \1"),
    (r" font-family: [^;\"]*;?", ""),
    # Its colors follow the reader's theme.
    *((color, f"var(--s{i})") for i, color in enumerate(SERIES)),
    (TEXT, "var(--soft)"),
    (RULE, "var(--rule)"),
    (r"\n\s*", "\n"),
]

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    series: int  # its number, which gives it color and line style
    points: Sequence[Point]
    style: str = "line"  # of `STYLES`: "faint" behind its moving average, "marks" where its points are few
    name: str = ""  # by which the pointer shows its values; without one it does not
    halves: Sequence[float] = ()  # of the intervals around the points, where there are some


def legend_line(series: int) -> str:
    """The HTML of a series' line in legends."""
    return f'<i class="line" style="--c: {_css_line(series)}"></i>'


def _css_line(series: int) -> str:
    return f"{LINES[series // N_COLORS % len(LINES)]} var(--s{series % N_COLORS})"


def figure(
    name: str,
    title: str,
    curves: Sequence[Curve],
    note: str,
    *,
    full: bool,
    number: int,
    over: str,
    limits: tuple[float | None, float | None],
) -> str:
    """A <figure> of curves by `over`. The note follows the title, which is escaped. `limits` are those of the y-axis.

    `number` makes the ids in figures of one name unique on the page. ValueError where matplotlib is missing.
    """
    inches = (11.0, 3.3) if full else (5.3, 2.3)
    svg, values = _draw(name, curves, inches, f"{visible_line(name)}{number}", over, limits)
    attribute = ' class="full"' if full else ""
    plot = (
        f'<div class="plot" role="img" tabindex="0" aria-label="{title} by {over}" data-values="{values}">{svg}</div>'
    )
    return f"<figure{attribute}><figcaption><b>{title}</b> {note}</figcaption>{plot}</figure>"


def _draw(
    name: str,
    curves: Sequence[Curve],
    inches: tuple[float, float],
    salt: str,
    over: str,
    limits: tuple[float | None, float | None],
) -> tuple[str, str]:
    """The curves as an SVG element, and their values as escaped JSON."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("report: its plots need matplotlib; pip install handtune[plot]") from None

    factor, unit = SCALE.get(name, (1.0, ""))
    # Text stays text, so that it can be searched for and has the page's font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}):
        drawing = Figure(figsize=inches, dpi=DPI, layout="constrained")
        axes = drawing.add_subplot()
        for curve in curves:
            x, y = _scaled(curve, factor)
            axes.plot(x, y, **_line_style(curve))
        _set_axes(axes, over, unit, factor, limits)

        # Intervals of few seeds are wide: what leaves the plot is cut off, and does not squash the curves.
        x_limits, y_limits = axes.get_xlim(), axes.get_ylim()
        for curve in curves:
            if curve.halves:
                x, y = _scaled(curve, factor)
                below = [value - factor * half for value, half in zip(y, curve.halves, strict=True)]
                above = [value + factor * half for value, half in zip(y, curve.halves, strict=True)]
                axes.fill_between(x, below, above, color=SERIES[curve.series % N_COLORS], alpha=0.15, linewidth=0)
        axes.set_xlim(x_limits)
        axes.set_ylim(y_limits)

        # Without a date and a version, the same runs give the same bytes.
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
        values = _values(axes, curves, factor, unit, over, inches[1] * DPI)
    return _inline(buffer.getvalue()), html.escape(json.dumps(values, separators=(",", ":")))


def _scaled(curve: Curve, factor: float) -> tuple[list[float], list[float]]:
    """The curve's steps and values, in the unit of its axis."""
    return [step for step, _ in curve.points], [value * factor for _, value in curve.points]


def _set_axes(axes: "Axes", over: str, unit: str, factor: float, limits: tuple[float | None, float | None]) -> None:
    """No frame, and only horizontal rules: the page's design."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.tick_params(colors=TEXT, length=0, pad=5)
    axes.set_xlabel(over, color=TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(partial(_tick, ""))
    axes.yaxis.set_major_formatter(partial(_tick, unit))
    bottom, top = (None if limit is None else limit * factor for limit in limits)
    axes.set_ylim(bottom, top)


def _values(
    axes: "Axes", curves: Sequence[Curve], factor: float, unit: str, over: str, height: float
) -> dict[str, Any]:
    """What `hover.js` needs: the curves that have a name, and where steps and values lie in the drawing.

    A step s lies at x[0] + x[1] · s, a value v at y[0] + y[1] · v, in the units of the SVG, whose y grows downwards.
    """
    (x0, y0), (x1, y1) = axes.transData.transform([(0, 0), (1, 1)]).tolist()
    bottom, top = axes.get_ylim()
    shown = []
    for curve in curves:
        if curve.name:
            steps, values = _scaled(curve, factor)
            rounded = [float(f"{value:.5g}") for value in values]
            halves = [float(f"{factor * half:.3g}") for half in curve.halves]
            shown.append({"name": visible_line(curve.name), "line": _css_line(curve.series), "steps": steps,
                          "values": rounded, "halves": halves})  # fmt: skip
    return {
        "over": over.partition(" ")[0], "unit": unit, "x": [x0, x1 - x0], "y": [height - y0, y0 - y1],
        "bottom": bottom, "top": top, "curves": shown,
    }  # fmt: skip


def _tick(unit: str, value: float, position: float) -> str:
    """A number at an axis: 1,250 or 3e−5, with the unit."""
    text = f"{value:,.6g}"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return f"{text}{unit}".replace("-", "−")


def _line_style(curve: Curve) -> dict[str, Any]:
    """How matplotlib draws a curve."""
    line = LINES[curve.series // N_COLORS % len(LINES)]
    color = SERIES[curve.series % N_COLORS]
    return {"color": color, "linestyle": line, "solid_joinstyle": "round", **STYLES[curve.style]}


def _inline(svg: str) -> str:
    """An SVG file as an element of an HTML page."""
    svg = svg[svg.index("<svg") :]  # without the XML header
    for pattern, replacement in REPLACEMENTS:
        svg = re.sub(pattern, replacement, svg)
    return svg

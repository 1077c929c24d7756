"""Plots of run folders as inline SVG for the report's page, drawn by matplotlib.

Matplotlib writes colors as hex values and fonts by name. The page has a light and a dark theme and its own font, so
the colors here are placeholders that become CSS variables (`--s0`, `--soft`, `--rule`), and text stays text without a
font family. Ids are dropped or made unique per figure, because many figures share one page. No text from a run folder
enters a plot: titles are above it in HTML, where they are escaped.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .._outside import visible_line
from .runs import PERCENT, Row, Run, metric_name

N_COLORS = 6
LINES = ("solid", "dashed", "dotted")  # the seventh run has the first one's color, dashed

# Colors that occur nowhere else in the SVG, in place of CSS variables.
SERIES = [f"#0a0b0{i}" for i in range(N_COLORS)]
TEXT = "#0a0c00"
RULE = "#0a0c01"

NOT_PLOTTED = {"step", "epoch", "loss", "targets", "tokens", "images", "episodes", "seconds"}
NOISY = {"grad_norm", "tokens_per_second", "images_per_second"}  # drawn with their moving average, like the loss
FROM_ZERO = {"lr", "peak_memory", *NOISY}  # amounts: an axis cut off below would exaggerate
SCALE = {"peak_memory": (1e-9, " GB"), **dict.fromkeys(PERCENT, (100.0, " %"))}
MAX_POINTS = 1500  # more than this in one curve makes the page heavy and shows nothing new

# How the curves of each style are drawn.
STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "faint": {"linewidth": 0.9, "alpha": 0.25},
    "marks": {"linewidth": 1.2, "marker": "o", "markersize": 4.2},
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

    run: int  # the number of its run, which gives it color and line style
    points: list[Point]
    style: str = "line"  # of `STYLES`: "faint" behind its moving average, "marks" where its points are few


def loss_figures(runs: Sequence[Run]) -> list[str]:
    """Training loss, raw and smoothed, with the evaluation loss of the same run on top; no figure without a step."""
    curves = [curve for i, run in enumerate(runs) for curve in _noisy(i, _points(run.steps, "loss"))]
    curves += [Curve(i, _points(run.evals, "loss"), "marks") for i, run in enumerate(runs)]
    styles = {curve.style for curve in curves if curve.points}
    meanings = {"faint": "faint: as logged, line: moving average", "marks": "dots: evaluation"}
    note = "; ".join(meaning for style, meaning in meanings.items() if style in styles)
    return _figure("loss", curves, note=note, full=True)


def frontier_figures(runs: Sequence[Run]) -> list[str]:
    """Score over KL, round by round."""
    curves = []
    for i, run in enumerate(runs):
        rows = [row for row in run.steps if is_number(row.get("kl")) and is_number(row.get("score"))]
        points = [(row["kl"], row["score"]) for row in rows]
        curves += _noisy(i, sorted(points))
    over = "KL from the reference, nats a completion"
    return _figure("score", curves, note="round by round", full=True, number=1, over=over)


def legend_line(run: int) -> str:
    """The HTML of a run's line in legends."""
    line = LINES[run // N_COLORS % len(LINES)]
    return f'<i class="line" style="--c: {line} var(--s{run % N_COLORS})"></i>'


def figure_per_key(runs: list[list[Row]], style: str) -> list[str]:
    """A figure for each name that occurs in the rows of any run."""
    names = dict.fromkeys(name for rows in runs for row in rows for name in row if name not in NOT_PLOTTED)
    figures: list[str] = []
    for name in names:
        curves = []
        for i, rows in enumerate(runs):
            points = _points(rows, name)
            curves += _noisy(i, points) if name in NOISY else [Curve(i, points, style)]
        figures += _figure(name, curves, number=len(figures))
    return figures


def _noisy(run: int, points: list[Point]) -> list[Curve]:
    """The points behind their moving average; alone where they are too few for one."""
    if len(points) < 20:
        return [Curve(run, points)]
    return [Curve(run, points, "faint"), Curve(run, _smooth(points))]


def _points(rows: Sequence[Row], name: str) -> list[Point]:
    """(step, value) of the rows in which `name` is a finite number, thinned to the extremes of short stretches."""
    points = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    if stretch <= 2:
        return points

    # The extremes, because means would hide the spikes.
    thinned: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        thinned += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return thinned


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a twentieth of the run, without the bias towards its first value."""
    decay = 1 - 2 / (max(5, len(points) / 20) + 1)
    total = 0.0
    weight = 0.0  # what the values so far count in the total; dividing by it removes the bias
    smoothed = []
    for step, value in points:
        total = decay * total + value
        weight = decay * weight + 1
        smoothed.append((step, total / weight))
    return smoothed


def _figure(
    name: str, curves: list[Curve], note: str = "", full: bool = False, number: int = 0, over: str = "step"
) -> list[str]:
    """A <figure> in a list, or an empty list where no curve has a point. The note follows the title."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return []
    title = html.escape(visible_line(metric_name(name)))
    inches = (11.0, 3.3) if full else (5.3, 2.3)
    svg = _draw(name, curves, inches, f"{visible_line(name)}{number}", over)
    attribute = ' class="full"' if full else ""
    caption = f"<figcaption><b>{title}</b> {note}</figcaption>"
    return [f'<figure{attribute}>{caption}<div role="img" aria-label="{title} by {over}">{svg}</div></figure>']


def _draw(name: str, curves: list[Curve], inches: tuple[float, float], salt: str, over: str) -> str:
    """The curves as an SVG element. `salt` makes the ids in it unique on the page."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        raise ValueError("report: its plots need matplotlib; pip install handtune[plot]") from None

    factor, unit = SCALE.get(name, (1.0, ""))
    # Text stays text, so that it can be searched for and has the page's font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            x = [step for step, _ in curve.points]
            y = [value * factor for _, value in curve.points]
            axes.plot(x, y, **_line_style(curve))

        # No frame, and only horizontal rules: the page's design.
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.tick_params(colors=TEXT, length=0, pad=5)
        axes.set_xlabel(over, color=TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(partial(_tick, ""))
        axes.yaxis.set_major_formatter(partial(_tick, unit))
        if name in FROM_ZERO:
            axes.set_ylim(bottom=0)

        # Without a date and a version, the same runs give the same bytes.
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _inline(buffer.getvalue())


def _tick(unit: str, value: float, position: float) -> str:
    """A number at an axis: 1,250 or 3e−5, with the unit."""
    text = f"{value:,.6g}"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return f"{text}{unit}".replace("-", "−")


def _line_style(curve: Curve) -> dict[str, Any]:
    """How matplotlib draws a curve."""
    line = LINES[curve.run // N_COLORS % len(LINES)]
    color = SERIES[curve.run % N_COLORS]
    return {"color": color, "linestyle": line, "solid_joinstyle": "round", **STYLES[curve.style]}


def _inline(svg: str) -> str:
    """An SVG file as an element of an HTML page."""
    svg = svg[svg.index("<svg") :]  # without the XML header
    for pattern, replacement in REPLACEMENTS:
        svg = re.sub(pattern, replacement, svg)
    return svg

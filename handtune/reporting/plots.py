"""Plots of run folders as inline SVG for the report's page, drawn by matplotlib.

Matplotlib writes colours as hex values and fonts by name. The page has a light and a dark theme and its own font, so
the colours are stand-ins that become CSS variables (`--s0`, `--soft`, `--rule`), and text stays text without a family.
Ids are dropped or made unique per figure, since many figures share one page. No text from a run folder enters a plot:
titles stand above it in HTML, where they are escaped.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .._outside import visible_line
from .runs import PERCENT, Row, Run, metric_name

N_COLOURS = 6
LINES = ("solid", "dashed", "dotted")  # the seventh run has the first one's colour, dashed

SERIES = [f"#0a0b0{i}" for i in range(N_COLOURS)]
TEXT, RULE = "#0a0c00", "#0a0c01"

NOT_PLOTTED = {"step", "epoch", "loss", "targets", "tokens", "images", "episodes", "seconds"}
NOISY = {"grad_norm", "tokens_per_second", "images_per_second"}  # drawn with their moving average, as the loss is
FROM_ZERO = {"lr", "peak_memory", *NOISY}  # amounts: an axis cut off below would exaggerate
SCALE = {"peak_memory": (1e-9, " GB"), **dict.fromkeys(PERCENT, (100.0, " %"))}
MAX_POINTS = 1500  # more than this in one curve makes the page heavy and shows nothing new

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a plot. kind: "line", "faint" (behind its moving average), or "marks" (its few points are marked)."""

    run: int
    points: list[Point]
    kind: str = "line"


def loss_figures(runs: Sequence[Run]) -> list[str]:
    """Training loss, raw and smoothed, with the evaluation loss of the same run on top; no figure without a step."""
    curves = [curve for i, run in enumerate(runs) for curve in _noisy(i, _points(run.steps, "loss"))]
    curves += [Curve(i, _points(run.evals, "loss"), "marks") for i, run in enumerate(runs)]
    drawn = {curve.kind for curve in curves if curve.points}
    said = ["faint: as logged, line: moving average"] if "faint" in drawn else []
    said += ["dots: evaluation"] if "marks" in drawn else []
    return _figure("loss", curves, note="; ".join(said), full=True)


def evaluation_figures(runs: Sequence[Run]) -> list[str]:
    """One figure for each metric that was evaluated (the loss has its own)."""
    return _figure_per_key([run.evals for run in runs], "marks")


def frontier_figures(runs: Sequence[Run]) -> list[str]:
    """Score over KL, round by round, with what choosing the best of n samples of the reference gives beside it."""
    curves = []
    for i, run in enumerate(runs):
        rows = [row for row in run.steps if is_number(row.get("kl")) and is_number(row.get("score"))]
        points = [(row["kl"], row["score"]) for row in rows]
        curves += _noisy(i, sorted(points))
        curves.append(Curve(i, [(kl, score) for _, kl, score in run.info.get("best_of") or []], "marks"))
    beside = any(run.info.get("best_of") for run in runs)
    note = "round by round" + ("; marked: the best of 1, 2, 4, ... samples of the reference" * beside)
    return _figure("score", curves, note=note, full=True, number=1, over="KL from the reference, nats a completion")


def training_figures(runs: Sequence[Run]) -> list[str]:
    """One figure for each number that was logged with the steps: learning rate, tokens per second, peak memory, ..."""
    return _figure_per_key([run.steps for run in runs], "line")


def legend_line(run: int) -> str:
    """The HTML of a run's line in legends."""
    style = LINES[run // N_COLOURS % len(LINES)]
    return f'<i class="line" style="--c: {style} var(--s{run % N_COLOURS})"></i>'


def _figure_per_key(rows: list[list[Row]], kind: str) -> list[str]:
    names = dict.fromkeys(name for run in rows for row in run for name in row if name not in NOT_PLOTTED)
    figures: list[str] = []
    for name in names:
        points = [_points(run, name) for run in rows]
        curves = [curve for i in range(len(rows)) for curve in _noisy(i, points[i])] if name in NOISY else []
        curves = curves or [Curve(i, points[i], kind) for i in range(len(rows))]
        figures += _figure(name, curves, number=len(figures))
    return figures


def _noisy(run: int, points: list[Point]) -> list[Curve]:
    """The points behind their moving average; alone where they are too few for one."""
    return [Curve(run, points, "faint"), Curve(run, _smooth(points))] if len(points) >= 20 else [Curve(run, points)]


def _points(rows: Sequence[Row], name: str) -> list[Point]:
    """(step, value) of the rows that have a finite number there, thinned to each stretch's extremes."""
    points = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    if stretch <= 2:
        return points
    thinned: list[Point] = []
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        thinned += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return thinned


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a twentieth of the run, without the bias towards its first value."""
    keep = 1 - 2 / (max(5, len(points) / 20) + 1)
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append((step, total / weight))
    return smoothed


def _figure(
    name: str, curves: list[Curve], note: str = "", full: bool = False, number: int = 0, over: str = "step"
) -> list[str]:
    """A <figure> in a list, or nothing where no curve has a point. The note follows the title."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return []
    title = html.escape(visible_line(metric_name(name)))
    drawn = _draw(name, curves, (11.0, 3.3) if full else (5.3, 2.3), f"{visible_line(name)}{number}", over)
    kind = ' class="full"' if full else ""
    caption = f"<figcaption><b>{title}</b> {note}</figcaption>"
    return [f'<figure{kind}>{caption}<div role="img" aria-label="{title} by {over}">{drawn}</div></figure>']


def _draw(name: str, curves: list[Curve], inches: tuple[float, float], salt: str, over: str) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        raise ValueError("report: its plots need matplotlib; pip install handtune[plot]") from None
    factor, unit = SCALE.get(name, (1.0, ""))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            x, y = [p[0] for p in curve.points], [p[1] * factor for p in curve.points]
            axes.plot(x, y, **_style(curve))
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.tick_params(colors=TEXT, length=0, pad=5)
        axes.set_xlabel(over, color=TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(_ticks(""))
        axes.yaxis.set_major_formatter(_ticks(unit))
        if name in FROM_ZERO:
            axes.set_ylim(bottom=0)
        buffer = io.StringIO()
        unnamed = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unnamed)
    return _inline(buffer.getvalue())


def _ticks(unit: str) -> Callable[[float, float], str]:
    def written(value: float, position: float) -> str:
        if 0 < abs(value) < 1e-3 or abs(value) >= 1e7:
            mantissa, _, exponent = f"{value:.6e}".partition("e")
            return f"{float(mantissa):g}e{int(exponent)}{unit}"
        return f"{value:,.6g}{unit}"

    return lambda value, position: written(value, position).replace("-", "−")


def _style(curve: Curve) -> dict[str, Any]:
    line = LINES[curve.run // N_COLOURS % len(LINES)]
    style = {"color": SERIES[curve.run % N_COLOURS], "linestyle": line, "linewidth": 1.6, "solid_joinstyle": "round"}
    if curve.kind == "faint":
        style |= {"alpha": 0.25, "linewidth": 0.9}
    if curve.kind == "marks":
        style |= {"marker": "o", "markersize": 4.2, "linewidth": 1.2}
    return style


def _inline(svg: str) -> str:
    """An SVG file as an element of an HTML page."""
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg))
    for i, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--s{i})")
    return re.sub(r"\n\s*", "\n", svg.replace(TEXT, "var(--soft)").replace(RULE, "var(--rule)"))

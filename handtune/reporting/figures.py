"""Which plots a report has, and the curves in them: losses, evaluations, and what was logged of training.

A series of several runs, which differ only in their seed, is drawn as the mean of their curves, with a band as wide as
the 95 % confidence interval, in front of the runs themselves.
"""

import html
import math
from collections.abc import Sequence

from .._outside import visible_line
from .plots import Curve, Point, figure
from .runs import Row, Run, is_number, metric_name, stored_step
from .seeds import Series, interval

NOT_PLOTTED = {"step", "epoch", "loss", "targets", "tokens", "images", "episodes", "seconds"}
SPEEDS = {"tokens_per_second", "images_per_second"}
NOISY = {"grad_norm", *SPEEDS}  # drawn with their moving average, like the loss
FROM_ZERO = {"lr", "peak_memory", *NOISY}  # amounts: an axis cut off below would exaggerate
MAX_POINTS = 1500  # more than this in one curve makes the page heavy and shows nothing new
FEWEST_TO_SMOOTH = 20

# Where the axis of a noisy curve ends, so that a few outliers don't squash all others: above a quantile of its values.
QUANTILE = 0.95
HEADROOM = 1.25


def loss_figures(all_series: Sequence[Series]) -> list[str]:
    """Training loss, raw and smoothed, with the evaluation loss of the same run on top; no figure without a step."""
    curves = []
    for i, series in enumerate(all_series):
        name = f"{series.name}, " if len(all_series) > 1 else ""
        curves += _noisy(i, f"{name}training", [_points(run.steps, "loss") for run in series.runs])
    for i, series in enumerate(all_series):
        name = f"{series.name}, " if len(all_series) > 1 else ""
        curves += _evaluations(i, f"{name}evaluation", series, "loss", "dashed")
    meanings = {"faint": "faint: as logged, line: moving average", "dashed": "dashed: evaluation"}
    return _figure("loss", curves, meanings, full=True)


def frontier_figures(all_series: Sequence[Series]) -> list[str]:
    """Score over KL, round by round."""
    curves = []
    for i, series in enumerate(all_series):
        for run in series.runs:
            rows = [row for row in run.steps if is_number(row.get("kl")) and is_number(row.get("score"))]
            points = [(row["kl"], row["score"]) for row in rows]
            curves += _noisy(i, series.name, [sorted(points)])
    over = "KL from the reference, nats a completion"
    return _figure("score", curves, {"": "round by round"}, full=True, number=1, over=over)


def evaluation_figures(all_series: Sequence[Series]) -> list[str]:
    """A figure for each metric of the evaluations but the loss, which has its own."""
    figures: list[str] = []
    for name in _names([run.evals for series in all_series for run in series.runs]):
        curves = []
        for i, series in enumerate(all_series):
            curves += _evaluations(i, series.name, series, name, "marks")
        figures += _figure(name, curves, {}, number=len(figures))
    return figures


def training_figures(all_series: Sequence[Series]) -> list[str]:
    """A figure for each number that the steps have logged: learning rate, tokens per second, ..."""
    figures: list[str] = []
    for name in _names([run.steps for series in all_series for run in series.runs]):
        curves = []
        for i, series in enumerate(all_series):
            points = [_points(run.steps, name) for run in series.runs]
            curves += _noisy(i, series.name, points) if name in NOISY else _together(i, series.name, points, "line")
        figures += _figure(name, curves, {}, number=len(figures))
    return figures


def _names(runs: list[list[Row]]) -> list[str]:
    """The names that occur in the rows of any run, in their order."""
    return list(dict.fromkeys(name for rows in runs for row in rows for name in row if name not in NOT_PLOTTED))


# Curves


def _evaluations(i: int, name: str, series: Series, metric: str, style: str) -> list[Curve]:
    """A metric by step; of a single run, the evaluation of the weights that it has stored is marked."""
    points = [_points(run.evals, metric) for run in series.runs]
    stored = _stored_points(series.runs[0], points[0]) if len(series.runs) == 1 else []
    return [*_together(i, name, points, style), Curve(i, stored, "stored")]


def _stored_points(run: Run, points: list[Point]) -> list[Point]:
    step = stored_step(run)
    return [point for point in points if point[0] == step]


def _noisy(i: int, name: str, runs: list[list[Point]]) -> list[Curve]:
    """The points of each run behind the moving average; alone where they are too few for one."""
    if max(map(len, runs)) < FEWEST_TO_SMOOTH:
        return _together(i, name, runs, "line")
    smooth = _together(i, "" if len(runs) == 1 else name, [_smooth(points) for points in runs], "line")
    # What was logged is what the pointer asks for; of several runs, their mean.
    faint = [Curve(i, _thinned(points), "faint", name if len(runs) == 1 else "") for points in runs]
    return [*faint, *(curve for curve in smooth if curve.style != "faint")]


def _together(i: int, name: str, runs: list[list[Point]], style: str) -> list[Curve]:
    """The curve of one run; of several their mean at the steps that all have, with its interval, in front of them."""
    if len(runs) == 1:
        return [Curve(i, _thinned(runs[0]), style, name)]

    by_step = [dict(points) for points in runs]
    common = sorted(set.intersection(*map(set, by_step)))
    points = []
    halves = []
    for step in common:
        over_seeds = interval([values[step] for values in by_step])
        if over_seeds is not None:
            points.append((step, over_seeds.mean))
            halves.append(over_seeds.half)

    # Thinned after the mean, because each run has its extremes at other steps.
    kept = _drawn(points)
    mean = Curve(i, [points[k] for k in kept], style, name, [halves[k] for k in kept])
    return [*(Curve(i, _thinned(each), "faint") for each in runs), mean]


def _points(rows: Sequence[Row], name: str) -> list[Point]:
    """(step, value) of the rows in which `name` is a finite number."""
    return [(row["step"], row[name]) for row in rows if is_number(row.get(name))]


def _thinned(points: Sequence[Point]) -> list[Point]:
    return [points[k] for k in _drawn(points)]


def _drawn(points: Sequence[Point]) -> list[int]:
    """Which of the points are drawn: all, or of many the extremes of short stretches, as means would hide spikes."""
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    if stretch <= 2:
        return list(range(len(points)))

    kept: list[int] = []
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        kept += sorted({min(part, key=lambda k: points[k][1]), max(part, key=lambda k: points[k][1])})
    return kept


def _value(point: Point) -> float:
    return point[1]


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


# Figures


def _figure(
    name: str, curves: list[Curve], meanings: dict[str, str], full: bool = False, number: int = 0, over: str = "step"
) -> list[str]:
    """A <figure> in a list, or an empty list where no curve has a point.

    `meanings` says what the styles that occur mean, and under "" what is always said.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return []
    styles = {"", *(curve.style for curve in curves)}
    notes = [meaning for style, meaning in meanings.items() if style in styles]
    if full and any(curve.halves for curve in curves):  # a small plot has no room to say it again
        notes = ["line: mean over seeds, band: its 95 % interval, faint: each seed", *notes[1:]]
    if "stored" in styles:
        notes.append("ring: the stored weights")

    # An axis for all values but the highest few.
    top = robust_top(curves) if name in NOISY else None
    if top is not None:
        beyond = sum(value > top for curve in curves if curve.style == "faint" for _, value in curve.points)
        notes.append(f"{beyond} beyond the axis")
    bottom = 0 if name in FROM_ZERO else None

    title = html.escape(visible_line(metric_name(name)))
    return [figure(name, title, curves, "; ".join(notes), full=full, number=number, over=over, limits=(bottom, top))]


def robust_top(curves: Sequence[Curve]) -> float | None:
    """Where the axis of noisy curves ends; None where all values end about there anyway."""
    values = [sorted(map(_value, curve.points)) for curve in curves if curve.style == "faint"]
    if not values:
        return None
    top = HEADROOM * max(each[int(QUANTILE * (len(each) - 1))] for each in values if each)
    return top if 0 < top < max(each[-1] for each in values if each) else None

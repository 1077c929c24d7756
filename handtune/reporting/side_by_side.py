"""Runs side by side, a line a run: as text for the terminal, and as a table of the report's page.

Behind runs that differ only in their seed stands a line with their means, and 95 % confidence intervals.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .._outside import visible_line
from ..engine.tasks.metrics import LOWER_IS_BETTER
from .plots import legend_line
from .runs import costs, is_number, main_metrics, metric_name, read_runs, score, trained, trains
from .seeds import Series, interval, mean_score, series_of
from .tables import escaped, number


def comparison_table(runs: Sequence[Path]) -> str:
    """A comparison as plain text: trained parameters, main metrics before → after, and costs.

    Raises as `read_runs` does.
    """
    loaded = read_runs(runs)
    metrics = main_metrics(loaded)
    titles = [f"{metric_name(key)} (before → after)" for key in metrics]
    table = [["run", "trained", *titles, "peak memory", "time", "stored"]]
    for series in series_of(loaded):
        for run in series.runs:
            scores = [f"{score(key, run.before.get(key))} → {score(key, run.after.get(key))}" for key in metrics]
            table.append([run.name, trained(run), *scores, *costs(run)])
        if len(series.runs) > 1:
            means = [" → ".join(_means(series, key)) for key in metrics]
            table.append([series.name, "", *means, "", "", ""])

    # The first column is aligned left, numbers right.
    table = [[visible_line(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["─" * width for width in widths])
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def comparison(all_series: Sequence[Series]) -> str:
    """A row a run: what trains, each metric before and after, and the costs."""
    runs = [run for series in all_series for run in series.runs]
    metrics = main_metrics(runs)
    head = "".join(f'<th rowspan="2">{name}</th>' for name in ("run", "method", "trains"))
    head += '<th rowspan="2" class="number">trained</th>'
    head += "".join(f'<th colspan="2" class="group">{escaped(metric_name(metric))}</th>' for metric in metrics)
    head += "".join(f'<th rowspan="2" class="number">{name}</th>' for name in ("peak memory", "time", "stored"))
    second = '<th class="number">before</th><th class="number">after</th>' * len(metrics)

    best = {metric: _best(metric, [_after(series, metric) for series in all_series]) for metric in metrics}
    body = ""
    for i, series in enumerate(all_series):
        line = legend_line(i) if len(runs) > 1 else ""
        for run in series.runs:
            body += f'<tr><th scope="row">{line}{escaped(run.name)}</th><td>{escaped(run.info.get("method", "–"))}</td>'
            body += f"<td>{escaped(trains(run))}</td>{number(trained(run))}"
            for metric in metrics:
                after = run.after.get(metric)
                is_best = len(series.runs) == 1 and after is not None and after == best[metric]
                body += number(score(metric, run.before.get(metric)), " soft")
                body += number(score(metric, after), " best" if is_best else "")
            body += "".join(map(number, costs(run))) + "</tr>"

        # What all seeds come to.
        if len(series.runs) > 1:
            body += f'<tr class="mean"><th scope="row">{line}{escaped(series.name)}</th><td></td><td></td><td></td>'
            for metric in metrics:
                before, after = _means(series, metric)
                is_best = best[metric] is not None and _after(series, metric) == best[metric]
                body += number(before, " soft") + number(after, " best" if is_best else "")
            body += "<td></td>" * 3 + "</tr>"

    rows = f"<tr>{head}</tr><tr>{second}</tr>"
    table = f'<table class="comparison"><thead>{rows}</thead><tbody>{body}</tbody></table>'
    hint = ""
    if len(runs) > len(all_series):
        hint = '<p class="hint">± is the 95 % confidence interval of the mean over seeds (Student\'s t)</p>'
    return f'<div class="wide">{table}</div>{hint}'


def _means(series: Series, metric: str) -> tuple[str, str]:
    """Before and after, as means of the seeds."""
    return mean_score(metric, [run.before for run in series.runs]), mean_score(
        metric, [run.after for run in series.runs]
    )


def _after(series: Series, metric: str) -> Any:
    """What a series comes to in a metric."""
    values = [run.after.get(metric) for run in series.runs]
    if len(values) == 1:
        return values[0]
    over_seeds = interval(values)
    return None if over_seeds is None else over_seeds.mean


def _best(metric: str, values: Iterable[Any]) -> float | None:
    """The value to set in bold; none where there is nothing to compare it with."""
    finite = [value for value in values if is_number(value)]
    if len(finite) <= 1:
        return None
    return min(finite) if metric in LOWER_IS_BETTER else max(finite)

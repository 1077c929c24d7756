"""The tables of a report's page: runs side by side, confusion matrices, and configurations.

Each function returns HTML, in which everything that comes from a run folder is escaped.
"""

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

from .._outside import visible
from ..engine.tasks.metrics import LOWER_IS_BETTER
from .plots import is_number, legend_line
from .runs import Row, Run, costs, main_metrics, metric_name, score, trained, trains

MAX_CLASSES = 25  # a larger confusion matrix is unreadable, so its most frequent confusions are listed instead


def escaped(value: object) -> str:
    return html.escape(visible(value))


def _number(text: str, css_class: str = "") -> str:
    return f'<td class="number{css_class}">{text}</td>'


def comparison(runs: list[Run]) -> str:
    """A row a run: what trains, each metric before and after, and the costs."""
    metrics = main_metrics(runs)
    head = "".join(f'<th rowspan="2">{name}</th>' for name in ("run", "method", "trains"))
    head += '<th rowspan="2" class="number">trained</th>'
    head += "".join(f'<th colspan="2" class="group">{escaped(metric_name(metric))}</th>' for metric in metrics)
    head += "".join(f'<th rowspan="2" class="number">{name}</th>' for name in ("peak memory", "time", "stored"))
    second = '<th class="number">before</th><th class="number">after</th>' * len(metrics)

    best = {metric: _best(metric, [run.after.get(metric) for run in runs]) for metric in metrics}
    body = ""
    for i, run in enumerate(runs):
        line = legend_line(i) if len(runs) > 1 else ""
        body += f'<tr><th scope="row">{line}{escaped(run.name)}</th>'
        body += f"<td>{escaped(run.info.get('method', '–'))}</td><td>{escaped(trains(run))}</td>{_number(trained(run))}"
        for metric in metrics:
            after = run.after.get(metric)
            css_class = " best" if after is not None and after == best[metric] else ""
            body += _number(score(metric, run.before.get(metric)), " soft") + _number(score(metric, after), css_class)
        body += "".join(map(_number, costs(run))) + "</tr>"

    rows = f"<tr>{head}</tr><tr>{second}</tr>"
    return f'<div class="wide"><table class="comparison"><thead>{rows}</thead><tbody>{body}</tbody></table></div>'


def _best(metric: str, values: Iterable[Any]) -> float | None:
    """The value to set in bold; none where there is nothing to compare it with."""
    finite = [value for value in values if is_number(value)]
    if len(finite) <= 1:
        return None
    return min(finite) if metric in LOWER_IS_BETTER else max(finite)


def matrices(runs: list[Run]) -> str:
    tables = ""
    for run in runs:
        # Of a run that has not finished, that of the last evaluation so far.
        last = run.evals[-1] if run.evals else {}
        if confusion := run.result.get("confusion") or last.get("confusion"):
            caption = f"<b>{escaped(run.name)}</b>" if len(runs) > 1 else ""
            tables += _matrix(confusion, _class_labels(run, len(confusion)), caption)
    if not tables:
        return ""
    hint = "<p>rows: gold, columns: predicted, shade: share of the row</p>"
    return f'<h2>Confusions</h2>{hint}<div class="matrices">{tables}</div>'


def _class_labels(run: Run, n_classes: int) -> list[str]:
    labels = [escaped(label) for label in run.result.get("labels") or run.info.get("labels") or ()]
    return labels if len(labels) == n_classes else [str(i) for i in range(n_classes)]


def _matrix(counts: list[list[int]], labels: list[str], caption: str) -> str:
    """A confusion matrix of counts [gold][predicted], with the recall of each row and the precision of each column."""
    if len(counts) > MAX_CLASSES:
        return _frequent_confusions(counts, labels, caption)

    # A column more than rows counts the examples for which nothing was predicted.
    totals = [sum(column) for column in zip(*counts, strict=True)]
    head = "".join(f'<th scope="col">{label}</th>' for label in [*labels, "nothing"][: len(totals)])
    body = ""
    for i, row in enumerate(counts):
        # The shade ends at 60 %, so that the number stays readable.
        cells = "".join(f'<td class="cell" style="--share: {60 * n / max(1, sum(row)):.0f}%">{n:,}</td>' for n in row)
        body += f'<tr><th scope="row">{labels[i]}</th>{cells}{_share(row[i], sum(row))}</tr>'
    precision = "".join(_share(counts[i][i], totals[i]) for i in range(len(counts)))
    precision += '<td class="sum"></td>' * (len(totals) - len(counts))
    return (
        f'<div class="wide"><table class="matrix"><caption>{caption}</caption><thead>'
        f'<tr><th></th>{head}<th scope="col">recall</th></tr>'
        f"</thead><tbody>{body}"
        f'<tr><th scope="row" class="soft">precision</th>{precision}<td></td></tr></tbody></table></div>'
    )


def _share(part: int, total: int) -> str:
    text = f"{100 * part / total:.1f} %" if total else "–"
    return f'<td class="sum">{text}</td>'


def _frequent_confusions(counts: list[list[int]], labels: list[str], caption: str) -> str:
    """The fifteen most frequent confusions, as a list."""
    labels = [*labels, "nothing"]
    confusions = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    body = "".join(
        f"<tr><td>{labels[i]}</td><td>{labels[j]}</td>{_number(f'{n:,}')}{_share(n, sum(counts[i]))}</tr>"
        for n, i, j in sorted(confusions, reverse=True)[:15]
    )
    head = '<th>gold</th><th>predicted</th><th class="number">rows</th><th class="number">of gold</th>'
    caption += f"<br>the most frequent among {len(counts):,} classes"
    return f"<div><table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def differences(runs: list[Run]) -> str:
    """Where the runs' configurations differ, name by name."""
    flat = [_flatten(run.info["config"]) for run in runs]
    names = sorted({name for config in flat for name in config} - {"out"})  # the folders always differ
    body = ""
    for name in names:
        values = [config.get(name, "–") for config in flat]
        if len(set(values)) > 1:
            cells = "".join(f"<td>{escaped(value)}</td>" for value in values)
            body += f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>'
    if not body:
        return ""
    head = "".join(f"<th>{legend_line(i)}{escaped(run.name)}</th>" for i, run in enumerate(runs))
    table = f'<table class="differs"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<h2>Differences</h2><div class="wide">{table}</div>'


def configuration(run: Run) -> str:
    """A run's configuration and its facts, folded up."""
    # What is not known yet stays None, which `_flatten` leaves out.
    facts: Row = {"folder": run.path, "device": run.info.get("device"), "started": run.info.get("started")}
    last_step = run.steps[-1]["step"] if run.steps else None
    facts["steps"] = run.result.get("steps") or last_step
    if "train_loss" in run.result:
        facts["train loss"] = score("loss", run.result["train_loss"])
    best = run.result.get("best") or {}
    if best.keys() >= {"step", "metric", "value"}:
        facts["best"] = f"{metric_name(best['metric'])} {score(best['metric'], best['value'])} at step {best['step']:,}"
    facts |= run.info.get("versions", {})
    tables = facts_table(_flatten(run.info["config"])) + facts_table(_flatten(facts))
    return f"<details><summary>{escaped(run.name)}</summary><div>{tables}</div></details>"


def facts_table(texts: Mapping[str, str], caption: str = "") -> str:
    """A table of named texts; nothing where there are none."""
    if not texts:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(text)}</td></tr>' for name, text in texts.items()
    )
    return f'<table class="facts">{caption}<tbody>{rows}</tbody></table>'


def _flatten(config: Row, prefix: str = "") -> dict[str, str]:
    """Nested tables as dotted names; unset values are left out."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | bool):
            flat[prefix + name] = json.dumps(value, ensure_ascii=False)
        elif value is not None:
            flat[prefix + name] = str(value)
    return flat

"""The tables of a report's page: confusion matrices, and configurations. `side_by_side.py` has the comparison.

Each function returns HTML, in which everything that comes from a run folder is escaped.
"""

import html
import json
from collections.abc import Mapping, Sequence

from .._outside import visible
from .plots import legend_line
from .runs import Row, Run, metric_name, score
from .seeds import Series

MAX_CLASSES = 25  # a larger confusion matrix is unreadable, so its most frequent confusions are listed instead


def escaped(value: object) -> str:
    return html.escape(visible(value))


def number(text: str, css_class: str = "") -> str:
    return f'<td class="number{css_class}">{text}</td>'


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
        f"<tr><td>{labels[i]}</td><td>{labels[j]}</td>{number(f'{n:,}')}{_share(n, sum(counts[i]))}</tr>"
        for n, i, j in sorted(confusions, reverse=True)[:15]
    )
    head = '<th>gold</th><th>predicted</th><th class="number">rows</th><th class="number">of gold</th>'
    caption += f"<br>the most frequent among {len(counts):,} classes"
    return f"<div><table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def differences(runs: list[Run], all_series: Sequence[Series]) -> str:
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
    lines = {run.name: legend_line(i) for i, series in enumerate(all_series) for run in series.runs}
    head = "".join(f"<th>{lines[run.name]}{escaped(run.name)}</th>" for run in runs)
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

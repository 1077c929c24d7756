"""Shows run folders as one self-contained HTML page.

    report([Path("runs/lora"), Path("runs/full")], Path("report.html"))

The page loads nothing from outside and runs no script, so that it can be mailed, or opened years later. Its colours are
CSS variables and follow the reader's light or dark theme; the runs' are Okabe and Ito's (2008, told apart by every kind
of colour vision), darkened where they were faint on white and lightened on dark ground. The plots need matplotlib:
`pip install handtune[plot]`. Everything that comes from a run folder is escaped, for run folders are passed on too.
"""

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .._files import write_file
from .._outside import visible
from ..engine.tasks.metrics import LOWER_IS_BETTER
from .plots import evaluation_figures, frontier_figures, is_number, legend_line, loss_figures, training_figures
from .runs import (
    Row,
    Run,
    before_after,
    comparison_table,
    costs,
    main_metrics,
    metric_name,
    read_runs,
    score,
    trained,
    trains,
)

__all__ = ["comparison_table", "report"]

MARK = '<meta name="generator" content="handtune">'  # by which a page is known as ours
SAMPLES = 10  # of a run
MAX_CLASSES = 25  # a larger confusion matrix is unreadable: its most frequent confusions are listed instead

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c2024; --soft: #60666d; --rule: #e3e5e8;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b7609a; --s4: #b98000; --s5: #3f9fd6; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --text: #e4e6e8; --soft: #9aa1a8; --rule: #2c3136;
    --s0: #5aaee8; --s1: #f0884a; --s2: #35c39d; --s3: #e09cc8; --s4: #e6b450; --s5: #a4d8f7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 3rem 1.5rem 4rem; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { margin: 0; font-size: 1.6rem; font-weight: 600; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .75rem; font-size: 1.05rem; font-weight: 600; }
p, ul, figcaption, caption, .soft { color: var(--soft); }
p { margin: .25rem 0 1.5rem; } h2 + p { margin: -.5rem 0 1rem; font-size: .87rem; }
ul { margin: 1rem 0; padding-left: 1.2rem; font-size: .87rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; }
th { font-weight: 500; color: var(--soft); text-align: left; vertical-align: bottom; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { padding-left: 0; }
td:last-child, tr:first-child th:last-child { padding-right: 0; }
.comparison tr + tr th.number { padding-left: .75rem; }
.comparison { width: 100%; } .comparison td, .comparison th { white-space: nowrap; }
.number { text-align: right; } .group { text-align: center; border-bottom-color: transparent; padding-bottom: 0; }
tbody th { color: var(--text); } .best { font-weight: 650; }
.line { display: inline-block; width: 1.1rem; margin-right: .5rem; vertical-align: .25em; border-top: 3px var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: 0 0 .75rem; font-size: .87rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.75rem 2rem; }
figure { margin: 0; min-width: 0; } figure.full { grid-column: 1 / -1; }
figcaption { margin-bottom: .35rem; font-size: .87rem; }
figcaption b { margin-right: .75em; font-weight: 500; color: var(--text); }
svg { display: block; width: 100%; height: auto; }
.full div { overflow-x: auto; } .full svg { min-width: 40rem; }
.matrices { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 2rem 3.5rem; }
caption { padding-bottom: .5rem; text-align: left; } caption b { font-weight: 500; color: var(--text); }
.matrix { border-collapse: separate; border-spacing: 2px; }
.matrix tr > :last-child { padding-right: 0; }
.matrix th, .matrix td { max-width: 9rem; padding: .4rem .6rem; border: 0;
  text-align: right; overflow-wrap: break-word; }
.matrix .cell { background: color-mix(in srgb, var(--s0) var(--share), transparent); min-width: 3.2rem; }
.sum { color: var(--soft); text-align: right; white-space: nowrap; }
.matrix tbody th { text-align: left; padding-left: 0; }
details { border-top: 1px solid var(--rule); padding: .6rem 0; } summary { cursor: pointer; }
details:last-of-type { border-bottom: 1px solid var(--rule); }
details > div { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 4rem; margin: .75rem 0; }
details tbody th, .differs tbody th { font-weight: 400; color: var(--soft); } .facts td { overflow-wrap: anywhere; }
.facts th, .facts td, .differs th, .differs td { vertical-align: top; padding-block: .25rem; }
"""


def report(runs: Sequence[Path], out: Path, force: bool = False) -> Path:
    """Write one HTML page that compares the given run folders; returns the file written.

    out: the file, or a folder that receives report.html. Raises FileNotFoundError for a folder that is no run,
    ValueError for a damaged JSON file, where matplotlib is missing, and where something other than such a page is
    there already, unless `force` says to replace it.
    """
    goal = page_at(out, force)
    page = _page(read_runs(runs))
    goal.parent.mkdir(parents=True, exist_ok=True)
    write_file(goal, page)
    return goal


def page_at(out: Path, force: bool) -> Path:
    """The file of a page. ValueError where something is there that `report` did not write, as above."""
    out = Path(out)
    goal = out / "report.html" if out.is_dir() else out
    if goal.exists() and not force and not _is_page(goal):
        raise ValueError(f"{goal}: is there already, and no page of a report; give another name, or --force")
    return goal


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(1000)


def _page(runs: list[Run]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    about = {" · ".join(str(run.info[k]) for k in ("task", "model", "device") if run.info.get(k)) for run in runs}
    lines = "".join(f"<span>{legend_line(i)}{_e(run.name)}</span>" for i, run in enumerate(runs))
    legend = f'<div class="legend">{lines}</div>' if len(runs) > 1 else ""
    parts = [
        f"<h1>{_e(title)}</h1><p>{_e(about.pop()) if len(about) == 1 else ''}</p>",
        _comparison(runs),
        _notes(runs),
        _section("Loss", legend, loss_figures(runs)),
        _section("Reward", legend, frontier_figures(runs)),
        _section("Evaluation", legend, evaluation_figures(runs)),
        _section("Training", legend, training_figures(runs)),
        _samples(runs),
        _matrices(runs),
        _differences(runs),
        "<h2>Configuration</h2>",
        *map(_configuration, runs),
    ]
    head = f'<meta charset="utf-8">{MARK}<meta name="viewport" content="width=device-width">'
    head += f"<title>{_e(title)}</title><style>{STYLE}</style>"
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _e(value: object) -> str:
    return html.escape(visible(value))


def _section(title: str, legend: str, figures: list[str]) -> str:
    return f'<h2>{title}</h2>{legend}<div class="plots">{"".join(figures)}</div>' if figures else ""


def _notes(runs: list[Run]) -> str:
    items = "".join(f"<li><b>{_e(run.name)}</b>: {_e(note)}</li>" for run in runs for note in run.notes)
    return f"<ul>{items}</ul>" if items else ""


def _samples(runs: list[Run]) -> str:
    """What a policy wrote, over the run."""
    parts = ""
    for run in runs:
        rows = [row for row in run.steps if isinstance(row.get("sample"), str)]
        chosen = [rows[round(i * (len(rows) - 1) / (SAMPLES - 1))] for i in range(SAMPLES)] if rows else []
        shown = {row["step"]: row["sample"] for row in chosen}
        body = "".join(f'<tr><th scope="row">{step:,}</th><td>{_e(text)}</td></tr>' for step, text in shown.items())
        if body:
            caption = f"<caption><b>{_e(run.name)}</b></caption>" if len(runs) > 1 else ""
            parts += f'<table class="facts">{caption}<tbody>{body}</tbody></table>'
    return f"<h2>Samples</h2><p>round, prompt → completion: score</p>{parts}" if parts else ""


def _number(text: str, kind: str = "") -> str:
    return f'<td class="number{kind}">{text}</td>'


# Tables


def _comparison(runs: list[Run]) -> str:
    metrics = main_metrics(runs)
    head = "".join(f'<th rowspan="2">{name}</th>' for name in ("run", "method", "trains"))
    head += '<th rowspan="2" class="number">trained</th>'
    head += "".join(f'<th colspan="2" class="group">{_e(metric_name(metric))}</th>' for metric in metrics)
    head += "".join(f'<th rowspan="2" class="number">{name}</th>' for name in ("peak memory", "time", "stored"))
    second = '<th class="number">before</th><th class="number">after</th>' * len(metrics)
    best = {metric: _best(metric, [before_after(run, metric)[1] for run in runs]) for metric in metrics}
    body = ""
    for i, run in enumerate(runs):
        line = legend_line(i) if len(runs) > 1 else ""
        body += f'<tr><th scope="row">{line}{_e(run.name)}</th>'
        body += f"<td>{_e(run.info.get('method', '–'))}</td><td>{_e(trains(run))}</td>{_number(trained(run))}"
        for metric in metrics:
            before, after = before_after(run, metric)
            mark = " best" if after is not None and after == best[metric] else ""
            body += _number(score(metric, before), " soft") + _number(score(metric, after), mark)
        body += "".join(map(_number, costs(run))) + "</tr>"
    rows = f"<tr>{head}</tr><tr>{second}</tr>"
    return f'<div class="wide"><table class="comparison"><thead>{rows}</thead><tbody>{body}</tbody></table></div>'


def _best(metric: str, values: Iterable[Any]) -> float | None:
    """The value to set in bold; none where there is nothing to compare it with."""
    finite = [value for value in values if is_number(value)]
    return (min if metric in LOWER_IS_BETTER else max)(finite) if len(finite) > 1 else None


def _matrices(runs: list[Run]) -> str:
    tables = [_matrix(run, confusion, len(runs) > 1) for run in runs if (confusion := _confusion(run))]
    said = "<p>rows: gold, columns: predicted, shade: share of the row</p>"
    return f'<h2>Confusions</h2>{said}<div class="matrices">{"".join(tables)}</div>' if tables else ""


def _confusion(run: Run) -> list[list[int]]:
    """Counts [gold][predicted] of the finished run, or of the last evaluation so far; empty where there are none."""
    return run.result.get("confusion") or (run.evals[-1].get("confusion") if run.evals else None) or []


def _matrix(run: Run, counts: list[list[int]], named: bool) -> str:
    labels = [_e(label) for label in run.result.get("labels") or run.info.get("labels") or ()]
    labels = labels if len(labels) == len(counts) else [str(i) for i in range(len(counts))]
    caption = f"<b>{_e(run.name)}</b>" if named else ""
    if len(counts) > MAX_CLASSES:
        return _frequent_confusions(counts, labels, caption)
    # A last column, where there is one, counts rows for which nothing was predicted.
    columns = [sum(column) for column in zip(*counts, strict=True)]
    head = "".join(f'<th scope="col">{label}</th>' for label in [*labels, "nothing"][: len(columns)])
    body = ""
    for i, row in enumerate(counts):
        cells = "".join(f'<td class="cell" style="--share: {60 * n / max(1, sum(row)):.0f}%">{n:,}</td>' for n in row)
        body += f'<tr><th scope="row">{labels[i]}</th>{cells}{_share(row[i], sum(row))}</tr>'
    precision = "".join(_share(counts[i][i], columns[i]) for i in range(len(counts)))
    precision += '<td class="sum"></td>' * (len(columns) - len(counts))
    return (
        f'<div class="wide"><table class="matrix"><caption>{caption}</caption><thead>'
        f'<tr><th></th>{head}<th scope="col">recall</th></tr>'
        f"</thead><tbody>{body}"
        f'<tr><th scope="row" class="soft">precision</th>{precision}<td></td></tr></tbody></table></div>'
    )


def _share(part: int, whole: int) -> str:
    return f'<td class="sum">{100 * part / whole:.1f} %</td>' if whole else '<td class="sum">–</td>'


def _frequent_confusions(counts: list[list[int]], labels: list[str], caption: str) -> str:
    labels = [*labels, "nothing"]
    wrong = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    body = "".join(
        f"<tr><td>{labels[i]}</td><td>{labels[j]}</td>{_number(f'{n:,}')}{_share(n, sum(counts[i]))}</tr>"
        for n, i, j in sorted(wrong, reverse=True)[:15]
    )
    head = '<th>gold</th><th>predicted</th><th class="number">rows</th><th class="number">of gold</th>'
    caption += f"<br>the most frequent among {len(counts):,} classes"
    return f"<div><table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _differences(runs: list[Run]) -> str:
    """Where the runs' configurations differ, name by name."""
    flat = [_flatten(run.info.get("config") or {}) for run in runs]
    names = sorted({name for config in flat for name in config} - {"out"})  # that one differs always and says nothing
    head = "".join(f"<th>{legend_line(i)}{_e(run.name)}</th>" for i, run in enumerate(runs))
    body = ""
    for name in names:
        values = [config.get(name, "–") for config in flat]
        if len(set(values)) > 1:
            body += (
                f'<tr><th scope="row">{_e(name)}</th>' + "".join(f"<td>{_e(value)}</td>" for value in values) + "</tr>"
            )
    table = f'<table class="differs"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<h2>Differences</h2><div class="wide">{table}</div>' if body else ""


def _configuration(run: Run) -> str:
    best = run.result.get("best")
    facts: Row = {"folder": run.path, "device": run.info.get("device"), "started": run.info.get("started")}
    facts["steps"] = run.result.get("steps") or (run.steps[-1]["step"] if run.steps else None)
    facts["train loss"] = score("loss", run.result["train_loss"]) if "train_loss" in run.result else None
    if best:
        facts["best"] = f"{metric_name(best['metric'])} {score(best['metric'], best['value'])} at step {best['step']:,}"
    facts |= run.info.get("versions") or {}
    tables = _facts(run.info.get("config") or {}) + _facts(facts)
    return f"<details><summary>{_e(run.name)}</summary><div>{tables}</div></details>"


def _facts(values: Row) -> str:
    rows = "".join(f'<tr><th scope="row">{_e(k)}</th><td>{_e(v)}</td></tr>' for k, v in _flatten(values).items())
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def _flatten(config: Row, prefix: str = "") -> dict[str, str]:
    """Nested tables as dotted names; unset values are left out."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = (
                json.dumps(value, ensure_ascii=False) if isinstance(value, list | bool) else str(value)
            )
    return flat

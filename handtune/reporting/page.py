"""Run folders compared on one self-contained HTML page.

    report([Path("runs/lora"), Path("runs/full")], Path("report.html"))

The page loads nothing from outside and runs no script, so that it can be mailed, or opened years later. Its colors are
CSS variables and follow the reader's light or dark theme; the runs' are Okabe and Ito's (2008, told apart by every kind
of color vision), darkened where they were faint on white and lightened on dark ground. The plots need matplotlib:
`pip install handtune[plot]`. Everything that comes from a run folder is escaped, for run folders are passed on too.
"""

from collections.abc import Sequence
from pathlib import Path

from .._files import write_file
from .plots import figure_per_key, frontier_figures, legend_line, loss_figures
from .runs import Run, comparison_table, read_runs
from .tables import comparison, configuration, differences, escaped, facts_table, matrices

__all__ = ["comparison_table", "report"]

MARK = '<meta name="generator" content="handtune">'  # by which `report` knows a page that it may replace
SAMPLES = 10  # that are shown of a run

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

    `out` is the file, or a folder that receives report.html. Raises FileNotFoundError for a folder that is no run;
    ValueError for a damaged JSON file, where matplotlib is missing, and where there is something other than such a page
    already, unless `force` says to replace it.
    """
    path = page_at(out, force)
    page = _page(read_runs(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page)
    return path


def page_at(out: Path, force: bool) -> Path:
    """The file of a page. ValueError where a file exists that `report` did not write, unless `force` is given."""
    path = out
    if out.is_dir():
        path = out / "report.html"

    if force or not path.exists():
        return path
    # A page of ours says so at its beginning.
    if path.is_file():
        with path.open("rb") as file:
            if MARK.encode() in file.read(1000):
                return path
    raise ValueError(f"{path}: is there already, and no page of a report; give another name, or --force")


def _page(runs: list[Run]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"

    # A line on what the runs have in common, if all of it is the same.
    subtitles = {" · ".join(str(run.info[k]) for k in ("task", "model", "device") if run.info.get(k)) for run in runs}
    subtitle = subtitles.pop() if len(subtitles) == 1 else ""

    legend = ""
    if len(runs) > 1:
        lines = "".join(f"<span>{legend_line(i)}{escaped(run.name)}</span>" for i, run in enumerate(runs))
        legend = f'<div class="legend">{lines}</div>'
    sections = []
    for heading, figures in (
        ("Loss", loss_figures(runs)),
        ("Reward", frontier_figures(runs)),
        ("Evaluation", figure_per_key([run.evals for run in runs], "marks")),  # the loss has its own
        ("Training", figure_per_key([run.steps for run in runs], "line")),  # learning rate, tokens per second, ...
    ):
        if figures:
            sections.append(f'<h2>{heading}</h2>{legend}<div class="plots">{"".join(figures)}</div>')
    parts = [
        f"<h1>{escaped(title)}</h1><p>{escaped(subtitle)}</p>",
        comparison(runs),
        _notes(runs),
        *sections,
        _samples(runs),
        matrices(runs),
        differences(runs),
        "<h2>Configuration</h2>",
        *map(configuration, runs),
    ]

    head = f'<meta charset="utf-8">{MARK}<meta name="viewport" content="width=device-width">'
    head += f"<title>{escaped(title)}</title><style>{STYLE}</style>"
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _notes(runs: list[Run]) -> str:
    items = "".join(f"<li><b>{escaped(run.name)}</b>: {escaped(note)}</li>" for run in runs for note in run.notes)
    return f"<ul>{items}</ul>" if items else ""


def _samples(runs: list[Run]) -> str:
    """What a policy wrote, over the run."""
    tables = ""
    for run in runs:
        rows = [row for row in run.steps if isinstance(row.get("sample"), str)]
        if not rows:
            continue
        # At even distances, from the first to the last; a short run has some of them several times.
        chosen = [rows[round(i * (len(rows) - 1) / (SAMPLES - 1))] for i in range(SAMPLES)]
        caption = f"<caption><b>{escaped(run.name)}</b></caption>" if len(runs) > 1 else ""
        tables += facts_table({f"{row['step']:,}": row["sample"] for row in chosen}, caption)
    return f"<h2>Samples</h2><p>round, prompt → completion: score</p>{tables}" if tables else ""

"""Run folders compared on one self-contained HTML page.

    report([Path("runs/lora"), Path("runs/full")], Path("report.html"))

The page loads nothing from outside, so that it can be mailed, or opened years later. Its colors are CSS variables and
follow the reader's light or dark theme; the runs' are Okabe and Ito's (2008, told apart by every kind of color vision),
darkened where they were faint on white and lightened on dark ground. The plots need matplotlib:
`pip install handtune[plot]`.

Everything that comes from a run folder is escaped, for run folders are passed on too. Should something slip
through, the page's Content-Security-Policy lets a browser run one script, `hover.js`, known by its SHA-256.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from .._files import write_file
from .examples import forgetting, mistakes, texts
from .figures import evaluation_figures, frontier_figures, loss_figures, training_figures
from .plots import legend_line
from .runs import Run, read_runs
from .seeds import series_of
from .side_by_side import comparison, comparison_table
from .tables import configuration, differences, escaped, facts_table, matrices

__all__ = ["comparison_table", "report"]

SCRIPT = Path(__file__).with_name("hover.js")
MARK = '<meta name="generator" content="handtune">'  # by which `report` knows a page that it may replace
SAMPLES = 10  # that are shown of a run

STYLE = Path(__file__).with_name("page.css")


def report(runs: Sequence[Path], out: Path, force: bool = False, reload: int | None = None) -> Path:
    """Write one HTML page that compares the given run folders; returns the file written.

    `out` is the file, or a folder that receives report.html. With `reload` the page reloads itself after so many
    seconds, for it will be written again. Raises FileNotFoundError for a folder that is no run;
    ValueError for a damaged JSON file, where matplotlib is missing, and where there is something other than such a page
    already, unless `force` says to replace it.
    """
    path = page_at(out, force)
    page = _page(read_runs(runs), reload)
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


def _page(runs: list[Run], reload: int | None) -> str:
    all_series = series_of(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"

    # A line on what the runs have in common, if all of it is the same.
    subtitles = {" · ".join(str(run.info[k]) for k in ("task", "model", "device") if run.info.get(k)) for run in runs}
    subtitle = subtitles.pop() if len(subtitles) == 1 else ""

    legend = ""
    if len(all_series) > 1:
        lines = "".join(f"<span>{legend_line(i)}{escaped(each.name)}</span>" for i, each in enumerate(all_series))
        legend = f'<div class="legend">{lines}</div>'
    sections = []
    for heading, figures in (
        ("Loss", loss_figures(all_series)),
        ("Reward", frontier_figures(all_series)),
        ("Evaluation", evaluation_figures(all_series)),  # the loss has its own
        ("Training", training_figures(all_series)),  # learning rate, tokens per second, ...
    ):
        if figures:
            sections.append(f'<h2>{heading}</h2>{legend}<div class="plots">{"".join(figures)}</div>')
    parts = [
        f"<h1>{escaped(title)}</h1><p>{escaped(subtitle)}</p>",
        f'<p class="going-on">Training goes on; this page reloads every {reload} seconds.</p>' if reload else "",
        comparison(all_series),
        _notes(runs),
        *sections,
        _samples(runs),
        texts(runs),
        forgetting(runs),
        matrices(runs),
        mistakes(runs),
        differences(runs, all_series),
        "<h2>Configuration</h2>",
        *map(configuration, runs),
    ]

    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    head = f'<meta charset="utf-8">{MARK}<meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += '<meta name="viewport" content="width=device-width">'
    if reload:
        head += f'<meta http-equiv="refresh" content="{reload}">'
    head += f"<title>{escaped(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
    body = "\n".join(part for part in parts if part) + f"\n<script>{script}</script>"
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

"""What runs kept in their examples.json, as parts of a report's page: mistakes, texts before and after, forgetting.

`held_out.py` writes that file at the end of training. Each function returns HTML, in which everything is escaped.
"""

from collections.abc import Sequence
from typing import Any

from .runs import Row, Run, score
from .tables import escaped, number

SHOWN = 500  # characters of a text; of a prompt its end, of others their beginning


def mistakes(runs: Sequence[Run]) -> str:
    """The held-out rows where each run was wrong and surest of it."""
    head = '<th>row</th><th>text</th><th>gold</th><th>predicted</th><th class="number">probability</th>'
    parts = {}
    for run in runs:
        body = "".join(
            f'<tr><td class="soft">{escaped(row["row"])}</td><td class="text">{escaped(_beginning(row["text"]))}</td>'
            f"<td>{escaped(row['gold'])}</td><td>{escaped(row['predicted'])}</td>{number(_percent(row['probability']))}"
            "</tr>"
            for row in run.examples.get("mistakes", ())
        )
        table = f'<table class="mistakes"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        parts[run.name] = f'<div class="wide">{table}</div>' if body else ""
    hint = "held-out rows where the stored weights are wrong and surest of what they predict"
    return _section("Worst mistakes", hint, parts)


def texts(runs: Sequence[Run]) -> str:
    """What each run's model writes for held-out prompts, before training and after."""
    parts = {run.name: "".join(map(_text, run.examples.get("texts", ()))) for run in runs}
    return _section("Texts before and after", "written greedily behind held-out prompts", parts)


def _text(row: Row) -> str:
    prompt = row["prompt"] if len(row["prompt"]) <= SHOWN else f"… {row['prompt'][-SHOWN:]}"
    columns = "".join(
        f"<div><dt>{title}</dt><dd>{escaped(_beginning(row[key].strip())) or '–'}</dd></div>"
        for title, key in (("in the row", "gold"), ("before training", "before"), ("after training", "after"))
    )
    return f'<div class="written"><p class="text">{escaped(prompt.strip())}</p><dl>{columns}</dl></div>'


def forgetting(runs: Sequence[Run]) -> str:
    """The loss of each run's model on general text, before training and after."""
    body = ""
    for run in runs:
        if general := run.examples.get("general"):
            before = general["before"]
            after = general["after"]
            change = f"{after - before:+.3f}".replace("-", "−")
            body += f'<tr><th scope="row">{escaped(run.name)}</th>{number(score("loss", before), " soft")}'
            body += f"{number(score('loss', after))}{number(change)}</tr>"
    if not body:
        return ""
    head = '<th>run</th><th class="number">before</th><th class="number">after</th><th class="number">change</th>'
    hint = "loss on general English text, nats a token; what it rises by is what the model has forgotten"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>Forgetting</h2><p>{hint}</p><div class="wide">{table}</div>'


def _section(heading: str, hint: str, parts: dict[str, str]) -> str:
    """A section with a part for each run that has one: folded up where there are several."""
    parts = {name: part for name, part in parts.items() if part}
    if not parts:
        return ""
    body = "".join(parts.values())
    if len(parts) > 1:
        body = "".join(
            f"<details{' open' if i == 0 else ''}><summary>{escaped(name)}</summary>{part}</details>"
            for i, (name, part) in enumerate(parts.items())
        )
    return f"<h2>{heading}</h2><p>{hint}</p>{body}"


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"


def _percent(probability: Any) -> str:
    return "–" if probability is None else f"{100 * probability:.1f} %"

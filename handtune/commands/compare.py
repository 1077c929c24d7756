"""`handtune compare`: people, or a function, compare a model's own completions; `train` reads the result."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._files import LOCK
from .._locks import alone
from .._shapes import parse_json
from ..comparison.session import ANSWERS, LEFT, RIGHT, SKIP, TIE, Item, Session, make_items
from ..comparison.web_page import ComparisonServer
from ..engine.data.readers import read_prompts, read_text
from ..engine.generation.completions import completions
from ..prompts import prompts_of
from ..saved_runs import function_of
from .generate import generator_of
from .outputs import refuse_existing

# The keys that a person presses at the terminal.
KEYS = {"a": LEFT, "b": RIGHT, "t": TIE, "s": SKIP}


def run_compare(options: argparse.Namespace) -> int:
    """`handtune compare`: begin a session or continue it, in a browser, at the terminal or with a function."""
    out = Path(options.out)
    folder = out.with_name(out.name + ".session")
    if not (folder / "items.jsonl").is_file():
        refuse_existing(options.out, options.force)
    # Held from the first completion on: a second process would compute others for the same session.
    with alone(folder, folder / LOCK):
        return _compare(options, out, folder)


def _compare(options: argparse.Namespace, out: Path, folder: Path) -> int:
    session = _session(options, folder)
    with session.alone():
        try:
            if options.labeler is not None:
                _answer_by_function(session, function_of(options.labeler))
            elif options.terminal:
                _answer_at_the_terminal(session)
            else:
                _answer_in_a_browser(session, options.port)
        except KeyboardInterrupt:  # how a person ends a session, which can be continued
            print()
        n_written = session.export(out)

    progress = session.progress()
    summary = f"{progress['done']} of {progress['total']} answered"
    if progress["agreement"] is not None:
        summary += f", {100 * progress['agreement']:.0f} % agreement on {progress['repeated']} repeated"
    print(f"{summary}; {n_written} comparisons written to {out}")
    return 0


def _session(options: argparse.Namespace, folder: Path) -> Session:
    """The session in the folder, or a new one."""
    if (folder / "items.jsonl").is_file():
        # Its pairs are compared with those of --pairs; a model would have to generate them again.
        session = Session(folder, _items(options) if options.pairs else None)
        print(f"going on with {folder}, which has {len(session.answers)} of {len(session.items)} answers",
              file=sys.stderr)  # fmt: skip
        return session
    return Session(folder, _items(options))


def _items(options: argparse.Namespace) -> list[Item]:
    if (options.model is None) == (options.pairs is None):
        raise ValueError("give a MODEL with --prompts, whose completions are compared, or --pairs, a file of pairs")
    pairs = _read_pairs(Path(options.pairs)) if options.pairs else _sample_pairs(options)
    items, dropped = make_items(pairs, options.repeat, options.seed)
    if dropped:
        numbers = [str(number) for number in dropped[:5]]
        if len(dropped) > 5:
            numbers.append("...")
        print(f"left out, because both sides are equal or one is empty: {len(dropped)} ({', '.join(numbers)})",
              file=sys.stderr)  # fmt: skip
    return items


def _read_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """The pairs in a JSONL file, each as (prompt, completion, completion)."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        pair = _pair(parse_json(line, where, "correct the line"), where)
        # Something other than a text, or half of a surrogate pair, could not be shown.
        try:
            "".join(pair).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"{where}: what is compared must be texts, {error}") from None
        yield pair


def _pair(row: Any, where: str) -> tuple[Any, Any, Any]:
    """The prompt and two sides of a row, which need not be texts yet. ValueError where a field is missing."""
    fields = row if isinstance(row, dict) else {}
    completions = fields.get("completions")
    if {"text", "label", "second"} <= fields.keys():  # as `handtune label` writes them
        return row["text"], row["label"], row["second"]
    if "prompt" in fields and isinstance(completions, list) and len(completions) > 1:
        return row["prompt"], completions[0], completions[1]
    if {"prompt", "chosen", "rejected"} <= fields.keys() and completions is None:
        return row["prompt"], row["chosen"], row["rejected"]
    known = "prompt and completions, prompt, chosen and rejected, or text, label and second"
    raise ValueError(f"{where}: expected {known}")


def _sample_pairs(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Each prompt with two completions of the model."""
    if options.prompts is None:
        raise ValueError("--prompts: a file of rows with a prompt, messages or a text each")
    generator = generator_of(options)
    rows = read_prompts(options.prompts)
    prompts = prompts_of(rows, generator.model, generator.asks_as_chat(None, len(rows)))

    sides = []
    for side in range(2):
        # A batch's seed is this plus the number of its first prompt, so that no two batches of the two sides share one.
        seed = options.seed + side * len(prompts)
        sides.append(completions(
            generator.model, generator.tokenizer, prompts, options.max_new_tokens, batch_size=options.batch_size,
            stop=options.stop, seed=seed, temperature=options.temperature,
        ))  # fmt: skip
    return zip(prompts, *sides, strict=True)


def _answer_by_function(session: Session, choose: Callable[[str, str, str], str]) -> None:
    """`choose(prompt, left, right)` answers "left", "right", "tie" or "skip"."""
    while (item := session.next()) is not None:
        answer = choose(item.prompt, item.left, item.right)
        if answer not in ANSWERS:
            raise ValueError(f"the labeler answered {answer!r:.60}; expected one of {', '.join(ANSWERS)}")
        session.answer(item.id, answer)


def _answer_at_the_terminal(session: Session) -> None:
    while (item := session.next()) is not None:
        progress = session.progress()
        sides = f"── A ──\n{item.left}\n\n── B ──\n{item.right}"
        print(f"\n[{progress['done'] + 1} of {progress['total']}]\n{item.prompt}\n\n{sides}\n")
        _ask(session, item)


def _ask(session: Session, item: Item) -> None:
    """Take one answer from the terminal, or take the last one back."""
    while True:
        try:
            key = input("better: a, b · t equal · s skip · u take back · q quit > ").strip().lower()
        except EOFError:
            raise KeyboardInterrupt from None
        if key == "q":
            raise KeyboardInterrupt
        if key == "u":
            if session.undo() is None:
                print("there is nothing to take back")
                continue
            return
        if key in KEYS:
            session.answer(item.id, KEYS[key])
            return


def _answer_in_a_browser(session: Session, port: int) -> None:
    with ComparisonServer(session, port) as server:
        print(f"open {server.url}\nand press Ctrl-C here when done", flush=True)
        server.serve_forever()

"""`handtune compare`: people, or a function, compare a model's own completions; what comes out is read by `train`."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._files import LOCK, parse_json
from .._locks import alone
from ..comparison.session import ANSWERS, LEFT, RIGHT, SKIP, TIE, Item, Session, make_items
from ..comparison.web_page import ComparisonServer
from ..engine.data.readers import read_prompts, read_text
from ..engine.generation.completions import completions
from ..prompts import prompts_of
from ..saved_runs import function_of
from .generate import generator_of
from .outputs import refuse_existing

KEYS = {"a": LEFT, "b": RIGHT, "t": TIE, "s": SKIP}


def run_compare(options: argparse.Namespace) -> int:
    """`handtune compare`: begin a session or go on with it, in a browser, at the terminal or by a function."""
    out = Path(options.out)
    folder = out.with_name(out.name + ".session")
    if not (folder / "items.jsonl").is_file():
        refuse_existing(options.out, options.force)
    with alone(folder, folder / LOCK):
        return _compare(options, out, folder)


def _compare(options: argparse.Namespace, out: Path, folder: Path) -> int:
    session = _session(options, folder)
    with session.alone():
        try:
            if options.labeler is not None:
                _by_function(session, function_of(options.labeler))
            elif options.terminal:
                _at_the_terminal(session)
            else:
                _in_a_browser(session, options.port)
        except KeyboardInterrupt:
            print()
        written = session.export(out)
    facts = session.progress()
    said = f"{facts['done']} of {facts['total']} answered"
    if facts["agreement"] is not None:
        said += f", {100 * facts['agreement']:.0f} % agreement on {facts['repeated']} repeated"
    print(f"{said}; {written} comparisons written to {out}")
    return 0


def _session(options: argparse.Namespace, folder: Path) -> Session:
    """The session that has begun for `out`, whatever model it is of now; or a new one."""
    if (folder / "items.jsonl").is_file():
        session = Session(folder, _items(options) if options.pairs else None)
        print(f"going on with {folder}, which has {len(session.answers)} of {len(session.items)} answers",
              file=sys.stderr)  # fmt: skip
        return session
    return Session(folder, _items(options))


def _items(options: argparse.Namespace) -> list[Item]:
    if (options.model is None) == (options.pairs is None):
        raise ValueError("give a MODEL with --prompts, whose completions are compared, or --pairs, a file of pairs")
    pairs = _pairs(Path(options.pairs)) if options.pairs else _sampled(options)
    items, dropped = make_items(pairs, options.repeat, options.seed)
    if dropped:
        shown = ", ".join(map(str, dropped[:5])) + (", ..." if len(dropped) > 5 else "")
        print(f"left out, because both sides are equal or one is empty: {len(dropped)} ({shown})", file=sys.stderr)
    return items


def _pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Of a JSONL file: rows of prompt and completions (the first two), of chosen and rejected, or of `label`."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        pair = _pair(parse_json(line, where, "correct the line"), where)
        try:
            "".join(pair).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"{where}: what is compared must be texts, {error}") from None
        yield pair


def _pair(row: Any, where: str) -> tuple[Any, Any, Any]:
    """What is asked and the two sides, which may be no texts yet. ValueError where a field is missing."""
    fields = row if isinstance(row, dict) else {}
    sides = fields.get("completions")
    if {"text", "label", "second"} <= fields.keys():  # of `handtune label`
        return row["text"], row["label"], row["second"]
    if "prompt" in fields and isinstance(sides, list) and len(sides) > 1:  # a text would be compared letter by letter
        return row["prompt"], sides[0], sides[1]
    if {"prompt", "chosen", "rejected"} <= fields.keys() and sides is None:
        return row["prompt"], row["chosen"], row["rejected"]
    known = "prompt and completions, prompt, chosen and rejected, or text, label and second"
    raise ValueError(f"{where}: expected {known}")


def _sampled(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Two completions of each prompt."""
    if options.prompts is None:
        raise ValueError("--prompts: a file of rows with a prompt, messages or a text each")
    generator, rows = generator_of(options), read_prompts(options.prompts)
    model, tokenizer, chats = generator.model, generator.tokenizer, generator.asks_as_chat(None, len(rows))
    prompts = prompts_of(rows, model, chats)
    sides = [
        completions(
            model, tokenizer, prompts, options.max_new_tokens, batch_size=options.batch_size, stop=options.stop,
            seed=options.seed + side * len(prompts), temperature=options.temperature,
        )
        for side in range(2)
    ]  # fmt: skip
    return zip(prompts, *sides, strict=True)


def _by_function(session: Session, choose: Callable[[str, str, str], str]) -> None:
    """`choose(prompt, left, right)` answers "left", "right", "tie" or "skip"."""
    while (item := session.next()) is not None:
        answer = choose(item.prompt, item.left, item.right)
        if answer not in ANSWERS:
            raise ValueError(f"the labeler answered {answer!r:.60}; expected one of {', '.join(ANSWERS)}")
        session.answer(item.id, answer)


def _at_the_terminal(session: Session) -> None:
    while (item := session.next()) is not None:
        facts = session.progress()
        sides = f"── A ──\n{item.left}\n\n── B ──\n{item.right}"
        print(f"\n[{facts['done'] + 1} of {facts['total']}]\n{item.prompt}\n\n{sides}\n")
        _ask(session, item)


def _ask(session: Session, item: Item) -> None:
    """One answer, or one taken back."""
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


def _in_a_browser(session: Session, port: int) -> None:
    with ComparisonServer(session, port) as server:
        print(f"open {server.url}\nand press Ctrl-C here when done", flush=True)
        server.serve_forever()

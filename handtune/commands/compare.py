"""`handtune compare`: people, or a function, compare a model's own completions; `train` reads the result."""

import argparse
import sys
from pathlib import Path

from .._files import LOCK
from .._locks import alone
from ..adapted.generator import generator_of
from ..comparison.answers import answer_at_the_terminal, answer_by_function
from ..comparison.pairs import read_pairs, sample_pairs
from ..comparison.session import Item, Session, make_items
from ..comparison.web_page import ComparisonServer
from ..saved_runs import function_of
from .outputs import refuse_existing


def run_compare(options: argparse.Namespace) -> int:
    """`handtune compare`: begin a session or continue it, in a browser, at the terminal or with a function."""
    out = Path(options.out)
    folder = out.with_name(out.name + ".session")
    if not (folder / "items.jsonl").is_file():
        refuse_existing(options.out, options.force)

    # Held from the first completion on: a second process would compute others for the same session.
    with alone(folder, folder / LOCK):
        goes_on = (folder / "items.jsonl").is_file()
        # Its pairs are compared with those of --pairs; a model would have to generate them again.
        session = Session(folder, _items(options) if options.pairs or not goes_on else None)
        if goes_on:
            print(f"going on with {folder}, which has {len(session.answers)} of {len(session.items)} answers",
                  file=sys.stderr)  # fmt: skip

        with session.alone():
            try:
                _answer(session, options)
            except KeyboardInterrupt:  # how a person ends a session, which can be continued
                print()
            n_written = session.export(out)

    progress = session.progress()
    summary = f"{progress['done']} of {progress['total']} answered"
    if progress["agreement"] is not None:
        summary += f", {100 * progress['agreement']:.0f} % agreement on {progress['repeated']} repeated"
    print(f"{summary}; {n_written} comparisons written to {out}")
    return 0


def _items(options: argparse.Namespace) -> list[Item]:
    if (options.model is None) == (options.pairs is None):
        raise ValueError("give a MODEL with --prompts, whose completions are compared, or --pairs, a file of pairs")
    if options.pairs:
        pairs = read_pairs(Path(options.pairs))
    elif options.prompts is None:
        raise ValueError("--prompts: a file of rows with a prompt, messages or a text each")
    else:
        pairs = sample_pairs(
            generator_of(options.model, options.adapter, options.dtype), options.prompts, options.max_new_tokens,
            options.seed, batch_size=options.batch_size, stop=options.stop, temperature=options.temperature,
            repetition_penalty=options.repetition_penalty, no_repeat_ngram=options.no_repeat_ngram,
        )  # fmt: skip

    items, dropped = make_items(pairs, options.repeat, options.seed)
    if dropped:
        numbers = [str(number) for number in dropped[:5]]
        if len(dropped) > 5:
            numbers.append("...")
        print(f"left out, because both sides are equal or one is empty: {len(dropped)} ({', '.join(numbers)})",
              file=sys.stderr)  # fmt: skip
    return items


def _answer(session: Session, options: argparse.Namespace) -> None:
    if options.labeler is not None:
        answer_by_function(session, function_of(options.labeler))
    elif options.terminal:
        answer_at_the_terminal(session)
    else:
        with ComparisonServer(session, options.port) as server:
            print(f"open {server.url}\nand press Ctrl-C here when done", flush=True)
            server.serve_forever()

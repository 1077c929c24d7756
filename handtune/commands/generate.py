"""`handtune generate`: continue prompts, printed or written as rows."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .._files import resolved, write_file
from ..engine.data.placed_rows import PlacedRow, place_of
from ..engine.data.readers import read_prompts
from ..engine.generation.completions import completions
from ..engine.tasks.objectives import objective_of
from ..engine.training.guards import explained_memory_error
from ..inputs import BASE
from ..models import load
from ..models.checkpoint.info import checkpoint_info
from ..prepare import run_base, run_model
from ..prompts import learn_turn_end, prompts_of
from ..saved_runs import config_of, put_adapter, require_finished
from ..terminal import print_unescaped
from .outputs import output


def run_generate(options: argparse.Namespace) -> int:
    """`handtune generate`: continue prompts, printed batch by batch or written as rows."""
    _check(options)
    with output(options.out, options.force) if options.out else nullcontext() as out:
        return _generate(options, out)


def _generate(options: argparse.Namespace, out: Path | None) -> int:
    generator = generator_of(options)
    model = generator.model
    rows = list(_rows(options))
    adapters = _adapters(rows, generator.adapters)
    chats = [chat and not options.raw for chat in generator.asks_as_chat(adapters, len(rows))]
    prompts = prompts_of(rows, model, chats)

    temperature = options.temperature
    if temperature is None:
        temperature = float(options.beams == 1)  # a beam search samples nothing
    texts = completions(
        model, generator.tokenizer, prompts, options.max_new_tokens, batch_size=options.batch_size, stop=options.stop,
        seed=options.seed, temperature=temperature, top_k=options.top_k, top_p=options.top_p, beams=options.beams,
        length_penalty=1.0 if options.length_penalty is None else options.length_penalty, adapters=adapters,
    )  # fmt: skip

    # The texts are generated batch by batch, as they are written or printed.
    with explained_memory_error(next(model.parameters()).device, lambda: _less_memory(options)):
        if out is not None:
            # Rows to train on have the plain prompt, which goes through the template in training, too.
            written_prompts = [
                row["prompt"] if chat and "prompt" in row else prompt
                for row, chat, prompt in zip(rows, chats, prompts, strict=True)
            ]
            _write(written_prompts, texts, out)
            print(f"{len(prompts)} rows written to {options.out}")
        else:
            for number, (chat, prompt, text) in enumerate(zip(chats, prompts, texts, strict=True)):
                # An answer and the output of a decoder are texts of their own.
                if not chat and model.task != "seq2seq-lm":
                    text = prompt + text
                _print(("\n" if number else "") + text)
                if sys.stdout.closed:  # nobody reads it any more
                    break
    return 0


def _write(prompts: list[str], texts: Iterable[str], out: Path) -> None:
    """Write rows of prompt and completion to `out`; if it is interrupted, the rows so far to a file beside it."""
    lines: list[str] = []
    try:
        for prompt, text in zip(prompts, texts, strict=True):
            lines.append(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) + "\n")
    finally:
        if 0 < len(lines) < len(prompts):
            part = out.with_name(f"{out.name}.{os.getpid()}.part")
            write_file(part, "".join(lines))
            print(f"the first {len(lines)} of {len(prompts)} rows are in {part}", file=sys.stderr)
    write_file(out, "".join(lines))


def _print(text: str) -> None:
    """Print a text: escaped on a terminal, which it could steer, and otherwise as it is."""
    if sys.stdout.isatty():
        print(text, flush=True)
    else:
        print_unescaped(text)


def _check(options: argparse.Namespace) -> None:
    """ValueError where an option would be without effect, or would destroy something."""
    sampling = (("--top-k", options.top_k != 0), ("--top-p", options.top_p != 1.0))
    set_options = [name for name, is_set in sampling if is_set]
    if options.beams > 1 and (set_options or options.temperature or options.stop):
        raise ValueError("--beams look for the likeliest text: leave out --temperature, --top-k, --top-p and --stop")
    if options.temperature == 0 and set_options:
        raise ValueError(
            f"{' and '.join(set_options)}: at --temperature 0 nothing is sampled; leave one of the two out"
        )
    if options.length_penalty is not None and options.beams == 1:
        raise ValueError("--length-penalty weighs the texts of a beam search: give --beams, too")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: expected a positive number")
    if options.out and options.prompts and resolved(options.out) == resolved(options.prompts):
        raise ValueError(f"--out {options.out} is the file of the prompts; give another")


def _less_memory(options: argparse.Namespace) -> str:
    """What to do where memory runs out."""
    if options.batch_size > 1:
        return f"set --batch-size {options.batch_size // 2} (it is {options.batch_size})"
    return "even one prompt is too much; shorten it, or use --dtype bfloat16"


class Generator(NamedTuple):
    """A model that generates, with its tokenizer and adapters."""

    model: Any
    tokenizer: Any
    adapters: dict[str, str]  # the name of each adapter in the model, by the name that rows call it by
    chat: dict[str | None, bool]  # whether each adapter, and None, the base, was trained through the chat template

    def asks_as_chat(self, adapters: Sequence[str | None] | None, rows: int) -> list[bool]:
        """Whether each row goes through the template. `adapters` are those of the rows; None: the last one for all."""
        if adapters is None:
            adapters = [list(self.chat)[-1]] * rows
        return [self.chat[name] for name in adapters]


def generator_of(options: argparse.Namespace) -> Generator:
    """The model to generate with: a checkpoint, or what a run produced."""
    path = Path(options.model)
    checkpoint = options.model
    folders = [Path(adapter) for adapter in options.adapter]
    config = None
    if (path / "run.json").is_file():
        require_finished(path)
        if (path / "model").is_dir():
            checkpoint = path / "model"
        else:
            config = config_of(path, BASE)
            folders = folders or [path / "adapter"]

    # A run's base may have changes of its own, such as tokens that were added.
    if config is not None:
        if options.dtype != "auto":
            config = replace(config, model=replace(config.model, dtype=options.dtype))
        model, tokenizer = run_model(config, run_base(config), tuple(config.model.labels or ()), head_follows=True)
    else:
        info = checkpoint_info(checkpoint)
        task = objective_of("sft", info.family.objectives).task
        model, tokenizer = load(info, task, options.dtype, head_follows=bool(folders))
    if tokenizer is None:
        raise ValueError(f"{checkpoint}: no tokenizer.json there, and prompts need one")

    # `put_adapter` changes the model's tokens, and each adapter's settings start from those of the base.
    tokens = model.tokens
    adapters: dict[str, str] = {}
    chat: dict[str | None, bool] = {None: tokens.asks_as_chat}
    for folder in folders:
        full_path = resolved(folder)
        if full_path.name == "adapter":  # an adapter in a run's folder goes by the run's name
            full_path = full_path.parent
        name = full_path.name
        if name in adapters:
            raise ValueError(f"--adapter {folder}: there is another called {name!r}; give one another name")
        # Numbered, because names that differ may become the same without their dots, which no module's name has.
        adapters[name] = f"{len(adapters)}: {name.replace('.', '_')}"
        put_adapter(model, tokenizer, folder, adapters[name])
        chat[adapters[name]] = tokens.with_adapter(folder, tokenizer).asks_as_chat
    learn_turn_end(model, tokenizer)
    return Generator(model, tokenizer, adapters, chat)


def _adapters(rows: list[dict[str, Any]], names: dict[str, str]) -> list[str | None] | None:
    """The adapter of each row, or None where all rows have the same. ValueError where a row leaves it open."""
    if len(names) < 2 and not any("adapter" in row for row in rows):
        return None

    adapters: list[str | None] = []
    for index, row in enumerate(rows):
        if "adapter" in row and row["adapter"] is None:  # the base alone
            adapters.append(None)
            continue
        if row.get("adapter") not in names:
            raise ValueError(
                f"{place_of(row, index)}: adapter {row.get('adapter')!r} is not among the given ones "
                f"({', '.join(names) or 'none'}); name one in each row of --prompts, as adapter"
            )
        adapters.append(names[row["adapter"]])
    return adapters


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows to continue: from the options, or else from standard input."""
    for number, prompt in enumerate(options.prompt or [], 1):
        yield PlacedRow({"prompt": prompt}, "--prompt", str(number))
    if options.prompts:
        yield from read_prompts(options.prompts)
    elif not options.prompt:
        yield PlacedRow({"prompt": sys.stdin.read().rstrip("\n")}, "standard input", "")

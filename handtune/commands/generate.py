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
    model, tokenizer, rows = generator.model, generator.tokenizer, list(_rows(options))
    adapters = _adapters(rows, generator.adapters)
    chats = [chat and not options.raw for chat in generator.asks_as_chat(adapters, len(rows))]
    prompts = prompts_of(rows, model, chats)
    temperature = options.temperature if options.temperature is not None else float(options.beams == 1)
    written = completions(
        model, tokenizer, prompts, options.max_new_tokens, batch_size=options.batch_size, stop=options.stop,
        seed=options.seed, temperature=temperature, top_k=options.top_k, top_p=options.top_p, beams=options.beams,
        length_penalty=1.0 if options.length_penalty is None else options.length_penalty, adapters=adapters,
    )  # fmt: skip
    with explained_memory_error(next(model.parameters()).device, lambda: _smaller(options)):
        if out is not None:
            asked = [
                row["prompt"] if chat and "prompt" in row else prompt  # as rows to train on have it
                for row, chat, prompt in zip(rows, chats, prompts, strict=True)
            ]
            _write(asked, written, out)
            print(f"{len(prompts)} rows written to {options.out}")
        else:
            for number, (chat, prompt, text) in enumerate(zip(chats, prompts, written, strict=True)):
                is_answer = chat or model.task == "seq2seq-lm"  # a text of its own, no continuation
                _show(("\n" if number else "") + (text if is_answer else prompt + text))
                if sys.stdout.closed:  # nobody reads on
                    break
    return 0


def _write(prompts: list[str], completed: Iterable[str], out: Path) -> None:
    """Write rows of prompt and completion to `out`; where it is broken off, those there are to a file beside it."""
    lines: list[str] = []
    try:
        for prompt, text in zip(prompts, completed, strict=True):
            lines.append(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) + "\n")
    finally:
        if 0 < len(lines) < len(prompts):
            part = out.with_name(f"{out.name}.{os.getpid()}.part")
            write_file(part, "".join(lines))
            print(f"the first {len(lines)} of {len(prompts)} rows are in {part}", file=sys.stderr)
    write_file(out, "".join(lines))


def _show(text: str) -> None:
    """Print a text; as it is, but where it goes to a terminal, which it could steer."""
    if sys.stdout.isatty():
        print(text, flush=True)
    else:
        print_unescaped(text)


def _check(options: argparse.Namespace) -> None:
    """ValueError where an option would be without effect, or would destroy something."""
    sampling = {"--top-k": options.top_k != 0, "--top-p": options.top_p != 1.0}
    given = [name for name, is_given in sampling.items() if is_given]
    if options.beams > 1 and (given or options.temperature or options.stop):
        raise ValueError("--beams look for the likeliest text: leave out --temperature, --top-k, --top-p and --stop")
    if options.temperature == 0 and given:
        raise ValueError(f"{' and '.join(given)}: at --temperature 0 nothing is sampled; leave one of the two out")
    if options.length_penalty is not None and options.beams == 1:
        raise ValueError("--length-penalty weighs the texts of a beam search: give --beams, too")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: expected a positive number")
    if options.out and options.prompts and resolved(options.out) == resolved(options.prompts):
        raise ValueError(f"--out {options.out} is the file of the prompts; give another")


def _smaller(options: argparse.Namespace) -> str:
    if options.batch_size > 1:
        return f"set --batch-size {options.batch_size // 2} (it is {options.batch_size})"
    return "even one prompt is too much; shorten it, or use --dtype bfloat16"


class Generator(NamedTuple):
    """What generates: a model, its tokenizer, and adapters (by folder, as they are called).

    `chat` tells of each adapter, and of None, the base, whether it was trained to be asked through the chat template.
    """

    model: Any
    tokenizer: Any
    adapters: dict[str, str]
    chat: dict[str | None, bool]

    def asks_as_chat(self, adapters: Sequence[str | None] | None, rows: int) -> list[bool]:
        """Whether each of so many rows is asked through the template; `adapters` names theirs, None: all the last."""
        return [self.chat[name] for name in (adapters or [list(self.chat)[-1]] * rows)]


def generator_of(options: argparse.Namespace) -> Generator:
    """The model to generate with: a checkpoint, or what a run produced."""
    path, place = Path(options.model), options.model
    folders = [Path(adapter) for adapter in options.adapter]
    config = None
    if (path / "run.json").is_file():
        require_finished(path)
        if (path / "model").is_dir():
            place = path / "model"
        else:
            config, folders = config_of(path, BASE), folders or [path / "adapter"]
    if config is not None:
        if options.dtype != "auto":
            config = replace(config, model=replace(config.model, dtype=options.dtype))
        model, tokenizer = run_model(config, run_base(config), tuple(config.model.labels or ()), head_follows=True)
    else:
        info = checkpoint_info(place)
        task = objective_of("sft", info.family.objectives).task
        model, tokenizer = load(info, task, options.dtype, head_follows=bool(folders))
    if tokenizer is None:
        raise ValueError(f"{place}: no tokenizer.json there, and prompts need one")
    known: dict[str, str] = {}
    tokens = model.tokens
    chat: dict[str | None, bool] = {None: tokens.asks_as_chat}
    for folder in folders:
        whole = resolved(folder)
        called = whole.parent.name if whole.name == "adapter" else whole.name  # that of a run goes by the run's name
        if called in known:
            raise ValueError(f"--adapter {folder}: there is another called {called!r}; give one another name")
        known[called] = f"{len(known)}: {called.replace('.', '_')}"
        put_adapter(model, tokenizer, folder, known[called])
        chat[known[called]] = tokens.with_adapter(folder, tokenizer).asks_as_chat
    learn_turn_end(model, tokenizer)
    return Generator(model, tokenizer, known, chat)


def _adapters(rows: list[dict[str, Any]], known: dict[str, str]) -> list[str | None] | None:
    """The adapter of each row, or None where one or none is for all. ValueError where a row leaves it open."""
    if len(known) < 2 and not any("adapter" in row for row in rows):
        return None
    out: list[str | None] = []
    for index, row in enumerate(rows):
        if "adapter" in row and row["adapter"] is None:
            out.append(None)
            continue
        if row.get("adapter") not in known:
            raise ValueError(
                f"{place_of(row, index)}: adapter {row.get('adapter')!r} is not among the given ones "
                f"({', '.join(known) or 'none'}); name one in each row of --prompts, as adapter"
            )
        out.append(known[row["adapter"]])
    return out


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is to be continued: what options say, or else standard input."""
    for number, prompt in enumerate(options.prompt or [], 1):
        yield PlacedRow({"prompt": prompt}, "--prompt", str(number))
    if options.prompts:
        yield from read_prompts(options.prompts)
    elif not options.prompt:
        yield PlacedRow({"prompt": sys.stdin.read().rstrip("\n")}, "standard input", "")

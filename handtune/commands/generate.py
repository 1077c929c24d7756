"""`handtune generate`: continue prompts, printed or written as rows."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .._files import resolved
from .._outside import located
from ..adapted.generator import Generator, generator_of
from ..engine.data.placed_rows import PlacedRow
from ..engine.data.readers import read_prompts
from ..engine.data.schema import is_dialogue
from ..engine.generation.completions import completions
from ..engine.parallel.ranks import world_size
from ..engine.training.guards import explained_memory_error
from ..prompts import prompts_of
from ..terminal import print_text, read_standard_input
from .outputs import output, write_answers, written_to


def run_generate(options: argparse.Namespace) -> int:
    """`handtune generate`: continue prompts, printed batch by batch or written as rows."""
    _check(options)
    with output(options.out, options.force) if options.out else nullcontext() as out:
        return _generate(options, out)


def _generate(options: argparse.Namespace, out: Path | None) -> int:
    generator = generator_of(options.model, options.adapter, options.dtype)
    model = generator.model
    rows = list(_rows(options, generator))
    adapters = generator.adapters_of(rows)
    chats = [chat and not options.raw for chat in generator.asks_as_chat(adapters, len(rows))]
    if not options.raw:
        generator.tell_if_raw(rows, adapters, chats)
    prompts = prompts_of(rows, model, chats)

    temperature = options.temperature
    if temperature is None:
        temperature = float(options.beams == 1)  # a beam search samples nothing
    texts = completions(
        model, generator.tokenizer, prompts, options.max_new_tokens, batch_size=options.batch_size, stop=options.stop,
        seed=options.seed, temperature=temperature, top_k=options.top_k, top_p=options.top_p, beams=options.beams,
        length_penalty=1.0 if options.length_penalty is None else options.length_penalty, adapters=adapters,
        repetition_penalty=options.repetition_penalty, no_repeat_ngram=options.no_repeat_ngram,
    )  # fmt: skip

    # The texts are generated batch by batch, as they are written or printed.
    with explained_memory_error(next(model.parameters()).device, lambda: _less_memory(options)):
        if out is not None:
            write_answers(rows, texts, out)
            print(written_to(len(prompts), options.out))
        else:
            for number, (row, chat, prompt, text) in enumerate(zip(rows, chats, prompts, texts, strict=True)):
                # An answer and the output of a decoder are texts of their own.
                if not (chat or is_dialogue(row)) and model.task != "seq2seq-lm":
                    text = prompt + text
                print_text(("\n" if number else "") + text)
                if sys.stdout.closed and world_size() == 1:  # nobody reads it any more
                    break
    return 0


def _check(options: argparse.Namespace) -> None:
    """ValueError where an option would be without effect, or would destroy something."""
    if options.beams > 1 and (_set_options(options) or options.temperature or options.stop):
        raise ValueError("--beams look for the likeliest text: leave out --temperature, --top-k, --top-p and --stop")
    check_sampling(options)
    if options.length_penalty is not None and options.beams == 1:
        raise ValueError("--length-penalty weighs the texts of a beam search: give --beams, too")
    if options.out and options.prompts and resolved(options.out) == resolved(options.prompts):
        raise ValueError(f"--out {options.out} is the file of the prompts; give another")


def check_sampling(options: argparse.Namespace) -> None:
    """ValueError where options choose among what is sampled, and nothing is."""
    set_options = _set_options(options)
    if options.temperature == 0 and set_options:
        raise ValueError(
            f"{' and '.join(set_options)}: at --temperature 0 nothing is sampled; leave one of the two out"
        )


def _set_options(options: argparse.Namespace) -> list[str]:
    """The options that choose what is sampled from."""
    return [name for name, is_set in (("--top-k", options.top_k != 0), ("--top-p", options.top_p != 1.0)) if is_set]


def _less_memory(options: argparse.Namespace) -> str:
    """What to do where memory runs out."""
    if options.batch_size > 1:
        return f"set --batch-size {options.batch_size // 2} (it is {options.batch_size})"
    return "even one prompt is too much; shorten it, or use --dtype bfloat16"


def _rows(options: argparse.Namespace, generator: Generator) -> Iterator[PlacedRow]:
    """The rows to continue: from the options, or else from standard input."""
    for number, prompt in enumerate(options.prompt or [], 1):
        yield _single_row(prompt, "--prompt", str(number), options, generator)
    if options.prompts:
        yield from read_prompts(options.prompts) if options.raw else generator.read_prompts(options.prompts)
    elif not options.prompt:
        yield _single_row(read_standard_input().rstrip("\n"), "standard input", "", options, generator)


def _single_row(prompt: str, file: str, line: str, options: argparse.Namespace, generator: Generator) -> PlacedRow:
    """A prompt that stands by itself, in the template that the model was trained with."""
    raw: Mapping[str, Any] = {"prompt": prompt}
    template = generator.template_of(raw)
    if template is not None and not options.raw:
        with located(f"{file} {line}".rstrip()):
            raw = template.asked(raw)
    return PlacedRow(raw, file, line)

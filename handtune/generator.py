"""`handtune generate`: continue prompts, printed or written as rows."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .engine.chat import ChatTemplate
from .engine.completions import completions
from .engine.data import read_prompts
from .engine.guards import explained_memory_error
from .engine.objectives import objective_of
from .models import load
from .models.checkpoint import objectives_of
from .prepare import run_model, template_of
from .stored import config_of, put_adapter, require_finished


def run_generate(options: argparse.Namespace) -> int:
    """`handtune generate`: continue prompts, printed or written as rows, batch by batch."""
    _check(options)
    model, tokenizer = _generator(options)
    prompts = list(_prompts(options, model))
    temperature = options.temperature if options.temperature is not None else float(options.beams == 1)
    written = completions(
        model, tokenizer, prompts, options.max_new_tokens, batch_rows=options.batch_rows, stop=options.stop,
        seed=options.seed, temperature=temperature, top_k=options.top_k, top_p=options.top_p, beams=options.beams,
        length_penalty=1.0 if options.length_penalty is None else options.length_penalty,
    )  # fmt: skip
    with explained_memory_error(next(model.parameters()).device, lambda: _smaller(options)):
        if options.out:
            with Path(options.out).open("w", encoding="utf-8", buffering=1) as file:  # each row is there once written
                for prompt, text in zip(prompts, written, strict=True):
                    file.write(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) + "\n")
            print(f"{len(prompts)} rows written to {options.out}")
        else:
            answers = model.task == "seq2seq-lm"  # which are texts of their own, no continuation
            texts = (text if answers else prompt + text for prompt, text in zip(prompts, written, strict=True))
            for number, text in enumerate(texts):
                print(("\n" if number else "") + text, flush=True)
    return 0


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
    if options.batch_rows < 1:
        raise ValueError(f"--batch-rows {options.batch_rows}: expected a positive number")
    if options.out and options.prompts and Path(options.out).resolve() == Path(options.prompts).resolve():
        raise ValueError(f"--out {options.out} is the file of the prompts; give another")


def _smaller(options: argparse.Namespace) -> str:
    if options.batch_rows > 1:
        return f"set --batch-rows {options.batch_rows // 2} (it is {options.batch_rows})"
    return "even one prompt is too much; shorten it, or use --dtype bfloat16"


def _generator(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model to generate with: a checkpoint, with an adapter or without, or what a run produced."""
    path, place, adapter = Path(options.model), options.model, options.adapter
    if (path / "run.json").is_file():
        require_finished(path)
        if (path / "model").is_dir():
            place = path / "model"
        else:
            config = config_of(path)
            if options.dtype != "auto":
                config = replace(config, model=replace(config.model, dtype=options.dtype))
            model, tokenizer = run_model(config, tuple(config.model.labels or ()))
            put_adapter(model, tokenizer, Path(adapter or path / "adapter"))
            return model, tokenizer
    model, tokenizer = load(place, objective_of("sft", objectives_of(place, None)).task, options.dtype)
    if tokenizer is None:
        raise ValueError(f"{place}: no tokenizer.json there, and prompts need one")
    if adapter:
        put_adapter(model, tokenizer, Path(adapter))
    return model, tokenizer


def _prompts(options: argparse.Namespace, model: Any) -> Iterator[str]:
    yield from options.prompt or []
    rows = read_prompts(options.prompts) if options.prompts else []
    if not rows and not options.prompt:
        yield sys.stdin.read().rstrip("\n")
    for row in rows:
        if "messages" in row:
            template = template_of(model) or ChatTemplate()
            messages = row["messages"]
            yield template.render(messages[:-1] if messages[-1]["role"] == "assistant" else messages, True)
        else:
            yield row["prompt"] if "prompt" in row else row["text"]

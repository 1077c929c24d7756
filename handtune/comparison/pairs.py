"""Pairs to compare, each as (prompt, completion, completion): read from a file, or sampled from a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._shapes import parse_json
from ..adapted.generator import Generator
from ..engine.formats.text_files import read_text
from ..engine.generation.completions import completions
from ..engine.progress import counted
from ..prompts import prompts_of


def read_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """The pairs in a JSONL file."""
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
    match row:
        case {"text": prompt, "label": left, "second": right}:  # as `handtune label` writes them
            return prompt, left, right
        case {"prompt": prompt, "completions": [left, right, *_]}:
            return prompt, left, right
        case {"prompt": prompt, "chosen": left, "rejected": right} if row.get("completions") is None:
            return prompt, left, right
    known = "prompt and completions, prompt, chosen and rejected, or text, label and second"
    raise ValueError(f"{where}: expected {known}")


def sample_pairs(
    generator: Generator, path: str, max_new_tokens: int, seed: int, **sampling: Any
) -> Iterator[tuple[str, str, str]]:
    """Each prompt of a file with two completions of the model, sampled as `completions` is told."""
    rows = generator.read_prompts(path)
    chats = generator.asks_as_chat(None, len(rows))
    generator.tell_if_raw(rows, None, chats)
    prompts = prompts_of(rows, generator.model, chats)

    # A batch's seed is this plus the number of its first prompt, so that no two batches of the two sides share one.
    sides = []
    for first_seed in (seed, seed + len(prompts)):
        sides.append(
            completions(generator.model, generator.tokenizer, prompts, max_new_tokens, seed=first_seed, **sampling)
        )
    return counted(zip(prompts, *sides, strict=True), len(prompts), "pair")

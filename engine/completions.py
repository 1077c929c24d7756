"""Texts for prompts: what stands between `generate`, which knows tokens, and people."""

from collections.abc import Sequence
from typing import Any

from .generation import generate, left_padded


def completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    batch_rows: int = 16,
    stop: Sequence[str] = (),
    seed: int = 0,
    **how: Any,
) -> list[str]:
    """What the model writes after each prompt (or, an encoder-decoder, on having read it), without its end.

    `batch_rows` prompts are computed at a time; `how`: temperature, top_k, top_p, beams and length_penalty as in
    `generate`, whose errors come through.
    """
    ends, device = model.tokens.ends, next(model.parameters()).device
    written: list[str] = []
    for start in range(0, len(prompts), batch_rows):
        ids, mask = left_padded([_prompt(text, model, tokenizer) for text in prompts[start : start + batch_rows]])
        tokens = generate(
            model, ids.to(device), mask.to(device), max_new_tokens, seed=seed + start, eos_id=ends, stop=stop,
            tokenizer=tokenizer, **how,
        )  # fmt: skip
        first = 1 if model.task == "seq2seq-lm" else ids.shape[1]
        written += [_ended(row, ends, stop, tokenizer) for row in tokens[:, first:].tolist()]
    return written


def _prompt(text: str, model: Any, tokenizer: Any) -> list[int]:
    """A prompt's tokens as they were in training: for an encoder-decoder with the end token behind them."""
    ids, end = tokenizer.encode(text, add_special_tokens=False).ids, model.tokens.eos_id
    if model.task == "seq2seq-lm" and end is not None:
        return [*ids, end]
    return ids or [end or 0]


def _ended(ids: list[int], ends: Sequence[int], stop: Sequence[str], tokenizer: Any) -> str:
    """The text of a completion up to its first end token or stop string."""
    text = tokenizer.decode(ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))])
    cuts = [at for word in stop if (at := text.find(word)) >= 0]
    return text[: min(cuts)] if cuts else text

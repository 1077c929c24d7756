"""Texts for prompts: what stands between `generate`, which knows tokens, and people."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from ..adapters.switch import use_adapter
from ..data.text import completion_text, prompt_tokens
from .sampling import generate, left_padded, stop_texts


def completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    batch_size: int = 16,
    stop: Sequence[str] = (),
    seed: int = 0,
    adapters: Sequence[str | None] | None = None,
    **how: Any,
) -> Iterator[str]:
    """What the model writes after each prompt (or, an encoder-decoder, on having read it), without its end.

    `batch_size` prompts are computed at a time, each batch by a seed of its own (`seed` and the number of its first
    row), so that a prompt given again is answered anew. `adapters` names one for each prompt, or None for the base
    model; without them the active one answers. `how`: temperature, top_k, top_p, beams and length_penalty as
    in `generate`, whose errors come through. ValueError where a prompt is too long, before any is answered.
    """
    ends = list(model.tokens.ends)
    words = stop_texts(tokenizer, stop, ends)
    ids = _prompts(prompts, model, tokenizer)
    limit = model.config.max_positions
    for row, tokens in enumerate(ids, 1):
        if limit is not None and len(tokens) + max_new_tokens - 1 > limit:
            raise ValueError(
                f"prompt {row} has {len(tokens)} tokens, and {max_new_tokens} new ones would exceed the model's "
                f"{limit} positions; shorten one of them"
            )
    return _answers(model, tokenizer, ids, max_new_tokens, batch_size, ends, words, seed, adapters, how)


def _answers(
    model: Any,
    tokenizer: Any,
    ids: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    ends: list[int],
    words: list[str],
    seed: int,
    adapters: Sequence[str | None] | None,
    how: dict[str, Any],
) -> Iterator[str]:
    device = next(model.parameters()).device
    for start in range(0, len(ids), batch_size):
        batch, mask = left_padded(ids[start : start + batch_size])
        by_row = nullcontext() if adapters is None else use_adapter(model, adapters[start : start + batch_size])
        try:
            with by_row:
                found = generate(
                    model, batch.to(device), mask.to(device), max_new_tokens, seed=seed + start, eos_id=ends,
                    stop=words, tokenizer=tokenizer, **how,
                )  # fmt: skip
        except FloatingPointError as error:
            raise FloatingPointError(f"prompts {start + 1} to {start + len(batch)}: {error}") from None
        answers = model.task == "seq2seq-lm"  # which are texts of their own
        first = 1 if answers else batch.shape[1]
        for prompt, row in zip(ids[start : start + batch_size], found[:, first:].tolist(), strict=True):
            yield text_of(row, ends, words, tokenizer, () if answers else prompt)


def _prompts(texts: Sequence[str], model: Any, tokenizer: Any) -> list[list[int]]:
    """The prompts' tokens as they were in training: for an encoder-decoder with the end token behind them."""
    end = model.tokens.eos_id
    if model.task == "seq2seq-lm" and end is not None:
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[*encoding.ids, end] for encoding in encodings]
    return [ids or [end or 0] for ids in prompt_tokens(tokenizer, texts)]


def text_of(
    ids: Sequence[int], ends: Sequence[int], stop: Sequence[str], tokenizer: Any, prompt: Sequence[int] = ()
) -> str:
    """The text of a completion, behind the tokens of its prompt, up to its first end token or stop string."""
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = completion_text(tokenizer, prompt, ids[:end])
    cuts = [at for word in stop if (at := text.find(word)) >= 0]
    return text[: min(cuts)] if cuts else text

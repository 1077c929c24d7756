"""Texts for prompts: what stands between `generate`, which knows tokens, and people."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from ..adapters.switch import use_adapter
from ..data.text import completion_text, prompt_tokens
from ..parallel.ranks import spread, world_size
from .sampling import continuations, stop_texts


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
    **sampling: Any,
) -> Iterator[str]:
    """What the model writes after each prompt (or, an encoder-decoder, on having read it), without its end.

    `batch_size` prompts are computed at a time, each batch by a seed of its own (`seed` and the number of its first
    row), so that a prompt given again is answered anew. `adapters` names one for each prompt, or None for the base
    model; without them the active one answers. `sampling`: temperature, top_k, top_p, beams and length_penalty as
    in `generate`, whose errors come through. ValueError where a prompt is too long, before any is answered.
    """
    ends = list(model.tokens.ends)  # `stop_texts` may add to them
    stop = stop_texts(tokenizer, stop, ends)
    prompt_ids = _tokenize_prompts(prompts, model, tokenizer)
    limit = model.config.max_positions
    for row, ids in enumerate(prompt_ids, 1):
        if limit is not None and len(ids) + max_new_tokens - 1 > limit:
            raise ValueError(
                f"prompt {row} has {len(ids)} tokens, and {max_new_tokens} new ones would exceed the model's "
                f"{limit} positions; shorten one of them"
            )

    def write(_: int, start: int) -> list[str]:
        """The texts of the batch that begins with this prompt."""
        batch = prompt_ids[start : start + batch_size]
        by_row = nullcontext() if adapters is None else use_adapter(model, adapters[start : start + batch_size])
        try:
            with by_row:
                written = continuations(
                    model, batch, max_new_tokens, seed=seed + start, eos_id=ends, stop=stop, tokenizer=tokenizer,
                    **sampling,
                )  # fmt: skip
        except FloatingPointError as error:
            raise FloatingPointError(f"prompts {start + 1} to {start + len(batch)}: {error}") from None

        # What an encoder-decoder writes is no prompt's continuation.
        before = [() if model.task == "seq2seq-lm" else prompt for prompt in batch]
        return [text_of(ids, ends, stop, tokenizer, prompt) for prompt, ids in zip(before, written, strict=True)]

    # Several processes write a batch each at a time. A generator is made here, so that the errors above come with the
    # call and not with the first text.
    starts = range(0, len(prompt_ids), batch_size)
    n = world_size()
    return (text for i in range(0, len(starts), n) for texts in spread(starts[i : i + n], write) for text in texts)


def _tokenize_prompts(texts: Sequence[str], model: Any, tokenizer: Any) -> list[list[int]]:
    """The prompts' tokens as they were in training: for an encoder-decoder with the end token behind them."""
    end = model.tokens.eos_id
    if model.task == "seq2seq-lm" and end is not None:
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[*encoding.ids, end] for encoding in encodings]
    return [ids or [end or 0] for ids in prompt_tokens(tokenizer, texts)]


def first_end(ids: Sequence[int], ends: Sequence[int]) -> int:
    """Where the first end token stands; behind all tokens if there is none."""
    return next((i for i, token in enumerate(ids) if token in ends), len(ids))


def text_of(
    ids: Sequence[int], ends: Sequence[int], stop: Sequence[str], tokenizer: Any, prompt: Sequence[int] = ()
) -> str:
    """The text of a completion, behind the tokens of its prompt, up to its first end token or stop string."""
    text = completion_text(tokenizer, prompt, ids[: first_end(ids, ends)])
    cuts = [at for string in stop if (at := text.find(string)) >= 0]
    return text[: min(cuts, default=len(text))]

"""Text to tokens and back, for models that write: what begins a text, what ends it, and where a prompt stops.

Three rules hold for pretraining, fine-tuning, preferences, rewards, PPO and generation alike:

- A text begins with the tokens that the tokenizer's post-processor puts in front of one (Llama's <s>), exactly once.
- A prompt's tokens are its own, as generation will see them, whatever follows. Tokenizers may merge across the seam
  ("\\n\\n" is one token at the end of a prompt, two in front of a word), and those of SentencePiece's kind put a space
  in front of every text that they are given, which a completion must not get.
- A completion is decoded behind its prompt: alone, such tokenizers would take its first space away.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Span = tuple[int, int]  # first character, and the one after the last

# Texts to tokenise a completion behind: nothing merges across the end of at least one of them. The last is no text.
ANCHORS = ("\n", "x", ".", "")


def bos_ids(tokenizer: "Tokenizer") -> list[int]:
    """The special tokens that the tokenizer's post-processor puts in front of a text: mostly one, or none."""
    # Tokens that the post-processor adds belong to no sequence.
    encoding = tokenizer.encode("a")
    first = next((i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None), 0)
    return encoding.ids[:first]


def prepend_bos(ids: list[int], begin: list[int]) -> list[int]:
    """The tokens of a text with `begin` in front, which it may have already."""
    if ids[: len(begin)] == begin:
        return ids
    return [*begin, *ids]


def prompt_tokens(tokenizer: "Tokenizer", prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt, as a causal model reads it."""
    begin = bos_ids(tokenizer)
    encodings = tokenizer.encode_batch(list(prompts), add_special_tokens=False)
    return [prepend_bos(encoding.ids, begin) for encoding in encodings]


def tokenize_pairs(tokenizer: "Tokenizer", pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], int]]:
    """Of texts (prompt, completion) the tokens of both together, and how many of them are the prompt's."""
    begin = bos_ids(tokenizer)
    texts = [prompt + completion for prompt, completion in pairs]
    prompt_encodings = tokenizer.encode_batch([prompt for prompt, _ in pairs], add_special_tokens=False)
    text_encodings = tokenizer.encode_batch(texts, add_special_tokens=False)

    for (_, completion), prompt, text in zip(pairs, prompt_encodings, text_encodings, strict=True):
        prompt_ids = prompt.ids
        text_ids = text.ids
        completion_ids = text_ids[len(prompt_ids) :]
        if text_ids[: len(prompt_ids)] != prompt_ids:  # a token lies across the seam
            completion_ids = _behind(tokenizer, completion, prompt_ids, text_ids)
        prompt_ids = prepend_bos(prompt_ids, begin)
        yield [*prompt_ids, *completion_ids], len(prompt_ids)


def _behind(tokenizer: "Tokenizer", completion: str, prompt_ids: list[int], text_ids: list[int]) -> list[int]:
    """A completion's tokens, where a token of the whole text lies across its beginning.

    They are the first of several attempts that give the text again, when they are decoded behind the prompt.
    """
    text = tokenizer.decode(text_ids, skip_special_tokens=False)
    *behind_anchors, alone = [ids for ids, _ in _continuations(tokenizer, completion)]
    for ids in (alone, *behind_anchors):
        if tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=False) == text:
            return ids
    return alone


def _continuations(tokenizer: "Tokenizer", text: str, start: int = 0) -> Iterator[tuple[list[int], list[Span]]]:
    """Tokens and offsets of a text that goes on from another, at its character `start`.

    They are made behind each anchor whose own tokens stay as they are, and at last of the text alone.
    """
    for anchor in ANCHORS:
        anchor_ids = tokenizer.encode(anchor, add_special_tokens=False).ids
        encoding = tokenizer.encode(anchor + text, add_special_tokens=False)
        n_anchor = len(anchor_ids)

        # Otherwise the anchor was merged with what follows, and can't be taken off.
        if encoding.ids[:n_anchor] == anchor_ids:
            shift = start - len(anchor)
            offsets = [(first + shift, last + shift) for first, last in encoding.offsets[n_anchor:]]
            yield encoding.ids[n_anchor:], offsets


def encode_with_seams(
    tokenizer: "Tokenizer", text: str, encoding: "Encoding", seams: Sequence[int]
) -> tuple[list[int], list[Span]]:
    """Tokens and offsets of a text; at each of the `seams` those before it end as what stands there alone does.

    seams: characters where an answer begins behind its prompt. encoding: of the whole text, whose tokens these are
    where no seam makes a difference.
    """
    prompts = tokenizer.encode_batch([text[:seam] for seam in seams], add_special_tokens=False)
    pairs = zip(seams, prompts, strict=True)
    crossed = [seam for seam, prompt in pairs if encoding.ids[: len(prompt.ids)] != prompt.ids]
    if not crossed:
        return encoding.ids, encoding.offsets

    # Put together from parts: the text before the first seam that a token crosses, and what follows each of those.
    first_part = tokenizer.encode(text[: crossed[0]], add_special_tokens=False)
    ids = first_part.ids
    offsets = first_part.offsets
    for start, stop in zip(crossed, [*crossed[1:], len(text)], strict=True):
        part_ids, part_offsets = next(_continuations(tokenizer, text[start:stop], start))
        ids = [*ids, *part_ids]
        offsets = [*offsets, *part_offsets]
    return ids, offsets


def append_eos(ids: list[int], start: int, eos: int | None, turn_ends: Sequence[int] = ()) -> list[int]:
    """A text with the token behind it that ends it; the first `start` tokens are its prompt's.

    Of several that a model knows, it is the one that ended the last turn in the prompt, as its chats are written, else
    `eos`.
    """
    ends = (eos, *turn_ends)
    if eos is None or (ids and ids[-1] in ends):
        return ids
    last_end = next((token for token in reversed(ids[:start]) if token in ends), eos)
    return [*ids, last_end]


def completion_text(tokenizer: "Tokenizer", prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens `ids` behind those of their prompt, special tokens left out."""
    prompt_text = tokenizer.decode(list(prompt))
    text = tokenizer.decode([*prompt, *ids])
    if text.startswith(prompt_text):
        return text[len(prompt_text) :]
    return tokenizer.decode(list(ids))

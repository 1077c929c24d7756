"""Encoder-decoder models: a source to read, and a target to write behind the start token.

    prompt/completion                      input_ids, target_ids
    text, text/label, prompt/completion    input_ids, of which spans are taken out: pretraining

Of a prompt and a completion that are too long the end is cut, and texts are split into windows. The loss is that of
`causal_lm.py`. Rows are padded on the right, sources and targets each to their longest: the position biases of such
models don't go with packed rows.

Pretraining is span corruption (Raffel et al. 2020, sections 3.1.4 and 3.3.4, arXiv:1910.10683): of a text, 15 % of the
tokens are taken out in spans of 3 on average, a different sentinel `<extra_id_N>` in the place of each, and the target
is what was taken out, each span behind its sentinel.

    text      Thank you for inviting me to your party last week .
    source    Thank you <extra_id_0> me to your party <extra_id_1> week . </s>
    target    <extra_id_0> for inviting <extra_id_1> last </s>

As in the code that trained the published models, and unlike the paper's figure, no sentinel follows the last span; a
text begins with a token that stays and ends with a span. Spans are drawn anew each time a row comes up, from torch's
generator, whose state is in every checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.batches import Batch, padded
from ..data.placed_rows import PlacedRow
from .common import Encoded, Settings, joined_text

# As in the paper.
SPAN_SHARE = 0.15  # of a text's tokens, that is taken out
MEAN_SPAN = 3.0  # tokens


def seq2seq(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """A prompt to read and a completion to write, each ended by `eos`. A completion that is cut has no end."""
    # The end is added here and not by the tokenizer, so that a prompt that is cut has one, too.
    end = [] if settings.eos is None else [settings.eos]
    limit = settings.room(len(end))
    prompts, completions = (
        settings.tokenizer.encode_batch([row[field] for row in rows], add_special_tokens=False)
        for field in ("prompt", "completion")
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        source = prompt.ids[:limit] + end
        target = (completion.ids + end)[: settings.max_length]
        longest = max(len(prompt), len(completion))
        examples = [{"input_ids": source, "target_ids": target}] if source and completion.ids else []
        yield Encoded(
            examples, len(target), truncated=longest > limit, masked=not completion.ids, length=longest + len(end)
        )


def windows(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """A text in windows without special tokens, of which spans are taken out later; every token can become a target."""
    texts = [joined_text(row) for row in rows]
    for encoding in settings.tokenizer.encode_batch(texts, add_special_tokens=False):
        ids = encoding.ids
        length = settings.max_length
        examples = [{"input_ids": ids[start : start + length]} for start in range(0, len(ids), length)]
        yield Encoded(examples, len(ids))


@dataclass(frozen=True)
class SpanCorruption:
    """Takes spans out of a text, each of which a sentinel stands for."""

    sentinels: tuple[int, ...]  # ids
    eos: int | None  # ends source and target

    @classmethod
    def of(cls, tokenizer: Any, eos: int | None) -> "SpanCorruption":
        """With the tokenizer's `<extra_id_0>`, `<extra_id_1>`, ...; ValueError where it has none."""
        sentinels: list[int] = []
        while (token := tokenizer.token_to_id(f"<extra_id_{len(sentinels)}>")) is not None:
            sentinels.append(token)
        if not sentinels:
            raise ValueError("pretraining an encoder-decoder needs a tokenizer with <extra_id_0>, <extra_id_1>, ...")
        return cls(tuple(sentinels), eos)

    def __call__(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Source and target for a text of at least one token. ValueError where it has more spans than sentinels."""
        end = [] if self.eos is None else [self.eos]
        source: list[int] = []
        target: list[int] = []
        start = 0
        for sentinel, (n_stay, n_span) in zip(self.sentinels, self._lengths(len(ids)), strict=False):
            span = start + n_stay
            source += [*ids[start:span], sentinel]
            target += [sentinel, *ids[span : span + n_span]]
            start = span + n_span
        return source + end, target + end

    def _lengths(self, n: int) -> list[tuple[int, int]]:
        """Lengths of the runs that stay and of the spans that follow them."""
        if n == 1:
            return [(0, 1)]

        # One token stays at least, and one in front of each span.
        n_taken = min(max(round(n * SPAN_SHARE), 1), n - 1)
        n_spans = min(max(round(n_taken / MEAN_SPAN), 1), n - n_taken)
        if n_spans > len(self.sentinels):
            most = int(len(self.sentinels) * MEAN_SPAN / SPAN_SHARE)
            raise ValueError(
                f"a row of {n} tokens has {n_spans} spans, but the tokenizer {len(self.sentinels)} sentinels "
                f"<extra_id_N>; set data.max_length to at most {most}"
            )
        return list(zip(_parts(n - n_taken, n_spans), _parts(n_taken, n_spans), strict=True))


def _parts(n: int, parts: int) -> list[int]:
    """A random division of n into so many positive numbers, each division as likely as any other."""
    cuts = (torch.randperm(n - 1)[: parts - 1] + 1).sort().values.tolist()
    lengths: list[int] = np.diff([0, *cuts, n]).tolist()
    return lengths


@dataclass(frozen=True)
class Seq2SeqCollate:
    """Make a batch of examples {"input_ids": source, "target_ids"}, or of texts {"input_ids"} with a `corruption`.

    `batch["inputs"]` are input_ids, attention_mask and decoder_input_ids (the targets behind `start_id`, without their
    last token); `index` and `targets` (n,) as in `Collate`; `lengths` counts source and target.
    """

    pad_id: int
    start_id: int  # what the decoder's input begins with
    corruption: SpanCorruption | None = None  # makes source and target of a text; None: examples have both

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        if self.corruption is None:
            pairs = [(example["input_ids"], example["target_ids"]) for example in examples]
        else:
            pairs = [self.corruption(np.asarray(example["input_ids"]).tolist()) for example in examples]
        sources, targets = zip(*pairs, strict=True)

        # The decoder sees at each position the target before it.
        inputs = padded(sources, self.pad_id)
        shifted = padded([[self.start_id, *target[:-1]] for target in targets], self.pad_id)  # (B, T)
        return {
            "inputs": {**inputs, "decoder_input_ids": shifted["input_ids"]},
            "index": shifted["attention_mask"].flatten().nonzero()[:, 0],
            "targets": torch.tensor([token for target in targets for token in target]),
            "counts": [len(target) for target in targets],
            "lengths": [len(source) + len(target) for source, target in pairs],
        }


def sources_and_targets(model: Any, tokenizer: Any, packing: bool) -> Seq2SeqCollate:
    """Padded whatever `packing` says: an encoder-decoder's biases don't go with packed rows."""
    return Seq2SeqCollate(model.tokens.pad_id or 0, model.config.start_id)


def corrupted_spans(model: Any, tokenizer: Any, packing: bool) -> Seq2SeqCollate:
    """The same with spans taken out."""
    corruption = SpanCorruption.of(tokenizer, model.tokens.eos_id)
    return Seq2SeqCollate(model.tokens.pad_id or 0, model.config.start_id, corruption)

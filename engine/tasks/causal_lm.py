"""Next-token prediction: the methods pretrain and sft.

Targets are shifted: targets[i] follows position i, or is -100 where no loss is wanted. A row of n tokens gives n - 1
positions, and `max_length` counts positions: what the model sees.

    method      fields of a row                             fields of its examples
    pretrain    text, text/label, prompt/completion,        input_ids, targets: loss on every token
                messages
    sft         prompt/completion, messages, text           input_ids, targets: loss on completion or assistant only;
                                                            of messages several, where a template rewrites earlier turns

Text that is too long becomes windows, and no token is lost. A row with a loss mask is cut instead: its end, or, as
`truncate` says, its beginning (but not the tokens that begin every text), or it is dropped; so is a row without any
target left. All these count as truncated.

Texts begin with what the tokenizer's post-processor puts in front (a template's BOS is not doubled), and text and
completions end with `eos` (in sft not after messages, where the template ends turns). `text.py` says more, also of
where a prompt ends.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..._outside import located
from ...kernels import Linear, linear_cross_entropy
from ...kernels.activations import soft_capped
from ...kernels.linear import bind_projection
from ..chat.fields import check_used, trained_turns
from ..chat.template import Dialogue, token_mask
from ..chat.turns import ChatTargets, drops_thinking
from ..data.batches import IGNORE, Batch
from ..data.placed_rows import PlacedRow
from ..data.text import append_eos, bos_ids, encode_with_seams, prepend_bos, tokenize_pairs
from .common import Encoded, LossFn, Settings, features, joined_text, select, smoothing_penalty
from .metrics import perplexity

CHUNK_LOGITS = 2**24  # that a head with an adapter makes at a time: 64 MiB in fp32


def every_token(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """Loss on every token; long texts become windows, each token but the first a target exactly once."""
    length = settings.max_length
    begin = bos_ids(settings.tokenizer)
    texts = [_text_to_train(row, settings) for row in rows]
    for encoding in settings.tokenizer.encode_batch(texts, add_special_tokens=False):
        ids = append_eos(prepend_bos(encoding.ids, begin), 0, settings.eos, settings.turn_ends)
        examples = []
        # Of an empty row there are only the tokens that begin and end a text, which are no example.
        if encoding.ids:
            # Windows of length + 1 tokens share one: the last target of each is the first input of the next.
            for start in range(0, len(ids) - 1, length):
                window = ids[start : start + length + 1]
                examples.append({"input_ids": window[:-1], "targets": window[1:]})
        targets = max(0, len(ids) - 1)
        # masked: a text of one token has nothing to predict
        yield Encoded(examples, targets, masked=len(ids) == 1 and bool(encoding.ids), length=targets)


def _text_to_train(row: PlacedRow, settings: Settings) -> str:
    if "messages" not in row:
        return joined_text(row)
    assert settings.template is not None  # encode() gives one where there are messages
    messages = row["messages"]
    with located(row.location):
        if len(trained_turns(messages)) < sum(message["role"] == "assistant" for message in messages):
            raise ValueError("messages: pretrain trains on every token, also of turns that are not to be trained")

        dialogue = Dialogue(settings.template, messages, row.get("template_arguments", {}))
        check_used(dialogue)
        text = dialogue.text(len(messages))
        # sft would train this thinking; pretrain would lose it without a word.
        for turn, message in enumerate(messages):
            if message["role"] == "assistant" and drops_thinking(message, text):
                raise ValueError(f"messages[{turn}]: the chat template drops its thinking, which sft would train")
    return text


def completion(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """Loss on the completion of a prompt, and on the end behind it."""
    pairs = [(row["prompt"], row["completion"]) for row in rows]
    for ids, seam in tokenize_pairs(settings.tokenizer, pairs):
        ids = append_eos(ids, seam, settings.eos, settings.turn_ends)
        yield _with_loss([(ids, [i >= seam for i in range(len(ids))])], settings)


def chat(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """One example of a dialogue, or several where the template rewrites what was said before: see `turns.py`."""
    assert settings.template is not None  # encode() gives one where there are messages
    targets = ChatTargets(settings.template, settings.tokenizer)
    rendered = []
    for row in rows:
        with located(row.location):
            turns = trained_turns(row["messages"])
            rendered.append(targets.trained(row["messages"], turns, **row.get("template_arguments", {})))

    all_texts = [dialogue.text for dialogues in rendered for dialogue in dialogues]
    encodings = iter(settings.tokenizer.encode_batch(all_texts, add_special_tokens=False))
    begin = bos_ids(settings.tokenizer)
    ends = settings.ends_of_turns
    for dialogues in rendered:
        texts = []
        for dialogue in dialogues:
            # Which tokens are targets: those that hold a character of a trained turn.
            starts = [start for start, _ in dialogue.spans]
            ids, offsets = encode_with_seams(settings.tokenizer, dialogue.text, next(encodings), starts)
            mask = token_mask(offsets, dialogue.spans)
            ids = prepend_bos(ids, begin)
            mask = [False] * (len(ids) - len(mask)) + mask

            # Where the template ends the last trained turn in plain text, `eos` takes the place of what follows it.
            if settings.eos is not None and True in mask:
                stop = len(mask) - mask[::-1].index(True)
                if ids[stop - 1] not in ends:
                    ids = [*ids[:stop], settings.eos]
                    mask = [*mask[:stop], True]
            texts.append((ids, mask))
        yield _with_loss(texts, settings)


def _with_loss(texts: Sequence[tuple[list[int], list[bool]]], settings: Settings) -> Encoded:
    """An example of each text, with loss on the tokens in its mask (the first token has nothing that predicts it)."""
    examples = []
    n_targets = 0
    truncated = False
    for ids, mask in texts:
        positions = _truncated_positions(ids, settings.max_length + 1, settings)
        truncated |= len(positions) < len(ids)
        ids = select(ids, positions)
        in_loss = select(mask, positions)[1:]

        # Shifted: position i sees the tokens up to i and predicts the next one.
        if any(in_loss):
            targets = [token if trained else IGNORE for token, trained in zip(ids[1:], in_loss, strict=True)]
            examples.append({"input_ids": ids[:-1], "targets": targets})
        n_targets += sum(in_loss)
    longest = max((len(ids) for ids, _ in texts), default=1)
    return Encoded(examples, n_targets, truncated, masked=not examples, length=longest - 1)


def _truncated_positions(ids: list[int], limit: int, settings: Settings) -> Sequence[int]:
    """The positions of a row that stay, of which the last is a target only."""
    length = len(ids)
    if length <= limit:
        return range(length)
    if settings.truncate == "drop":
        return range(0)
    if settings.truncate == "end":
        return range(limit)

    # Cut at the beginning, behind the tokens that begin every text.
    begin = bos_ids(settings.tokenizer)
    first = len(begin) if ids[: len(begin)] == begin else 0
    return [*range(first), *range(length - limit + first, length)]


def causal_lm_loss(model: Any, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Cross-entropy of the next token (an encoder-decoder's in what it writes), at the positions with a target."""
    states = features(model, batch)  # (B, T, D)
    targets = batch["targets"]  # (n,)
    head = model.head
    # The mean of soft-capped logits, which a smoothed loss needs, is no logit of a mean row.
    if head.active is not None or (label_smoothing and head.softcap is not None):
        states = states.flatten(0, -2)[batch["index"]]  # (n, D)
        return _chunked_cross_entropy(states, head, targets, label_smoothing), len(targets)
    loss = linear_cross_entropy(
        states, head.weight, targets, head.bias, index=batch["index"], softcap=head.softcap
    )  # fmt: skip
    if label_smoothing:
        states = states.flatten(0, -2)[batch["index"]]  # (n, D)
        loss = loss + label_smoothing * smoothing_penalty(states, head.weight, targets, head.bias)
    return loss, len(targets)


def _chunked_cross_entropy(states: Tensor, head: Linear, targets: Tensor, label_smoothing: float) -> Tensor:
    """The sum for states (n, D) by a head's logits, adapter included, 64 MiB at a time, made again for the gradient."""

    def chunk_loss(states: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        logits = soft_capped(project(states).float(), head.softcap)  # (chunk, V)
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)

    chunk = max(1, CHUNK_LOGITS // head.out_features)
    losses = []
    for chunk_states, chunk_targets in zip(states.split(chunk), targets.split(chunk), strict=True):
        # Bound now, once a chunk: the backward pass has to meet the same adapter and the same dropout mask again.
        project = bind_projection(chunk_states, head)
        losses.append(checkpoint(chunk_loss, chunk_states, chunk_targets, project, use_reentrant=False))
    return torch.stack(losses).sum()


class PerplexityScore:
    """exp of the mean loss. It needs neither labels nor examples nor rows."""

    def __init__(self, loss: LossFn, *_: Any):
        self.loss = loss

    def predict(self, model: Any, batch: Batch) -> tuple[Tensor, float, None]:
        return *self.loss(model, batch), None

    def add(self, predicted: None) -> None:
        pass

    def result(self, loss: float) -> dict[str, Any]:
        return {"perplexity": perplexity(loss)}

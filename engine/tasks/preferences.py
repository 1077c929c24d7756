"""Comparisons as training examples: a prompt with the answer that was chosen and the one that was rejected.

An example holds both sides whole (prompt, answer, end of text) and where each answer begins, so that a reward model can
read a side to its last token, and DPO the log-probabilities of an answer's tokens. A row may say `tie` (neither is
better) and `margin`, how much better the chosen one is at least, in units of the reward (Llama 2, arXiv:2307.09288,
section 3.2.2). Rows whose sides are equal, or one of them empty, teach nothing and are dropped.

A side that is longer than `max_length` loses its end; with `truncate` "start" both sides lose as much of the prompt's
beginning first, with "drop" the row is dropped. So is one of whose answers nothing is left.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..adapters.switch import use_adapter
from ..chat.fields import trained_turns
from ..chat.forms import text_of
from ..chat.turns import ChatTargets
from ..data.batches import Batch, Batches, Examples, packed, to_device
from ..data.encode_report import Encoded
from ..data.placed_rows import place_of
from ..data.text import append_eos, beginning, tokenize_pairs
from ..runtime import in_eval_mode
from .encoding import Numbered, Settings
from .losses import answer_logps

SIDES = ("chosen", "rejected")
CHUNK = 8192  # tokens of a pass without gradients


def comparisons(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """Examples of `prompt/chosen/rejected` rows: `chosen` and `rejected` token ids, `starts` of the answers in them."""
    texts = [_texts(index, row, settings) for index, row in rows]
    tokenizer, begin, ends = settings.tokenizer, beginning(settings.tokenizer), settings.ends_of_turns
    sides = [list(tokenize_pairs(tokenizer, [(text[0], text[1 + side]) for text in texts])) for side in range(2)]
    for (_, row), text, chosen, rejected in zip(rows, texts, *sides, strict=True):
        ids, starts = [chosen[0], rejected[0]], [chosen[1], rejected[1]]
        # A chat template ends turns itself, if not in plain text.
        if isinstance(row["prompt"], str) or any(side and side[-1] not in ends for side in ids):
            ids = [
                append_eos(side, start, settings.eos, settings.more_ends)
                for side, start in zip(ids, starts, strict=True)
            ]
        if text[1] == text[2] or not (text[1] and text[2]):
            yield Encoded([], masked=True)
            continue
        length = max(map(len, ids))
        over = max(0, length - settings.max_length)
        if over and settings.truncate == "drop":
            yield Encoded([], truncated=True, masked=True, length=length)
            continue

        # Both sides lose the same of the prompt, which stays one, and no answer loses its beginning.
        cut = min(over, *(start - len(begin) for start in starts)) if settings.truncate == "start" else 0
        kept = [[*begin, *side[len(begin) + cut :]][: settings.max_length] for side in ids]
        starts = [start - cut for start in starts]
        if kept[0] == kept[1] or any(len(side) <= start for side, start in zip(kept, starts, strict=True)):
            yield Encoded([], truncated=True, masked=True, length=length)
            continue
        example = dict(zip(SIDES, kept, strict=True)) | {"starts": starts}
        example |= {"margin": row.get("margin", 0.0), "tie": row.get("tie", False)}
        yield Encoded([example], sum(map(len, kept)), 1, truncated=over > 0, length=length)


def _texts(index: int, row: Mapping[str, Any], settings: Settings) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as text; of a chat's answers what the model writes, to the end of the turn."""
    if isinstance(row["prompt"], str):
        return row["prompt"], row["chosen"], row["rejected"]
    assert settings.template is not None  # encode() gives one where there are messages
    targets, arguments = ChatTargets(settings.template, settings.tokenizer), row.get("template_arguments", {})
    history = row["prompt"]
    try:
        for side in SIDES:
            _check_answer(row[side], side)
        chosen, rejected = (targets.answered([*history, *row[side]], len(history), **arguments) for side in SIDES)
    except ValueError as error:
        raise ValueError(f"{place_of(row, index)}: {error}") from None

    prompts = [prompt for prompt in chosen if prompt in rejected]
    if not prompts:
        raise ValueError(
            f"{place_of(row, index)}: the chat template asks otherwise for the chosen answer than for the rejected"
        )
    empty = {side: not any(_says_something(message) for message in row[side]) for side in SIDES}
    return (
        prompts[0],
        "" if empty["chosen"] else chosen[prompts[0]],
        "" if empty["rejected"] else rejected[prompts[0]],
    )


def _check_answer(messages: Sequence[Mapping[str, Any]], side: str) -> None:
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise ValueError(f"{side} must begin and end with a message of the assistant")
    answers = sum(message["role"] == "assistant" for message in messages)
    if len(trained_turns(messages)) < answers:
        raise ValueError(f"{side}: an answer is compared as a whole; take weight or train out of its messages")


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls") or text_of(message.get("content") or "").strip())


class PairCollate:
    """Batches of comparisons: the chosen sides, then the rejected ones, 2B rows packed end to end.

    `index` and `targets` (n,) are the answers' tokens and the positions that predict them, `counts` how many each side
    has; `margins` and `ties` (B,); `reference` (2B,) the reference model's log-probabilities of the answers, where the
    examples have them.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        rows = [example[side] for side in SIDES for example in examples]
        starts = [example["starts"][side] for side in range(2) for example in examples]
        begins = np.cumsum([0, *(len(row) for row in rows[:-1])])
        first = [max(start, 1) for start in starts]  # nothing predicts the first token of a row
        index = [
            begin + np.arange(start - 1, len(row) - 1) for begin, start, row in zip(begins, first, rows, strict=True)
        ]
        targets = [np.asarray(row[start:], dtype=np.int64) for row, start in zip(rows, first, strict=True)]
        batch: Batch = {
            "inputs": packed(rows),
            "lengths": [len(row) for row in rows],
            "index": torch.from_numpy(np.concatenate(index)),
            "targets": torch.from_numpy(np.concatenate(targets)),
            "counts": [len(target) for target in targets],
            "margins": torch.tensor([float(example["margin"]) for example in examples]),
            "ties": torch.tensor([bool(example["tie"]) for example in examples]),
        }
        if "reference" in examples[0]:
            batch["reference"] = torch.tensor([example["reference"][side] for side in range(2) for example in examples])
        return batch


@torch.no_grad()
def add_reference(model: Any, examples: Examples) -> None:
    """Give each comparison the log-probabilities of its answers by the model as it is, without adapters.

    Before training that is the reference of DPO: computed once, it costs no second model and no pass a step.
    """
    device, chunks = next(model.parameters()).device, Batches(examples, PairCollate(), tokens=CHUNK, shuffle=False)
    found: list[list[float]] = []
    with in_eval_mode(model), use_adapter(model, None):
        for (batch,) in tqdm(chunks, desc="reference", unit="batch", disable=None):
            chosen, rejected = answer_logps(model, to_device(batch, device)).chunk(2)
            found += torch.stack((chosen, rejected), 1).tolist()
    for example, reference in zip(examples, found, strict=True):
        example["reference"] = reference

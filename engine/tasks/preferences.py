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
CHUNK_TOKENS = 8192  # of a pass without gradients


def comparisons(rows: Numbered, settings: Settings) -> Iterator[Encoded]:
    """Examples of `prompt/chosen/rejected` rows: `chosen` and `rejected` token ids, `starts` of the answers in them."""
    begin = beginning(settings.tokenizer)
    ends = settings.ends_of_turns
    texts = [_texts(index, row, settings) for index, row in rows]
    chosen_sides = tokenize_pairs(settings.tokenizer, [(prompt, chosen) for prompt, chosen, _ in texts])
    rejected_sides = tokenize_pairs(settings.tokenizer, [(prompt, rejected) for prompt, _, rejected in texts])
    for (_, row), (_, *answers), chosen, rejected in zip(rows, texts, chosen_sides, rejected_sides, strict=True):
        if answers[0] == answers[1] or not all(answers):
            yield Encoded([], masked=True)
            continue

        # A chat template ends turns itself, if not in plain text.
        sides = [chosen[0], rejected[0]]
        starts = [chosen[1], rejected[1]]  # of the answers
        if isinstance(row["prompt"], str) or any(ids and ids[-1] not in ends for ids in sides):
            sides = [
                append_eos(ids, start, settings.eos, settings.more_ends)
                for ids, start in zip(sides, starts, strict=True)
            ]

        length = max(map(len, sides))
        excess = max(0, length - settings.max_length)
        if excess and settings.truncate == "drop":
            yield Encoded([], truncated=True, masked=True, length=length)
            continue

        # Both sides lose the same of the prompt, which stays one, and no answer loses its beginning.
        cut = 0
        if settings.truncate == "start":
            cut = min(excess, *(start - len(begin) for start in starts))
        sides = [[*begin, *ids[len(begin) + cut :]][: settings.max_length] for ids in sides]
        starts = [start - cut for start in starts]
        if sides[0] == sides[1] or any(len(ids) <= start for ids, start in zip(sides, starts, strict=True)):
            yield Encoded([], truncated=True, masked=True, length=length)
            continue

        example = dict(zip(SIDES, sides, strict=True)) | {"starts": starts}
        example |= {"margin": row.get("margin", 0.0), "tie": row.get("tie", False)}
        yield Encoded([example], sum(map(len, sides)), 1, truncated=excess > 0, length=length)


def _texts(index: int, row: Mapping[str, Any], settings: Settings) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as text; of a chat's answers what the model writes, to the end of the turn."""
    if isinstance(row["prompt"], str):
        return row["prompt"], row["chosen"], row["rejected"]

    assert settings.template is not None  # encode() gives one where there are messages
    targets = ChatTargets(settings.template, settings.tokenizer)
    arguments = row.get("template_arguments", {})
    history = row["prompt"]
    try:
        for side in SIDES:
            _check_answer(row[side], side)
        chosen, rejected = (targets.answered([*history, *row[side]], len(history), **arguments) for side in SIDES)
    except ValueError as error:
        raise ValueError(f"{place_of(row, index)}: {error}") from None

    # An empty <think></think> may count to the prompt or to the answer: both answers stand behind the same prompt.
    prompts = [prompt for prompt in chosen if prompt in rejected]
    if not prompts:
        raise ValueError(
            f"{place_of(row, index)}: the chat template asks otherwise for the chosen answer than for the rejected"
        )

    # Of an empty answer the template's end of the turn would be left.
    chosen_text = chosen[prompts[0]] if _has_content(row["chosen"]) else ""
    rejected_text = rejected[prompts[0]] if _has_content(row["rejected"]) else ""
    return prompts[0], chosen_text, rejected_text


def _check_answer(messages: Sequence[Mapping[str, Any]], side: str) -> None:
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise ValueError(f"{side} must begin and end with a message of the assistant")
    answers = sum(message["role"] == "assistant" for message in messages)
    if len(trained_turns(messages)) < answers:
        raise ValueError(f"{side}: an answer is compared as a whole; take weight or train out of its messages")


def _has_content(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(message.get("tool_calls") or text_of(message).strip() for message in messages)


class PairCollate:
    """Batches of comparisons: the chosen sides, then the rejected ones, 2B rows packed end to end.

    `index` and `targets` (n,) are the answers' tokens and the positions that predict them, `counts` how many each side
    has; `margins` and `ties` (B,); `reference` (2B,) the reference model's log-probabilities of the answers, where the
    examples have them.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        rows = [example[side] for side in SIDES for example in examples]  # 2B of them

        # Where each answer begins in its row; nothing predicts the first token of a row.
        starts = [max(example["starts"][side], 1) for side in range(2) for example in examples]
        offsets = np.cumsum([0, *map(len, rows[:-1])])  # where each row begins in the packed one
        index = [
            offset + np.arange(start - 1, len(row) - 1)
            for offset, start, row in zip(offsets, starts, rows, strict=True)
        ]
        targets = [np.asarray(row[start:], dtype=np.int64) for row, start in zip(rows, starts, strict=True)]

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
    device = next(model.parameters()).device
    chunks = Batches(examples, PairCollate(), tokens=CHUNK_TOKENS, shuffle=False)
    logps: list[list[float]] = []
    with in_eval_mode(model), use_adapter(model, None):
        for (batch,) in tqdm(chunks, desc="reference", unit="batch", disable=None):
            chosen, rejected = answer_logps(model, to_device(batch, device)).chunk(2)  # (2B,) -> (B,) each
            logps += torch.stack((chosen, rejected), 1).tolist()  # (B, 2)
    for example, reference in zip(examples, logps, strict=True):
        example["reference"] = reference

"""Comparisons: a prompt with the answer that was chosen and the one that was rejected; for reward models and DPO.

    prompt/chosen/rejected    chosen, rejected, starts, margin, tie

An example holds both sides whole (prompt, answer, end of text) and where each answer begins, so that a reward model can
read a side to its last token, and DPO the log-probabilities of an answer's tokens. A row may say `tie` (neither is
better) and `margin`, how much better the chosen one is at least, in units of the reward (Llama 2, arXiv:2307.09288,
section 3.2.2). Rows whose sides are equal, or one of them empty, teach nothing and are dropped.

A side that is longer than `max_length` loses its end; with `truncate` "start" both sides lose as much of the prompt's
beginning first, with "drop" the row is dropped. So is one of whose answers nothing is left.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from ..._outside import located
from ...kernels import linear_cross_entropy
from ..chat.fields import trained_turns
from ..chat.forms import text_of
from ..chat.turns import ChatTargets
from ..data.batches import IGNORE, Batch, Collate, Examples
from ..data.placed_rows import PlacedRow
from ..data.text import append_eos, bos_ids, tokenize_pairs
from .common import Encoded, Settings, features, without_example

SIDES = ("chosen", "rejected")


def pairs(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """Examples of comparisons: `chosen` and `rejected` token ids, `starts` of the answers in them."""
    for row, text, sides, starts, length in _both_sides(rows, settings):
        if text["chosen"] == text["rejected"] or not (text["chosen"] and text["rejected"]):
            yield Encoded([], masked=True)
            continue

        chosen, rejected = sides
        excess = max(0, length - settings.max_length)
        lost = chosen == rejected or len(chosen) <= starts[0] or len(rejected) <= starts[1]
        if lost or (excess and settings.truncate == "drop"):
            yield Encoded([], truncated=True, masked=True, length=length)
            continue
        example = {"chosen": chosen, "rejected": rejected, "starts": starts}
        example |= {"margin": row.get("margin", 0.0), "tie": row.get("tie", False)}
        yield Encoded([example], truncated=excess > 0, length=length)


def each_answer(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[Encoded]:
    """Each answer of a row, behind its prompt, as an example of its own.

    A comparison has two, and each says its `side`; a text is an answer to nothing. None where an answer is cut off.
    """
    comparisons = [_as_comparison(row) for row in rows]
    for row, tokens in zip(rows, _both_sides(comparisons, settings), strict=True):
        answers = list(zip(SIDES, tokens.sides, tokens.starts, strict=True))
        if "chosen" not in row:
            answers = answers[:1]

        truncated = tokens.length > settings.max_length
        if any(not ids or (truncated and len(ids) <= start) for _, ids, start in answers):
            answers = []
        examples = [{"input_ids": ids, "side": side} for side, ids, _ in answers]
        yield Encoded(examples, truncated=truncated, length=tokens.length)


def _as_comparison(row: PlacedRow) -> PlacedRow:
    """A row of one answer as the comparison of the answer with itself."""
    if "messages" in row:
        # The turns behind the last that asks are the answer.
        messages = row["messages"]
        last = max((i for i, message in enumerate(messages, 1) if message["role"] != "assistant"), default=0)
        prompt, answer = messages[:last], messages[last:]
        if not prompt or not answer:
            raise ValueError(f"{row.location}: the messages must end with an answer of the assistant to be scored")
    elif "chosen" in row:
        return row
    else:
        prompt = row.get("prompt", "")
        answer = row["completion"] if "prompt" in row else row["text"]
    return PlacedRow({**row, "prompt": prompt, "chosen": answer, "rejected": answer}, row.file, row.line)


class _Tokens(NamedTuple):
    """A comparison in tokens, as many as fit."""

    row: PlacedRow
    texts: Mapping[str, str]  # prompt, chosen, rejected
    sides: list[list[int]]
    starts: list[int]  # of the answers in the sides
    length: int  # of the longer side, before it was cut


def _both_sides(rows: Sequence[PlacedRow], settings: Settings) -> Iterator[_Tokens]:
    """The tokens of both sides of each comparison."""
    begin = bos_ids(settings.tokenizer)
    ends = settings.ends_of_turns
    texts = [_texts(row, settings) for row in rows]
    columns = [tokenize_pairs(settings.tokenizer, [(text["prompt"], text[side]) for text in texts]) for side in SIDES]
    for row, text, *sides in zip(rows, texts, *columns, strict=True):
        # A chat template ends turns itself, if not in plain text.
        if isinstance(row["prompt"], str) or any(ids and ids[-1] not in ends for ids, _ in sides):
            sides = [(append_eos(ids, start, settings.eos, settings.turn_ends), start) for ids, start in sides]

        # Both sides lose the same of the prompt, which stays one, and no answer loses its beginning.
        length = max(len(ids) for ids, _ in sides)
        excess = max(0, length - settings.max_length)
        cut = 0
        if settings.truncate == "start":
            cut = min(excess, *(start - len(begin) for _, start in sides))
        fitted = [[*begin, *ids[len(begin) + cut :]][: settings.max_length] for ids, _ in sides]
        yield _Tokens(row, text, fitted, [start - cut for _, start in sides], length)


def _texts(row: PlacedRow, settings: Settings) -> Mapping[str, str]:
    """Prompt, chosen and rejected as text; of a chat's answers what the model writes, to the end of the turn."""
    if isinstance(row["prompt"], str):
        return row

    assert settings.template is not None  # encode() gives one where there are messages
    targets = ChatTargets(settings.template, settings.tokenizer)
    arguments = row.get("template_arguments", {})
    history = row["prompt"]
    with located(row.location):
        for side in SIDES:
            _check_answer(row[side], side)
        answers = {side: targets.answered([*history, *row[side]], len(history), **arguments) for side in SIDES}

        # An empty <think></think> may count to the prompt or to the answer: both answers stand behind the same prompt.
        prompt = next((prompt for prompt in answers["chosen"] if prompt in answers["rejected"]), None)
        if prompt is None:
            raise ValueError("the chat template asks otherwise for the chosen answer than for the rejected")

    # Of an empty answer the template's end of the turn would be left.
    texts = {side: answers[side][prompt] if _has_content(row[side]) else "" for side in SIDES}
    return {"prompt": prompt, **texts}


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
        rows = []
        for i, side in enumerate(SIDES):
            for example in examples:
                ids = example[side]
                start = max(example["starts"][i], 1)  # nothing predicts the first token of a row
                rows.append({"input_ids": ids, "targets": [*[IGNORE] * (start - 1), *ids[start:], IGNORE]})

        batch = Collate()(rows)
        batch["margins"] = torch.tensor([float(example["margin"]) for example in examples])
        batch["ties"] = torch.tensor([bool(example["tie"]) for example in examples])
        if "reference" in examples[0]:
            batch["reference"] = torch.tensor([example["reference"][i] for i in range(2) for example in examples])
        return batch


def both_sides(model: Any, tokenizer: Any, packing: bool) -> PairCollate:
    return PairCollate()


def pair_loss(differences: Tensor, ties: Tensor) -> Tensor:
    """The sum of −log σ(d) (Bradley and Terry 1952) for d (B,), how much better the chosen side is.

    A tie is half a win for each side.
    """
    return (F.softplus(-differences) + 0.5 * ties * differences).sum()  # (−log σ(d) − log σ(−d)) / 2 = −log σ(d) + d/2


def reward_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The loss of a reward model on comparisons: its scores' differences, less the margin, should be positive."""
    return reward_loss_of(reward_differences(model, batch), batch)


def reward_differences(model: Any, batch: Batch) -> Tensor:
    """How much higher the chosen sides score, (B,)."""
    chosen, rejected = _rewards(model, batch).chunk(2)  # (2B,) -> (B,) each
    return chosen - rejected


def _rewards(model: Any, batch: Batch) -> Tensor:
    """The score of each row, in fp32."""
    return model.head(features(model, batch)).float()  # type: ignore[no-any-return]


def reward_scores(model: Any, batch: Batch) -> list[Any]:
    """The score of each row of the batch."""
    return list(_rewards(model, batch).cpu().numpy())


def predicted_scores(row: PlacedRow, examples: Examples, outputs: Sequence[Any], labels: Any) -> dict[str, Any]:
    """The `score` of the row's answer, or of a comparison `chosen_score` and `rejected_score`; nulls if one is lost."""
    scores = {example["side"]: score for example, score in zip(examples, outputs, strict=True)}
    if "chosen" in row:
        return {f"{side}_score": scores.get(side) for side in SIDES}
    return {"score": scores.get("chosen")}


def reward_loss_of(differences: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """The same from the differences (B,)."""
    margins = batch["margins"].masked_fill(batch["ties"], 0.0)
    return pair_loss(differences - margins, batch["ties"]), len(differences)


def answer_logps(model: Any, batch: Batch) -> Tensor:
    """The log-probability of each row's answer, the sum over its tokens, in fp32."""
    if model.head.active is not None:
        raise ValueError("an adapter on the output head can't be trained on comparisons; leave it out of lora.targets")
    states = features(model, batch)
    head = model.head
    losses = linear_cross_entropy(
        states, head.weight, batch["targets"], head.bias, index=batch["index"], softcap=head.softcap, reduction="none"
    )  # (n,)
    return -torch.stack([answer.sum() for answer in losses.split(batch["counts"])])  # (B,)


@dataclass(frozen=True)
class DPOLoss:
    """Direct preference optimisation: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.

    The implied reward is β log π/ρ, ρ the reference model, whose log-probabilities the batch brings. Its margin counts
    as a reward model's does (ODPO: Amini et al. 2024, https://arxiv.org/abs/2402.10571).
    """

    beta: float = 0.1  # how dear it is to leave the reference model; the paper's choice, for dialogue

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        return reward_loss_of(self.differences(model, batch), batch)

    def differences(self, model: Any, batch: Batch) -> Tensor:
        """How much higher the chosen sides' implied reward is, (B,)."""
        chosen, rejected = (answer_logps(model, batch) - batch["reference"]).chunk(2)  # (2B,) -> (B,) each
        return self.beta * (chosen - rejected)


class PairScore:
    """Accuracy and calibration on held-out comparisons; `differences(model, batch)` says how much better each is.

    A row that gave no example, because its sides are equal in what the model sees, is one that it can't tell apart.
    """

    def __init__(
        self,
        differences: Callable[[Any, Batch], Tensor],
        labels: Sequence[str],
        examples: Examples,
        rows: Sequence[Any],
    ):
        missed = without_example(examples, rows)
        self.compare = differences
        self.differences = [0.0] * len(missed)
        self.ties = [bool(row.get("tie")) for row in missed]

    def predict(self, model: Any, batch: Batch) -> tuple[Tensor, int, Any]:
        differences = self.compare(model, batch)  # (B,)
        return *reward_loss_of(differences, batch), (differences.tolist(), batch["ties"].tolist())

    def add(self, predicted: Any) -> None:
        differences, ties = predicted
        self.differences += differences
        self.ties += ties

    def result(self, loss: float) -> dict[str, Any]:
        return comparisons(self.differences, self.ties)


def comparisons(differences: ArrayLike, ties: ArrayLike) -> dict[str, float]:
    """How often the chosen side of a comparison scores higher, and how well the margin tells how sure that is.

    A difference d of 0 is half right; ties don't count. The probability that the chosen side is better is σ(d) (Bradley
    and Terry 1952); the calibration error is the mean distance between the probability of the side that scores higher
    and the share of them that were chosen, over ten bins of equal width, weighted by their rows (Guo et al. 2017,
    arXiv:1706.04599).

    differences, ties: (N,). Returns accuracy, calibration_error. Raises ValueError where there are only ties, or
    a difference is NaN.
    """
    d = np.asarray(differences, dtype=np.float64)[~np.asarray(ties, dtype=bool)]
    if not len(d):
        raise ValueError("comparisons: no rows to score but ties; give some with a better side")
    if np.isnan(d).any():
        raise ValueError("comparisons: a difference of scores is NaN; training has diverged, lower train.lr")

    # Ten bins of confidence between 0.5 and 1; in each the sum of confidences less the sum of those that were right.
    right = (d > 0) + 0.5 * (d == 0)
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    gaps = np.bincount(bins, confidence - right, minlength=10)
    return {"accuracy": float(right.mean()), "calibration_error": float(np.abs(gaps).sum() / len(d))}

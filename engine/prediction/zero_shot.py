"""Labels for texts by a causal language model that nobody trained for it: which label's words it finds likeliest.

A template puts a text and a label's words into one sentence. Some words are likely whatever the text says; so each
label's log-likelihood is taken relative to its mean after texts without content (contextual calibration: Zhao et al.
2021, https://arxiv.org/abs/2102.09690; by differences of logarithms, as Holtzman et al. 2021,
https://arxiv.org/abs/2104.08315, which does not favour short words either). Their softmax over the labels is how sure
the model is: sort by it, and let people look at the least certain first.

A model that is trained on dialogues is asked through its chat template: what the sentence has before the label is the
question, and the label's words begin the answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chat.forms import ANSWER
from ..chat.template import ChatTemplate
from ..chat.turns import ChatTargets
from ..data.batches import IGNORE, Batches, Collate, to_device
from ..data.text import tokenize_pairs
from ..finite import not_finite
from ..progress import Progress
from ..runtime import in_eval_mode
from ..tasks.preferences import answer_logps

WITHOUT_CONTENT = ("N/A", "", "[MASK]")  # Zhao et al.'s


class Labelled(NamedTuple):
    """A text's label, the share of the model's belief that it has, and the label that comes second."""

    label: str
    confidence: float
    second: str


def label_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    verbalizers: Mapping[str, str],
    template: str = "{text}\n{label}",
    batch_size: int = 16,
    chat: ChatTemplate | None = None,
) -> list[Labelled]:
    """The label of each text, by the text that stands for each label, its verbalizer.

    `template` has a {text} and, after it, a {label}, where the verbalizers go. What it makes of a text goes through the
    template `chat`, if there is one.

    Raises ValueError for fewer than two labels, a template without its places, and a text that doesn't fit the model.
    """
    if len(verbalizers) < 2:
        raise ValueError(f"labels: give at least two to choose from, got {list(verbalizers)}")
    prompt, label_sign, after = template.partition("{label}")
    if not label_sign or "{text}" not in prompt or after.strip():
        raise ValueError(f"template {template!r}: it needs a {{text}}, and, in the end, a {{label}}")

    targets = None if chat is None else ChatTargets(chat, tokenizer)

    def ask(text: str) -> tuple[str, str]:
        question = prompt.replace("{text}", text)
        return (question, "") if targets is None else _through_template(targets, question)

    # Relative to texts without content, after which some labels are likelier than others, too.
    answers = list(verbalizers.values())
    calibration = _answer_logps(model, tokenizer, WITHOUT_CONTENT, answers, ask, batch_size).mean(0)  # (labels,)
    logps = _answer_logps(model, tokenizer, texts, answers, ask, batch_size) - calibration  # (texts, labels)

    best = logps.softmax(1).topk(2, 1)  # (texts, 2)
    labels = list(verbalizers)
    return [
        Labelled(labels[first], confidence, labels[second])
        for (first, second), (confidence, _) in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _through_template(targets: ChatTargets, question: str) -> tuple[str, str]:
    """The prompt that asks a question, and what the template writes in front of every answer.

    As in training, blanks between question and answer are the template's, and not the question's.
    """
    messages = [{"role": "user", "content": question.rstrip()}, {"role": "assistant", "content": ANSWER}]
    answers = targets.answered(messages, 1)
    if not answers:
        raise ValueError("the chat template marks nothing as the assistant's answer; correct it, or ask without it")
    prompt, answer = next(iter(answers.items()))
    return prompt, answer.partition(ANSWER)[0]


@torch.no_grad()
def _answer_logps(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    answers: Sequence[str],
    ask: Callable[[str], tuple[str, str]],
    batch_size: int,
) -> Tensor:
    """The log-likelihood of each label's answer after each text, (texts, labels) in fp32.

    `ask` gives a text's prompt, and what stands in front of every answer to it.
    """
    device = next(model.parameters()).device
    limit = model.config.max_positions

    # A row for each text and label; the rows of a text stand together.
    asked = [ask(text) for text in texts]
    pairs = [(prompt, before + answer) for prompt, before in asked for answer in answers]
    examples = []
    for i, (ids, start) in enumerate(tokenize_pairs(tokenizer, pairs)):
        if limit is not None and len(ids) - 1 > limit:
            raise ValueError(
                f"text {i // len(answers) + 1}: with template and label {len(ids)} tokens, the model takes {limit}"
            )
        first = max(start, 1)  # nothing predicts the first token
        examples.append({"input_ids": ids[:-1], "targets": [*[IGNORE] * (first - 1), *ids[first:]]})

    logps = []
    with in_eval_mode(model), Progress(len(examples), "answer") as progress:
        for i, (batch,) in enumerate(Batches(examples, Collate(), rows=batch_size, shuffle=False)):
            logps.append(answer_logps(model, to_device(batch, device)).cpu())  # (B,)
            if not bool(logps[-1].isfinite().all()):
                first = i * batch_size // len(answers) + 1
                raise not_finite(model, f"the likelihoods of text {first} and those after it")
            progress.update(len(logps[-1]))
    return torch.cat(logps).view(len(texts), len(answers))

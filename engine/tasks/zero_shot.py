"""Labels for texts by a causal language model that nobody trained for it: which label's words it finds likeliest.

A template puts a text and a label's words into one sentence. Some words are likely whatever the text says; so each
label's log-likelihood is taken relative to its mean after texts without content (contextual calibration: Zhao et al.
2021, https://arxiv.org/abs/2102.09690; by differences of logarithms, as Holtzman et al. 2021,
https://arxiv.org/abs/2104.08315, which does not favour short words either). Their softmax over the labels is how sure
the model is: sort by it, and let people look at the least certain first.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.batches import IGNORE, Collate, to_device
from ..data.text import tokenize_pairs
from ..finite import not_finite
from ..runtime import in_eval_mode
from .losses import answer_logps

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
    words: Mapping[str, str],
    template: str = "{text}\n{label}",
    batch_size: int = 16,
) -> list[Labelled]:
    """The label of each text. `words`: what stands for each label; `template` has a {text} and, after it, a {label}.

    Raises ValueError for fewer than two labels, a template without its places, and a text that doesn't fit the model.
    """
    if len(words) < 2:
        raise ValueError(f"labels: give at least two to choose from, got {list(words)}")
    before, sign, after = template.partition("{label}")
    if not sign or "{text}" not in before or after.strip():
        raise ValueError(f"template {template!r}: it needs a {{text}}, and, in the end, a {{label}}")
    calibration = _scores(model, tokenizer, WITHOUT_CONTENT, words, before, batch_size).mean(0)
    found = _scores(model, tokenizer, texts, words, before, batch_size) - calibration
    names, belief = list(words), found.softmax(1)
    best = belief.topk(2, 1)
    return [
        Labelled(names[first], confidence, names[second])
        for (first, second), (confidence, _) in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@torch.no_grad()
def _scores(
    model: Any, tokenizer: Any, texts: Sequence[str], words: Mapping[str, str], before: str, batch_size: int
) -> Tensor:
    """The log-likelihood of each label's words after each text, (texts, labels) in fp32."""
    device, limit = next(model.parameters()).device, model.config.max_positions
    pairs = [(before.replace("{text}", text), word) for text in texts for word in words.values()]
    examples = []
    for number, (ids, start) in enumerate(tokenize_pairs(tokenizer, pairs)):
        if limit is not None and len(ids) - 1 > limit:
            raise ValueError(
                f"text {number // len(words) + 1}: with template and label {len(ids)} tokens, the model takes {limit}"
            )
        first = max(start, 1)  # nothing predicts the first token
        examples.append({"input_ids": ids[:-1], "targets": [*[IGNORE] * (first - 1), *ids[first:]]})
    out = []
    with in_eval_mode(model):
        for at in range(0, len(examples), batch_size):
            batch = to_device(Collate()(examples[at : at + batch_size]), device)
            out.append(answer_logps(model, batch).cpu())
            if not bool(out[-1].isfinite().all()):
                raise not_finite(model, f"the likelihoods of text {at // len(words) + 1} and those after it")
    return torch.cat(out).view(len(texts), len(words))

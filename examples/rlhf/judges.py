"""Who judges headlines: one who counts words that nobody writes, in place of people; and a classifier of sentiment."""

import csv
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from handtune.engine import load_adapter
from handtune.engine.data.batches import packed
from handtune.models import load
from handtune.saved_runs import config_of

RUN = "runs/rlhf/classifier"
WORDS = re.compile(r"[\w'-]+")


@cache
def written() -> set[str]:
    """The words of the headlines that people wrote."""
    with (Path(__file__).resolve().parent.parent / "headlines/train.csv").open(encoding="utf-8", newline="") as file:
        return {word for row in csv.DictReader(file) for word in WORDS.findall(row["text"])}


def known(prompt: str, completion: str) -> float:
    """The share of a completion's words that are written. The first one may end the prompt's last."""
    words = WORDS.findall(prompt + completion)[len(WORDS.findall(prompt)) - 1 :]
    return sum(word in written() for word in words) / max(1, len(words))


def better(prompt: str, left: str, right: str) -> str:
    """The side with fewer words that nobody writes."""
    difference = known(prompt, left) - known(prompt, right)
    return "tie" if abs(difference) < 0.05 else "left" if difference > 0 else "right"


@cache
def classifier() -> tuple[Any, Any]:
    """MiniLM with the adapter that learnt the sentiment of headlines."""
    config = config_of(Path(RUN)).model
    model, tokenizer = load(str(config.path), "sequence-classification", labels=config.labels)
    load_adapter(model, f"{RUN}/adapter")
    return model, tokenizer


def positive(prompts: list[str], completions: list[str]) -> torch.Tensor:
    """Sentiment as a reward: doubled, it weighs about as much as a reward model's scores, whose deviation is 1."""
    return 2 * sentiment(prompts, completions)


@torch.no_grad()
def sentiment(prompts: list[str], completions: list[str]) -> torch.Tensor:
    """How sure the classifier is that a headline is positive, less how sure that it is negative: from -1 to 1."""
    model, tokenizer = classifier()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    shares = model(**packed([encoding.ids[:128] for encoding in tokenizer.encode_batch(texts)])).softmax(-1)
    return shares[:, model.labels.index("positive")] - shares[:, model.labels.index("negative")]

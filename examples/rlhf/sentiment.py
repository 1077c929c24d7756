"""What stands in for people here: the classifier of examples/headlines, and which of two headlines it finds better."""

from functools import cache
from typing import Any

import torch

from handtune.engine import load_adapter
from handtune.engine.batches import packed
from handtune.models import load
from handtune.stored import config_of

RUN = "runs/rlhf/classifier"


@cache
def classifier() -> tuple[Any, Any]:
    """MiniLM with the adapter that learnt the sentiment of headlines."""
    from pathlib import Path

    config = config_of(Path(RUN)).model
    model, tokenizer = load(str(config.path), "sequence-classification", labels=config.labels)
    load_adapter(model, f"{RUN}/adapter")
    return model, tokenizer


@torch.no_grad()
def positive(prompts: list[str], completions: list[str]) -> torch.Tensor:
    """How much likelier "positive" is than "negative", in nats."""
    model, tokenizer = classifier()
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    rows = [encoding.ids[:128] for encoding in tokenizer.encode_batch(texts)]
    logits = model(**packed(rows))
    return logits[:, model.labels.index("positive")] - logits[:, model.labels.index("negative")]


def better(prompt: str, left: str, right: str) -> str:
    """The side that is more positive; near ties are ties."""
    first, second = positive([prompt, prompt], [left, right]).tolist()
    return "tie" if abs(first - second) < 0.2 else "left" if first > second else "right"

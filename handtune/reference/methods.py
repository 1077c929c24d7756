"""The methods of training, as `handtune config` tells them: what each is for, the rows it reads, the fields it has."""

import re
from dataclasses import MISSING, fields
from functools import reduce
from typing import Any

from ..engine.data import schema
from ..engine.tasks.objectives import ENCODERS, METHODS, OBJECTIVES

PPO = "ppo"  # which has a configuration and a command of its own
PURPOSES = {
    "pretrain": "go on with a language model's own task on plain text",
    "sft": "teach a language model to answer: prompts with completions, or dialogues",
    "masked-lm": "go on with BERT's own task on plain text, guessing words that are hidden",
    "classify": "choose a class for each text, pair of texts or image",
    "tag": "give each word a tag, such as the kind of name that it belongs to",
    "qa": "find the answer to a question in a text",
    "embed": "make vectors of texts, near where texts belong together",
    "reward": "score answers as the people did who compared them",
    "dpo": "prefer the better of two answers, without a reward model",
    PPO: "improve what a language model writes by a reward model, or by a Python function",
}

_WITH_HEAD = ("classify", "tag", "qa", "reward")
_COMPARING = ("reward", "dpo")
# The fields and tables that not all methods have, and the methods that have them.
ONLY_FOR = {
    "model.preset": METHODS,
    "model.dropout": METHODS,
    "model.overrides": METHODS,
    "model.tokenizer": METHODS,
    "model.add_tokens": METHODS,
    "model.task": METHODS,
    "model.labels": ("classify", "tag"),
    "model.head_layers": _WITH_HEAD,
    "data.truncate": ("sft", *_COMPARING),
    "data.chat": ("sft",),
    "data.prompt": ("sft", *_COMPARING),
    "data.image_size": ("classify",),
    "data.augment": ("classify",),
    "loss": ("pretrain", "sft", "masked-lm", "classify", "tag"),
    "loss.class_weights": ("classify", "tag"),
    "dpo": ("dpo",),
}
# Why a method makes no use of a field, or what to do instead, where more is to be said than to leave it out.
_REMEDIES = {
    "model.dropout": "ppo compares probabilities, and applies none; leave it out",
    "model.add_tokens": "ppo trains no rows of the embedding; add the tokens in a fine-tuning run, and name the model "
    "that `handtune merge` makes of it",
}
# What stands in the place of a value that has no default.
EXAMPLES: dict[str, Any] = {
    "name": "my run",
    "log": "tensorboard",
    "model.adapter": "runs/sft",
    "model.dropout": "published",
    "model.preset": "gpt2",
    "model.tokenizer": "tokenizer.json",
    "model.labels": ["bad", "good"],
    "model.head_layers": 2,
    "model.quantize": "nf4",
    "data.train": "rows.jsonl",
    "data.eval": 0.1,
    "data.prompt": "Question: {question}\nAnswer:",
    "data.mix.path": "rows.jsonl",
    "loss.class_weights": "balanced",
    "train.epochs": 3,
    "data.max_length": 512,
    "data.image_size": 224,
    "train.max_steps": 1000,
    "train.batch_size": 16,
    "train.batch_tokens": 8192,
    "train.micro_batch_size": 4,
    "train.micro_batch_tokens": 2048,
    "train.eval_every": 100,
    "train.best": "loss",
    "train.early_stopping_patience": 3,
    "train.save_every": 100,
    "prompts": "prompts.jsonl",
    "reward": "runs/reward",
    "ppo.micro_batch_size": 4,
    "ppo.rollout_micro_batch_size": 16,
    "ppo.group_size": 8,
    "ppo.missing_eos_penalty": 1.0,
    "ppo.target_kl": 0.1,
    "ppo.kl_target": 6.0,
    "ppo.max_kl": 20.0,
}
# Shapes that people publish, which are read as one of a method's own.
_SHAREGPT = "ShareGPT's messages, each with from and value"
_CONVERTED = {
    "sft": {
        "instruction/input/output": "Alpaca's: the prompt is instruction, blank line, input; input may be empty",
        "conversations": _SHAREGPT,
    },
    "reward": {"conversations/chosen/rejected": _SHAREGPT},
    "dpo": {"conversations/chosen/rejected": _SHAREGPT},
}
_BASES = {
    "masked-lm": "google-bert/bert-base-uncased",
    "classify": "google-bert/bert-base-uncased",
    "tag": "google-bert/bert-base-uncased",
    "qa": "google-bert/bert-base-uncased",
    "embed": "sentence-transformers/all-MiniLM-L6-v2",
}


def has(method: str, name: str) -> bool:
    """Whether a field or table, by its full name, makes sense for a method."""
    outer = name.rpartition(".")[0]
    return method in ONLY_FOR.get(name, PURPOSES) and (not outer or has(method, outer))


def check_idle(config: Any, method: str) -> None:
    """ValueError where a configuration sets what its method makes no use of: a field that isn't at its default."""
    for name, methods in ONLY_FOR.items():
        *outer, key = name.split(".")
        table = reduce(lambda table, key: getattr(table, key, None), outer, config)
        if method in methods or not hasattr(table, key):  # the configuration of ppo has fewer tables
            continue

        field = next(each for each in fields(table) if each.name == key)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(table, key) != default:
            whose = "" if methods == METHODS else f", which is for {', '.join(methods)}"
            reason = _REMEDIES.get(name, f"method {method!r} makes no use of it{whose}; leave it out")
            raise ValueError(f"{name}: {reason}")


def examples_of(method: str) -> dict[str, Any]:
    """Values for fields without a default, by full name, as they suit the method."""
    base = _BASES.get(method, "HuggingFaceTB/SmolLM2-135M-Instruct")
    values = {**EXAMPLES, "method": method, "out": f"runs/{method}", "model.path": base}
    if method in OBJECTIVES:
        values["model.task"] = OBJECTIVES[method].task
    return values


def rows_of(method: str) -> dict[str, str]:
    """The shapes of rows that a method reads, "text/label", and what is in them."""
    if method == PPO:
        return {"prompt": "a text to be continued", **_described("messages", "text")}

    rows = _described(*ENCODERS[OBJECTIVES[method].encoding]) | _CONVERTED.get(method, {})
    if method == "classify":
        rows |= _described("image/label")
    return rows


def _described(*shapes: str) -> dict[str, str]:
    """Shapes of rows and what is in each, as the docstring of `engine/data/schema.py` lists them."""
    described = {}
    entry = re.compile(r"^    (\S+)((?: .*)?(?:\n {8,}.*)*)$", re.MULTILINE)
    for name, text in entry.findall(schema.__doc__ or ""):
        # What stands in brackets may be left out.
        spellings = {re.sub(r"\[.*\]", "", name), re.sub(r"[\[\]]", "", name)}
        if spellings.intersection(shapes):
            described[name] = " ".join(text.split())
    return described

"""Small models with tokenizers, small data that can be learned, and configuration files for the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from small_tokenizers import byte_level, word_piece

from handtune.engine.tasks.encode import encode
from handtune.models import GPT2, Bert, save
from handtune.models.tokenizer.special_tokens import SpecialTokens

PLACES = ("mat", "book", "dog", "cat")
NAMES = ("Paris", "France")

SENTIMENT = [
    {"text": f"{start} {word} {thing}", "label": label}
    for start in ("the", "what a")
    for word, label in (("good", "up"), ("welcome", "up"), ("dog", "down"), ("sat", "down"))
    for thing in ("morning", "book", "capital")
]
TAGGED = [
    {"tokens": ["the", animal, "looked", "at", name], "tags": ["O", "B-ANIMAL", "O", "O", "B-PLACE"]}
    for animal in ("cat", "dog")
    for name in NAMES
] + [{"tokens": [name, "is", "good"], "tags": ["B-PLACE", "O", "O"]} for name in NAMES]
QUESTIONS = [
    {
        "question": "where is it?",
        "context": (context := f"the {animal} sat on the {place}"),
        "answers": {"text": [place], "answer_start": [context.rindex(place)]},
    }
    for animal in ("cat", "dog")
    for place in ("mat", "book")
]
CHAT = [
    {"prompt": f"Question: {question}\n\n", "completion": f"Answer: {answer}"}
    for question, answer in (
        ("capital of France?", "Paris"),
        ("who sat on the mat?", "the cat"),
        ("who wrote the book?", "the woman"),
        ("good morning", "good morning, you are welcome"),
    )
]
TEXTS = [{"text": row["prompt"] + row["completion"]} for row in CHAT]
PAIRS = [
    {"anchor": f"the {place}", "positive": f"what is the {place}?"}
    for place in ("cat", "dog", "mat", "book", "capital", "woman")
]


def gpt2(task: str = "causal-lm", labels: tuple[str, ...] = (), **sizes: Any) -> GPT2:
    """Two layers, two heads, 64 positions, the vocabulary of `byte_level`."""
    torch.manual_seed(0)
    small = {"vocab_size": byte_level().get_vocab_size(), "max_positions": 64, "n_layer": 2, "n_head": 2, "d_model": 32}
    return GPT2.from_name("gpt2", task=task, labels=labels, **{**small, **sizes})


def bert(task: str = "sequence-classification", labels: tuple[str, ...] = (), **sizes: Any) -> Bert:
    """Two layers, two heads, 64 positions, the vocabulary of `word_piece`."""
    torch.manual_seed(0)
    small = {"vocab_size": word_piece().get_vocab_size(), "max_positions": 64, "n_layer": 2, "n_head": 2}
    return Bert.from_name(
        "bert-base-uncased", task=task, labels=labels, **{**small, "d_model": 32, "d_ff": 64, **sizes}
    )


def gpt2_folder(path: Path, **sizes: Any) -> Path:
    """A checkpoint with a tokenizer; `<|end|>` ends texts."""
    model = gpt2(**sizes)
    model.tokens = SpecialTokens(ends=(0,))
    save(model, byte_level(), path)
    return path


def bert_folder(path: Path, task: str = "masked-lm", **sizes: Any) -> Path:
    """A checkpoint with a tokenizer."""
    save(bert(task, **sizes), word_piece(), path)
    return path


def examples(
    rows: Sequence[dict[str, Any]], encoding: str, labels: Sequence[str] | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Rows encoded by the tokenizer of the encoding's kind, at most 64 tokens long."""
    causal = encoding in ("sft", "pretrain")
    tokenizer = byte_level() if causal else word_piece()
    settings = {"max_length": 64, "labels": labels, "eos": 0 if causal else None, **settings}
    return encode(rows, tokenizer, encoding, **settings)[0]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(path: Path, **tables: Any) -> Path:
    """A configuration file. Values are plain: strings, numbers, lists, and tables two deep."""

    def toml(value: Any) -> str:
        if not isinstance(value, dict):
            return json.dumps(value)
        return "{ " + ", ".join(f"{json.dumps(key)} = {json.dumps(inner)}" for key, inner in value.items()) + " }"

    lines = [f"{key} = {json.dumps(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for key, value in tables.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{name} = {toml(inner)}" for name, inner in value.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def logged(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock and the machine."""
    timing = ("seconds", "tokens_per_second", "images_per_second", "peak_memory")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor], bound: float = 0.0) -> None:
    """Bitwise, or to `bound` of the largest entry of each."""
    assert ours.keys() == others.keys()
    for name, weight in ours.items():
        error = (weight - others[name]).abs().max().item()
        assert error <= bound * others[name].abs().max().item(), f"{name}: off by {error:.1e}"


def contents(folder: Path) -> dict[str, bytes]:
    """Of each file below a folder what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

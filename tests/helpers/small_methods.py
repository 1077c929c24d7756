"""A tiny run of each training method, from its configuration file: bases, rows, and what is to train."""

from pathlib import Path
from typing import Any

import torch
from small_images import class_folders
from small_runs import CHAT, PAIRS, QUESTIONS, SENTIMENT, TAGGED, TEXTS, bert, gpt2, write_config, write_rows
from small_tokenizers import byte_level, sentence_piece, word_piece

from handtune.models import T5, ResNet, save
from handtune.models.tokenizer.special_tokens import SpecialTokens

COMPARISONS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": CHAT[i - 1]["completion"]}
    for i, row in enumerate(CHAT)
]
# Of each run: the family of its base, the method, the rows (None: images in class folders).
RUNS: dict[str, tuple[str, str, list[dict[str, Any]] | None]] = {
    "pretrain": ("gpt2", "pretrain", TEXTS),
    "sft": ("gpt2", "sft", CHAT),
    "masked-lm": ("bert", "masked-lm", TEXTS),
    "classify": ("bert", "classify", SENTIMENT),
    "tag": ("bert", "tag", TAGGED),
    "qa": ("bert", "qa", QUESTIONS),
    "embed": ("bert", "embed", PAIRS),
    "reward": ("gpt2", "reward", COMPARISONS),
    "dpo": ("gpt2", "dpo", COMPARISONS),
    "seq2seq": ("t5", "sft", CHAT),
    "span-corruption": ("t5", "pretrain", TEXTS),
    "images": ("resnet", "classify", None),
}
# What trains: all of it, an adapter, or one part after another, alone and beside an adapter.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "lora": {"lora": {"rank": 2, "dropout": 0.1}},
    "gradual": {"train": {"unfreeze": {"*norm*": 0, "*layers*": 1, "*": 1.5}}},
    "lora, gradual": {"lora": {"rank": 2}, "train": {"unfreeze": {"*norm*": 1}}},
}


def base_folder(family: str, folder: Path) -> Path:
    """A tiny random checkpoint of the family, with its tokenizer."""
    model: Any
    if family == "gpt2":
        model, words = gpt2(), byte_level()
        model.tokens = SpecialTokens(ends=(0,))
    elif family == "bert":
        model, words = bert("masked-lm"), word_piece()
    elif family == "t5":
        torch.manual_seed(0)
        words = sentence_piece()
        sizes = {"n_layer": 2, "d_model": 32, "n_head": 2, "head_width": 16, "d_ff": 64}
        model = T5.from_name("flan-t5-small", vocab_size=words.get_vocab_size(), **sizes)
        model.tokens = SpecialTokens(ends=(1,), pad_id=0)
    else:
        torch.manual_seed(0)
        small = {"stem_width": 8, "widths": (8, 16), "depths": (1, 1), "small_images": True}
        model, words = ResNet.from_name("resnet18", labels=("a", "b"), **small), None
    save(model, words, folder / family)
    return folder / family


def method_config(name: str, folder: Path, base: Path, **tables: dict[str, Any]) -> Path:
    """The configuration file of a run of `RUNS`: two epochs, evaluated on what it trains on."""
    _, method, rows = RUNS[name]
    if rows is None:
        data = {"train": str(class_folders(folder / "images", count=4)), "eval": 0.25, "image_size": 16}
    else:
        file = str(write_rows(folder / "rows.jsonl", rows))
        data = {"train": file, "eval": file, "max_length": 48}
    train = {"epochs": 2, "batch_size": 3, "lr": 3e-3, **tables.get("train", {})}
    tables = {"model": {"path": str(base)}, "data": data, **tables, "train": train}
    return write_config(folder / "run.toml", method=method, out=str(folder / "run"), **tables)

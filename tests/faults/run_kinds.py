"""Short runs of each command that stores something, in a folder of their own: a word each, and the command."""

from pathlib import Path
from typing import Any

from small_methods import COMPARISONS, base_folder
from small_runs import CHAT, SENTIMENT, TEXTS, bert_folder, write_config, write_rows

MODULE = """
import os
from contextlib import contextmanager

from handtune import _files


def left(prompt, one, other):
    return "left" if one < other else "right"


def careless(prompt, one, other):
    _files.replacing = unflushed
    return left(prompt, one, other)


@contextmanager
def unflushed(path, size=None):
    with open(f"{path}.new", "wb") as file:
        yield file
    os.replace(f"{path}.new", path)


def short(prompts, completions):
    return [-len(text) / 20 for text in completions]
"""
OFTEN = {"batch_size": 2, "max_steps": 3, "save_every": 1, "eval_every": 2, "lr": 3e-3}
LORA = {"rank": 2, "dropout": 0.1}
# Of each training run: the method, the rows, and the tables that differ.
TRAINED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("sft", "chat.jsonl", {"lora": LORA}),
    "full": ("sft", "chat.jsonl", {"train": {"best": "loss"}}),
    "gradual": ("sft", "chat.jsonl", {"train": {"unfreeze": {"*norm*": 0, "*layers*": 1, "*": 1.5}}}),
    "packing": ("pretrain", "texts.jsonl", {"lora": LORA, "data": {"packing": True}}),
    "features": ("classify", "sentiment.jsonl", {"freeze": {"names": ["*"], "except": ["head.*"]}}),
    "corpus": ("pretrain", "corpus.txt", {"lora": LORA, "data": {"max_length": 8, "eval": 0.3}}),
    "dpo": ("dpo", "comparisons.jsonl", {"lora": LORA}),
    "reward": ("reward", "comparisons.jsonl", {"lora": LORA}),
}


def commands(folder: Path) -> dict[str, list[str]]:
    """Write bases, rows and configurations into `folder`; the command of each kind of run, with relative outputs."""
    bases = {"gpt2": str(base_folder("gpt2", folder)), "bert": str(bert_folder(folder / "bert"))}
    rows = {"chat": CHAT, "texts": TEXTS, "comparisons": COMPARISONS, "sentiment": SENTIMENT[:8]}
    rows["prompts"] = [{"prompt": "the cat"}, {"prompt": "good morning"}]
    for name, some in rows.items():
        write_rows(folder / f"{name}.jsonl", some)
    (folder / "corpus.txt").write_text("the cat sat on the mat and the dog sat on the book\n" * 4)
    (folder / "of_faults.py").write_text(MODULE)

    out: dict[str, list[str]] = {}
    for name, (method, file, tables) in TRAINED.items():
        data = {"train": str(folder / file), "eval": str(folder / file), "max_length": 32, **tables.get("data", {})}
        config = write_config(
            folder / f"{name}.toml", method=method, out="run",
            model={"path": bases["bert" if method == "classify" else "gpt2"]},
            **{**tables, "data": data, "train": {**OFTEN, **tables.get("train", {})}},
        )  # fmt: skip
        out[name] = ["train", str(config)]
    policy = write_config(
        folder / "ppo.toml", out="run", prompts=str(folder / "prompts.jsonl"), reward="of_faults:short",
        model={"path": bases["gpt2"]},
        ppo={"episodes": 6, "rollout_batch_size": 2, "batch_size": 2, "epochs": 1, "max_new_tokens": 3, "save_every": 1,
             "lora": {"rank": 2}},
    )  # fmt: skip
    prompts = ["--prompts", str(folder / "prompts.jsonl"), "--max-new-tokens", "3"]
    return out | {
        "ppo": ["ppo", str(policy)],
        "merge": ["merge", bases["gpt2"], str(folder / "run/adapter"), "merged"],
        "compare": ["compare", bases["gpt2"], *prompts, "--out", "pairs.jsonl", "--labeler", "of_faults:left"],
        "label": [
            "label",
            bases["gpt2"],
            str(folder / "texts.jsonl"),
            "--labels",
            "good",
            "bad",
            "--out",
            "rows.jsonl",
        ],
        "generate": ["generate", bases["gpt2"], *prompts, "--out", "written.jsonl"],
    }

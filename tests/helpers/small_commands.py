"""Every command of the command line on tiny files: what to type, and what is there when it has gone well."""

from pathlib import Path

import torch
from small_runs import CHAT, TEXTS, bert_folder, gpt2, gpt2_folder, write_config, write_rows
from small_templates import CHATML
from small_tokenizers import byte_level

from handtune.cli import main
from handtune.models import save
from handtune.models.tokenizer.special_tokens import SpecialTokens


def talker_folder(path: Path) -> Path:
    """A checkpoint with a chat template."""
    model = gpt2()
    with torch.no_grad():
        model.embed.positions.weight.mul_(20)  # otherwise it repeats one token
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    model.tokens = SpecialTokens(ends=(0,), chat_template=CHATML, settings=settings)
    save(model, byte_level(), path)
    return path


def workshop(folder: Path) -> Path:
    """A folder with bases, rows, a function that judges and rewards, configurations, and a finished run."""
    base, rows = str(gpt2_folder(folder / "base")), str(write_rows(folder / "rows.jsonl", CHAT))
    talker_folder(folder / "talker")
    (folder / "command_scores.py").write_text(
        "def better(prompt, left, right):\n    return 'left' if left < right else 'right'\n\n\n"
        "def short(prompts, completions):\n    return [-len(text) for text in completions]\n"
    )
    write_rows(folder / "texts.jsonl", TEXTS)
    write_rows(folder / "pairs.jsonl", [{"prompt": "the cat", "chosen": "sat", "rejected": "is"}])
    write_config(
        folder / "train.toml", method="sft", out=str(folder / "finished"), model={"path": base}, lora={"rank": 2},
        data={"train": rows, "eval": rows, "max_length": 64}, train={"epochs": 1, "batch_size": 2},
    )  # fmt: skip
    write_config(
        folder / "ppo.toml", out="none", prompts=rows, reward="command_scores:short", model={"path": base},
        ppo={"episodes": 4, "rollout_batch_size": 4, "batch_size": 4, "max_new_tokens": 2,
        "lora": {"rank": 2}},
    )  # fmt: skip
    assert main(["train", str(folder / "train.toml")]) == 0
    bert_folder(folder / "classifier", "sequence-classification", labels=("down", "up"))
    return folder


def command_lines(out: Path) -> dict[str, tuple[list[str], Path | None]]:
    """Of each command its arguments, in a workshop as the current folder, and a file that it leaves.

    `chat` reads questions from standard input.
    """
    lines: dict[str, tuple[str, Path | None]] = {
        "train": (f"train.toml out={out}/run", out / "run/adapter/adapter_model.safetensors"),
        "chat": ("talker --max-new-tokens 3", None),
        "config": ("sft", None),
        "check-data": ("train.toml", None),
        "evaluate": ("finished", None),
        "compare": (
            f"base --prompts rows.jsonl --out {out}/answers.jsonl --labeler command_scores:better --max-new-tokens 3",
            out / "answers.jsonl",
        ),
        "generate": (f"base --prompts rows.jsonl --max-new-tokens 2 --out {out}/texts.jsonl", out / "texts.jsonl"),
        "label": (f"base rows.jsonl --labels good bad --out {out}/labels.jsonl", out / "labels.jsonl"),
        "merge": (f"base finished/adapter {out}/merged", out / "merged/config.json"),
        "predict": (f"classifier texts.jsonl --out {out}/predicted.jsonl", out / "predicted.jsonl"),
        "ppo": (f"ppo.toml out={out}/policy", out / "policy/adapter/adapter_model.safetensors"),
        "report": (f"finished --out {out}/page.html", out / "page.html"),
    }
    return {command: ([command, *line.split()], left) for command, (line, left) in lines.items()}


def run_command(*arguments: object) -> None:
    """A command that ends well."""
    assert main([str(argument) for argument in arguments]) == 0

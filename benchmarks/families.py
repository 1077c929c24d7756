"""What each family of models can do, cell by cell: exact where transformers and PEFT say what is right, and trained.

    python benchmarks/families.py [FAMILY ...] [--out FILE.json]

    logits, left      the largest difference of the base's outputs from transformers': rows alone and packed; in a batch
                      padded on the left
    heads             the same over every head, stored by us and by them, alone, packed and in both paddings
    PEFT out, PEFT in a classifier's adapter of ours in PEFT, and of PEFT's in ours
    gradients         the largest difference of a gradient of the loss, of the largest entry
    greedy            of the tokens generated in a padded batch, how many are transformers'
    LoRA, full, NF4   the loss before and after `handtune train`, with an adapter, in full, on a base in four bits
    merge             the largest difference of the merged model's outputs from the adapter's

All are tiny random models (`exchange_models.py`); a cell without a number has its reason. The checks are tests, too:
`tests/models/checkpoint/test_families.py`.
"""

import argparse
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the package from a bare clone

import torch
import torch.nn.functional as F
from exchange import ADAPTER, HEADS, STORED_BY, cells, missing, versions
from exchange_models import FAMILIES, Family, config_of, store, their_model, tokenizer_of
from PIL import Image

from handtune.cli import main as handtune
from handtune.engine import generate, load_adapter
from handtune.engine.data.batches import packed
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.masked_lm import masked_lm_loss
from handtune.models import load

Cell = float | list[float] | str  # a number, the loss before and after, or why there is none
TEXTS = ["the cat sat on the mat", "a dog ran under the old tree", "it was very small", "the new dog sat on a mat"]
METHODS = {"causal-lm": "pretrain", "masked-lm": "masked-lm", "seq2seq-lm": "sft", "embedding": "classify"}
BOUNDS = {
    "logits": 1e-4, "left": 1e-4, "heads": 2e-4, "PEFT out": 2e-5, "PEFT in": 2e-5, "gradients": 1e-4, "merge": 1e-4,
}  # fmt: skip


def exchanged(head: str, stored_by: tuple[str, ...], sides: tuple[str, ...]) -> Callable[[str, Path], Cell]:
    """The largest difference in cells of `exchange.py`, or why there is none; `head` "base" is what is pretrained."""

    def cell(name: str, folder: Path) -> Cell:
        family = FAMILIES[name]
        assert isinstance(family, Family)
        base = "image-classification" if family.sides else family.base
        heads = {"base": [base], "all": [each for each in HEADS if each != ADAPTER]}.get(head, [head])
        errors, reasons = [], []
        for each in heads:
            for by in stored_by:
                reasons.append(missing(name, each))
                if not reasons[-1]:
                    found = cells(name, each, by, folder / f"{each}-{by}")
                    errors += [found[side].error for side in sides if found[side].error is not None]
                    reasons += [found[side].reason for side in sides]
        return max(errors) if errors else next(reason for reason in reasons if reason)

    return cell


def gradients(name: str, folder: Path) -> Cell:
    """Of the loss on packed rows, against transformers' on rows alone."""
    family = FAMILIES[name]
    losses = {"causal-lm": causal_lm_loss, "masked-lm": masked_lm_loss}
    if family.base not in losses or family.kind == "xlnet":
        return "its loss is not a sum over the tokens of rows alone; see tests/models"
    reference, model, rows = pair(family, folder)
    index = [n for i, row in enumerate(rows) for n in range(sum(map(len, rows[:i])), sum(map(len, rows[: i + 1])) - 1)]
    targets = torch.tensor([token for row in rows for token in row[1:]])
    for row in rows:
        logits = reference(torch.tensor([row])).logits[0, :-1]
        F.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum").backward()
    losses[family.base](model, {"inputs": packed(rows), "targets": targets, "index": torch.tensor(index)})[0].backward()

    theirs = dict(reference.named_parameters(remove_duplicate=False))
    worst = 0.0
    for key, source in model.key_map().items():
        expected = torch.cat([source.ours(theirs[part].grad) for part in source.names if theirs[part].grad is not None])
        ours = dict(model.named_parameters())[key].grad
        worst = max(worst, float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-3)))
    return worst


def greedy(name: str, folder: Path) -> Cell:
    """Of 20 tokens for each of three prompts, padded on the left, the part that transformers writes, too."""
    family = FAMILIES[name]
    if family.base != "causal-lm":
        return "it is no decoder" if family.base != "seq2seq-lm" else "see tests/models/test_t5.py"
    reference, model, rows = pair(family, folder)
    # transformers' XLNet sees the padding while it generates.
    prompts = [row[: 3 if family.kind == "xlnet" else 2 + i] for i, row in enumerate(rows[:3])]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    reference.generation_config.eos_token_id = None
    theirs = reference.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    ours = generate(model, ids, mask, 20, temperature=0)
    return float((ours == theirs).float().mean())


def pair(family: Family, folder: Path) -> tuple[Any, Any, list[list[int]]]:
    """transformers' base, ours of the same weights, and rows of tokens."""
    words = tokenizer_of(family, "own")
    reference = their_model(family, config_of(family, words), family.base)
    store(reference, words, folder)
    model, tokenizer = load(folder, device="cpu")
    return reference, model, [tokenizer.encode(text).ids for text in TEXTS]


def trained(how: str) -> Callable[[str, Path], Cell]:
    """The loss before and after a run of `handtune train`, with what the configuration says besides."""
    tables = {"LoRA": {"lora": {"rank": 4}}, "full": {}, "NF4": {"lora": {"rank": 4}, "model": {"quantize": "nf4"}}}

    def cell(name: str, folder: Path) -> Cell:
        family = FAMILIES[name]
        if how == "NF4" and family.kind == "resnet":
            return "convolutions are not kept in four bits"
        result = run(family, folder, tables[how])
        return [result["before"]["loss"], result["metrics"]["loss"]]

    return cell


def merge(name: str, folder: Path) -> Cell:
    """A trained adapter merged by `handtune merge`, against the adapter on its base."""
    family = FAMILIES[name]
    run(family, folder, {"lora": {"rank": 4}})
    silently("merge", str(folder / "run"), str(folder / "merged"))
    merged, tokenizer = load(folder / "merged", device="cpu")
    adapted, _ = load(folder / "base", merged.task, device="cpu", labels=list(merged.labels) or None)
    load_adapter(adapted, folder / "run" / "adapter")
    if tokenizer is None:
        inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, *family.sides)}
    else:
        inputs = {"input_ids": torch.tensor([tokenizer.encode(TEXTS[0]).ids])}
        if family.base == "seq2seq-lm":
            inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return float((merged(**inputs) - adapted(**inputs)).abs().max())


def run(family: Family, folder: Path, tables: dict[str, Any]) -> dict[str, Any]:
    """The result of training the family's base on a few rows by heart, from the command line."""
    words = None if family.sides else tokenizer_of(family, "own")
    task = "image-classification" if family.sides else family.base
    store(their_model(family, config_of(family, words), task, n_labels=2), words, folder / "base")
    if words is None:
        for label in ("light", "dark"):
            (folder / "rows" / label).mkdir(parents=True)
            for i in range(4):
                shade = (200 if label == "light" else 40) + 5 * i
                Image.new("RGB", (40, 40), (shade,) * 3).save(folder / "rows" / label / f"{i}.png")
        rows, data = str(folder / "rows"), {"eval": 0.25, "image_size": 32}
    else:
        rows = str(folder / "rows.jsonl")
        lines = [
            {"prompt": text, "completion": text} if family.base == "seq2seq-lm" else {"text": text} for text in TEXTS
        ]
        Path(rows).write_text("".join(json.dumps(line) + "\n" for line in lines * 4), encoding="utf-8")
        data = {"eval": rows, "max_length": 32}

    settings = {
        "method": METHODS[family.base], "out": str(folder / "run"),
        "model": {"path": str(folder / "base"), **tables.get("model", {})}, "data": {"train": rows, **data},
        **{key: table for key, table in tables.items() if key != "model"},
        "train": {"epochs": 10, "batch_size": 8, "lr": 1e-2 if "lora" in tables else 3e-3, "best": "last"},
    }  # fmt: skip
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items() if not isinstance(value, dict))
    for key, table in settings.items():
        if isinstance(table, dict):
            text += f"[{key}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())
    (folder / "run.toml").write_text(text, encoding="utf-8")
    silently("train", str(folder / "run.toml"))
    return json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))


def silently(*command: str) -> None:
    """Run a command of handtune; RuntimeError with what it has printed where it fails."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = handtune(list(command))
    if code:
        raise RuntimeError(f"{' '.join(command)}: {output.getvalue()[-2000:]}")


COLUMNS: dict[str, Callable[[str, Path], Cell]] = {
    "logits": exchanged("base", ("they store",), ("alone",)),
    "left": exchanged("base", ("they store",), ("left",)),
    "heads": exchanged("all", STORED_BY, ("alone", "left", "right")),
    "PEFT out": exchanged(ADAPTER, ("we store",), ("alone",)),
    "PEFT in": exchanged(ADAPTER, ("they store",), ("alone",)),
    "gradients": gradients,
    "greedy": greedy,
    "LoRA": trained("LoRA"),
    "full": trained("full"),
    "NF4": trained("NF4"),
    "merge": merge,
}


def is_right(column: str, cell: Cell) -> bool:
    """Whether a cell is as it should be."""
    if isinstance(cell, str):
        return bool(cell)
    if isinstance(cell, list):
        return cell[1] < cell[0]
    return cell == 1.0 if column == "greedy" else cell <= BOUNDS[column]


def main() -> None:
    names = [name for name, family in FAMILIES.items() if isinstance(family, Family)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *names], help="default: all")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("handtune").setLevel(logging.ERROR)  # of heads that are new, once a model
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    notes: dict[str, int] = {}
    results: dict[str, dict[str, Cell]] = {}
    print(f"{'':14}" + "".join(f"{column:>14}" for column in COLUMNS))
    for name in options.families or names:
        row: dict[str, Cell] = {}
        for column, check in COLUMNS.items():
            with tempfile.TemporaryDirectory() as folder:
                row[column] = check(name, Path(folder))
        results[name] = row
        print(f"{name:14}" + "".join(f"{shown(column, cell, notes):>14}" for column, cell in row.items()), flush=True)

    print("\n" + "\n".join(f"{number}) {reason}" for reason, number in notes.items()))
    wrong = [
        f"{name}, {column}"
        for name, row in results.items()
        for column, cell in row.items()
        if not is_right(column, cell)
    ]
    print(f"\n{len(results)} families; wrong: {', '.join(wrong) or 'none'}")
    if options.out:
        table = {"benchmark": "families", "bounds": BOUNDS, **versions(), "results": results}
        Path(options.out).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def shown(column: str, cell: Cell, notes: dict[str, int]) -> str:
    """A cell of the table; reasons are numbered, and stand below it, and a wrong cell has an exclamation mark."""
    if isinstance(cell, str):
        return f"— {notes.setdefault(cell, len(notes) + 1)})"
    text = (
        f"{cell[0]:.2f}→{cell[1]:.2f}"
        if isinstance(cell, list)
        else f"{cell:.0%}"
        if column == "greedy"
        else f"{cell:.0e}"
    )
    return text if is_right(column, cell) else f"{text} !"


if __name__ == "__main__":
    main()

"""Does a stored model mean to transformers what it means here, and the other way round?

    python benchmarks/exchange.py [FAMILY ...] [--out FILE.json]

For every family and task head: stored by us and read by transformers (vectors by sentence-transformers' rule, adapters
by PEFT), or stored by them and read by us; alone, in a batch padded on the left, and on the right. A cell is the
largest difference of any output from transformers', over texts that end with eos, that hold or end with the pad token,
or do neither, and over ways to pad (`exchange_models.py`). Ours is computed alone, padded and packed each time.

Where transformers gives a row of a batch another output than the same row alone, ours is compared with the latter, and
the reason is printed. The checks are tests, too: `tests/models/checkpoint/test_exchange.py`.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the package from a bare clone

import peft
import torch
import transformers
from exchange_models import AUTO, FAMILIES, Family, class_of, config_of, pad_token, their_model, tokenizer_of
from exchange_pairs import POOLINGS, Pair, our_adapter, our_checkpoint, their_adapter, their_checkpoint
from torch import Tensor

from handtune.models import load, save

ADAPTER = "SEQ_CLS adapter"
HEADS = (*AUTO, ADAPTER)
SIDES = ("alone", "left", "right")
STORED_BY = ("we store", "they store")
BY_TEXT = ("sequence-classification", "reward")
BOUND = 2e-4

ENCODERS = ("bert", "distilbert", "modernbert", "mpnet", "roberta", "xlm-roberta", "camembert")

# Where transformers gives a row of a batch something else than alone: (model types, side, tasks) -> why.
PARTING = {
    (ENCODERS, "left", BY_TEXT): "it reads column 0, where padding stands",
    (("xlnet",), "right", BY_TEXT): "XLNet reads the last column, where padding stands",
    (("t5",), "left", (*BY_TEXT, "question-answering")): "T5's decoder begins in the padding, and sees it",
}


@dataclass
class Cell:
    """The largest difference from transformers in a cell, or None, and what is to say of it."""

    error: float | None
    reason: str = ""

    def stored(self) -> Any:
        """As it stands in a file: a number, the reason for there being none, or both."""
        if self.error is None:
            return self.reason
        return [self.error, self.reason] if self.reason else self.error


def texts_of(family: Family, padding: str) -> dict[str, list[str]]:
    """Batches of texts by how they end. In each batch the same number of eos, which T5's classifier insists on."""
    plain = [
        "the cat sat on the mat",
        "a dog",
        "the old dog ran very small under the new tree",
        "it was small",
    ]
    eos = family.names.get("eos_token") or family.names["sep_token"]
    pad = {"own": pad_token(family), "eos": eos, "none": ""}[padding]
    batches = {"plain": plain, "ends with eos": [f"{text} {eos}" for text in plain]}
    if pad:
        batches["holds the pad token"] = [text.replace(" ", f" {pad} ", 1) for text in plain]
        batches["ends with the pad token"] = [f"{text} {pad} {pad}" for text in plain]
    return batches


def differences(pair: Pair, texts: list[str]) -> dict[str, tuple[float, str]]:
    """For each side the largest difference of ours from transformers', and why it isn't its batch that is compared.

    Raises RuntimeError where transformers parts from itself without a known reason.
    """
    rows = pair.rows(texts)
    singles = [(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in rows]
    alone = [pair.reference(*single)[0] for single in singles]
    ours = [*pair.packed(rows), *(pair.own(*single)[0] for single in singles)]
    out = {"alone": (max(map(_apart, ours, alone * 2)), "")}
    for side in SIDES[1:]:
        ids, mask = pair.batch(texts, side)
        truth, reason = _batched(pair, ids, mask, alone, side)
        out[side] = max(map(_apart, _real(pair.own(ids, mask), mask), truth)), reason
    return out


def _batched(pair: Pair, ids: Tensor, mask: Tensor, alone: list[Tensor], side: str) -> tuple[list[Tensor], str]:
    """transformers' outputs of a batch; those of the rows alone where it refuses it, or is known to part from them."""
    try:
        found = _real(pair.reference(ids, mask), mask)
    except ValueError as error:
        return alone, f"transformers: {error}"
    if max(map(_apart, found, alone)) <= BOUND:
        return found, ""
    for (kinds, at, tasks), reason in PARTING.items():
        if at == side and pair.family.kind in kinds and pair.task in tasks:
            return alone, reason
    raise RuntimeError(
        f"transformers' {pair.family.kind} gives other outputs in a batch padded on the {side} than alone"
    )


def _real(outputs: Tensor, mask: Tensor) -> list[Tensor]:
    """The outputs of each row's tokens, or of the row."""
    whole = outputs.dim() < 3
    return [row if whole else row[real.bool()] for row, real in zip(outputs, mask, strict=True)]


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative where outputs are large."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


def pairs(family: Family, head: str, stored_by: str, folder: Path) -> Iterator[tuple[Pair, str]]:
    """The pairs of a cell, with what pads their texts."""
    make = {
        ("we store", True): our_adapter, ("they store", True): their_adapter,
        ("we store", False): our_checkpoint, ("they store", False): their_checkpoint,
    }[stored_by, head == ADAPTER]  # fmt: skip
    task = "sequence-classification" if head == ADAPTER else head
    for padding in family.paddings:
        for rule in POOLINGS if head == "embedding" else ("",):
            yield make(family, task, padding, rule, folder / f"{padding}{rule}"), padding


def image_cells(family: Family, head: str, stored_by: str, folder: Path) -> dict[str, Cell]:
    """The same for images, which have no padding: a batch of two, and each alone."""
    config = config_of(family, None)
    theirs = their_model(family, config, head)
    theirs.save_pretrained(folder)
    ours, _ = load(folder, head, device="cpu")
    if stored_by == "we store":
        save(ours, None, folder / "ours")
        theirs = class_of(family, config, head).from_pretrained(folder / "ours").eval()
    images = torch.randn(2, 3, *family.sides, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = theirs(images)
        if head == "image-classification":
            truth = out.logits
        elif family.kind == "resnet":
            truth = out.pooler_output[:, :, 0, 0]
        else:
            truth = out.last_hidden_state[:, 0]  # of [CLS]
        found = [ours(images), torch.cat([ours(image[None]) for image in images])]
    cell = Cell(max(_apart(part, truth) for part in found))
    return {"alone": cell, **dict.fromkeys(SIDES[1:], Cell(None, "images have no padding"))}


def missing(name: str, head: str) -> str:
    """Why a family has no such head, or nothing."""
    family = FAMILIES[name]
    if isinstance(family, str):
        return family
    if head == ADAPTER:
        return "PEFT has no SEQ_CLS for images" if family.sides else ""
    words = None if family.sides else tokenizer_of(family, "own")
    if class_of(family, config_of(family, words), head) is None:
        return "transformers has no such head"
    if head == "causal-lm" and family.kind in ENCODERS:
        return "here it is an encoder: no such head"
    return ""


def cells(name: str, head: str, stored_by: str, folder: Path) -> dict[str, Cell]:
    """The cells of a family and head: alone, and in batches padded left and right."""
    family = FAMILIES[name]
    if reason := missing(name, head):
        return dict.fromkeys(SIDES, Cell(None, reason))
    assert isinstance(family, Family)
    if family.sides:
        return image_cells(family, head, stored_by, folder)
    worst, reasons = dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, "")
    for pair, padding in pairs(family, head, stored_by, folder):
        for texts in texts_of(family, padding).values():
            for side, (error, reason) in differences(pair, texts).items():
                worst[side] = max(worst[side], error)
                reasons[side] = reasons[side] or (reason and f"{reason} (padding: {padding})")
    return {side: Cell(worst[side], reasons[side]) for side in SIDES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], help="default: all")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("handtune").setLevel(logging.ERROR)  # of heads that are new, once a model
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    began = time.perf_counter()
    notes: dict[str, int] = {}
    results: dict[str, dict[str, dict[str, Cell]]] = {}
    print(f"{'':34}" + "".join(f"{f'{side}, {by}':>19}" for by in STORED_BY for side in SIDES))
    for name in options.families or FAMILIES:
        for head in HEADS:
            row = {}
            for by in STORED_BY:
                with tempfile.TemporaryDirectory() as folder:
                    row[by] = cells(name, head, by, Path(folder))
            results[f"{name}, {head}"] = row
            print_row(f"{name}, {head}", [cell for by in STORED_BY for cell in row[by].values()], notes)

    print("\n" + "\n".join(f"{number}) {reason}" for reason, number in notes.items()))
    every = [cell for row in results.values() for by in row.values() for cell in by.values()]
    errors = [cell.error for cell in every if cell.error is not None]
    print(f"\n{len(errors)} cells, the largest difference {max(errors, default=0):.1e} (bound {BOUND:.0e}), "
          f"{time.perf_counter() - began:.0f} s")  # fmt: skip
    if options.out:
        write(Path(options.out), {"benchmark": "exchange", "bound": BOUND, **versions()}, results)


def write(path: Path, facts: dict[str, Any], results: dict[str, Any]) -> None:
    """The facts and results as JSON, a line for each family and head."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row, default=Cell.stored)}" for name, row in results.items())
    head = json.dumps(facts, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "results": {{\n{lines}\n }}\n}}\n', encoding="utf-8")


def print_row(name: str, row: list[Cell], notes: dict[str, int]) -> None:
    """One line of the table; reasons are numbered, and stand below it."""
    shown = []
    for cell in row:
        number = f" {notes.setdefault(cell.reason, len(notes) + 1)})" if cell.reason else ""
        shown.append(("—" if cell.error is None else f"{cell.error:.0e}") + number)
    print(f"{name:34}" + "".join(f"{text:>19}" for text in shown), flush=True)


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
        "device": "cpu", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


if __name__ == "__main__":
    main()

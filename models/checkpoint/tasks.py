"""Which task a checkpoint is for, and which head it carries: what config.json says of them, read and written."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layers.heads import BY_TEXT, LABELLED, n_outputs
from ..tokenizer.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..families import Family, Model

log = logging.getLogger("handtune")
MAX_LABELS = 1_000_000  # more names nobody gave
PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<unk>", "[UNK]")


def class_name(family: "Family", task: str, model_type: str) -> str:
    """transformers' class for the task: where one class of ours is several families, theirs begin with the family."""
    return family.architectures[task].format(model_type.capitalize())


def task_of(published: dict[str, Any], family: "Family", folder: Path) -> str:
    """The task that config.json's `architectures` names. ValueError where it names none."""
    names = published.get("architectures") or []
    if published.get("handtune_task") in family.architectures:
        return published["handtune_task"]
    for task in family.architectures:
        if class_name(family, task, published["model_type"]) in names or (
            task == "masked-lm" and "BertForPreTraining" in names
        ):
            return task
    tasks = ", ".join(family.architectures)
    raise ValueError(f"{folder / 'config.json'}: architectures {names} names no known task; pass task= one of {tasks}")


def stored_head(published: dict[str, Any], family: "Family", folder: Path) -> tuple[tuple[str, ...], int]:
    """Label names and depth of the head that is there. transformers leaves out the table of two unnamed labels."""
    table, depth = published.get("id2label"), published.get("head_layers") or 1
    kind = published["model_type"]
    names = {class_name(family, task, kind) for task in LABELLED if task in family.architectures}
    if table is None and names & set(published.get("architectures") or ()):
        count = published.get("num_labels") or 2
        if not 0 < count <= MAX_LABELS:
            raise ValueError(f"{folder / 'config.json'}: num_labels = {count}: expected 1 to {MAX_LABELS:,}")
        table = {i: f"LABEL_{i}" for i in range(count)}
    try:
        return tuple(str(table[key]) for key in sorted(table, key=int)) if table else (), depth
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: id2label is damaged ({error})") from error


def label_names(labels: list[str] | tuple[str, ...] | int | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The labels asked for by name or number, or else those `known`, which a number alone leaves as they are.

    Raises ValueError where they are not different names.
    """
    if isinstance(labels, int):
        if not 1 <= labels <= MAX_LABELS:
            raise ValueError(f"labels {labels}: expected names, or a positive number, at most {MAX_LABELS:,}")
        labels = known if labels == len(known) else [str(i) for i in range(labels)]
    if isinstance(labels, str) or len(set(labels or ())) != len(labels or ()):
        raise ValueError(f"labels {labels!r}: expected different names, or their number")
    return tuple(labels or known)


def head_rows(model: "Model", published: dict[str, Any], known: tuple[str, ...]) -> list[int] | None:
    """For each output of the task's head the row of the stored one, whose labels are `known`; None: make it anew.

    The stored head is another task's where `architectures` says so: heads of several tasks go by the same name. The
    same labels in another order are the same head; other labels, be they as many, are another. Only the names that
    transformers gives to labels without one (LABEL_0, ...) may be replaced, which is announced.
    """
    stored, asked = published.get("architectures"), model.labels
    if stored and class_name(type(model), model.task, published["model_type"]) not in stored:
        return None
    if model.task not in (*LABELLED, "reward"):
        return []
    if len(known) != n_outputs(model.task, asked):
        return None
    if model.task == "reward" or asked == known:
        return list(range(len(known)))
    if known == tuple(f"LABEL_{i}" for i in range(len(known))):
        log.warning("the stored labels have no names; they are taken for %s, in this order", ", ".join(asked))
        return list(range(len(known)))
    return [known.index(label) for label in asked] if set(asked) == set(known) else None


def padding_of_new_head(tokens: SpecialTokens, tokenizer: "Tokenizer | None", task: str) -> SpecialTokens:
    """The special tokens with the pad id behind which a new head that reads a text's last token looks for it.

    transformers refuses batches without one. It is the checkpoint's; where that has none, a token that no text ends
    with, or else eos. A classifier stores it, which is announced. A language model only remembers it: a reward model
    may stand on it that was trained so.
    """
    pad = tokens.pad_id
    if pad is None and tokenizer is not None:
        pad = next((number for number in map(tokenizer.token_to_id, PADS) if number is not None), None)
    pad = tokens.eos_id if pad is None else pad
    if pad is None or task not in BY_TEXT:
        return replace(tokens, skipped_id=pad)

    if tokens.pad_id is None:
        name = None if tokenizer is None else tokenizer.id_to_token(pad)
        tokens = tokens.padding_with(pad, name)
        log.warning("no pad token is named: id %d (%s) becomes it; a text is read at its last other token", pad, name)
    return replace(tokens, skipped_id=pad)


@torch.no_grad()
def reorder_head(head: nn.Module, rows: list[int]) -> None:
    """Put the outputs of a task's head into another order, each taken from its row of `rows`."""
    for parameter in head.get_submodule("out").parameters():
        parameter.copy_(parameter[rows])


def task_config(model: "Model", model_type: str) -> dict[str, Any]:
    """The fields of config.json that tell the task, its labels and the head's depth, and the special tokens."""
    out = model.tokens.to_config(classifies=model.task in BY_TEXT)
    out |= {"architectures": [class_name(type(model), model.task, model_type)]}
    if model.task == "reward":
        out |= {"handtune_task": "reward", "num_labels": 1}
    if model.head_layers > 1:
        out["head_layers"] = model.head_layers
    if model.labels:
        out["id2label"] = {str(i): name for i, name in enumerate(model.labels)}
        out["label2id"] = {name: i for i, name in enumerate(model.labels)}
    return out

"""Which task a checkpoint is for, and which head it carries: the fields of config.json for them, read and written."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layers.heads import LABELLED, TEXT_TASKS, n_outputs
from ..tokenizer.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..families import Family, Model

log = logging.getLogger("handtune")
Labels = list[str] | tuple[str, ...] | int | None  # names, or their number; None takes the stored ones
MAX_LABELS = 1_000_000  # nobody has named more
# Tokens that may pad where no pad token is named: no text ends with one of them.
PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<unk>", "[UNK]")


def class_name(family: "Family", task: str, model_type: str) -> str:
    """transformers' class for the task. Where it has several for one of ours, their names begin with the family."""
    return family.architectures[task].format(family.model_types[model_type])


def stored_tasks(published: dict[str, Any], family: "Family") -> list[str]:
    """The tasks whose classes config.json's `architectures` names."""
    names = set(published.get("architectures") or ())
    if "BertForPreTraining" in names:  # has a second head, which is left out
        names.add("BertForMaskedLM")
    return [task for task in family.architectures if class_name(family, task, published["model_type"]) in names]


def task_of(published: dict[str, Any], family: "Family") -> str:
    """The task that config.json names. ValueError where it names none."""
    if published.get("handtune_task") in family.architectures:
        return published["handtune_task"]
    tasks = stored_tasks(published, family)
    if not tasks:
        names = published.get("architectures") or []
        known = ", ".join(family.architectures)
        raise ValueError(f"architectures {names} names no known task; pass task= one of {known}")
    return tasks[0]


def stored_head(published: dict[str, Any], family: "Family") -> tuple[tuple[str, ...], int]:
    """Label names and depth of the stored head. transformers leaves out the table of two unnamed labels."""
    table = published.get("id2label") or {}
    if published.get("id2label") is None and set(LABELLED).intersection(stored_tasks(published, family)):
        count = published.get("num_labels") or 2
        if not 0 < count <= MAX_LABELS:
            raise ValueError(f"num_labels = {count}: expected 1 to {MAX_LABELS:,}")
        table = {i: f"LABEL_{i}" for i in range(count)}
    try:
        names = tuple(str(table[key]) for key in sorted(table, key=int))
    except ValueError as error:
        raise ValueError(f"id2label is damaged ({error})") from error
    return names, published.get("head_layers") or 1


def label_names(labels: Labels, known: tuple[str, ...]) -> tuple[str, ...]:
    """The labels asked for by name or number, or else the `known` ones, which also serve a number that fits them.

    Raises ValueError where they are not different names.
    """
    if isinstance(labels, int):
        if not 1 <= labels <= MAX_LABELS:
            raise ValueError(f"labels {labels}: expected names, or a positive number, at most {MAX_LABELS:,}")
        # As many as are stored: their names stay. Otherwise the head is new, and its labels have none.
        labels = known if labels == len(known) else [str(i) for i in range(labels)]
    if isinstance(labels, str) or len(set(labels or ())) != len(labels or ()):
        raise ValueError(f"labels {labels!r}: expected different names, or their number")
    return tuple(labels or known)


def head_rows(model: "Model", published: dict[str, Any], known: tuple[str, ...]) -> list[int] | None:
    """For each output of the task's head its row in the stored head, whose labels are `known`; None: make it anew.

    The stored head is another task's where `architectures` says so: heads of several tasks go by the same name. The
    same labels in another order are the same head; other labels, be they as many, are another. Only the names that
    transformers gives to labels without one (LABEL_0, ...) may be replaced, which is announced.
    """
    if published.get("architectures") and model.task not in stored_tasks(published, type(model)):
        return None
    if model.task not in (*LABELLED, "reward"):
        return []  # a head without labels, taken as it is
    if len(known) != n_outputs(model.task, model.labels):
        return None

    in_order = list(range(len(known)))
    if model.task == "reward" or model.labels == known:
        return in_order
    if known == tuple(f"LABEL_{i}" for i in in_order):
        log.warning("the stored labels have no names; they are taken for %s, in this order", ", ".join(model.labels))
        return in_order
    if set(model.labels) != set(known):
        return None
    return [known.index(label) for label in model.labels]


def padding_of_new_head(tokens: SpecialTokens, tokenizer: "Tokenizer | None", task: str) -> SpecialTokens:
    """The special tokens with the pad id in front of which a new head that reads a text's last token looks for it.

    transformers refuses batches without one. It is the checkpoint's; where that has none, a token that no text ends
    with, or else eos. A classifier stores it, which is announced. A language model only remembers it, for a reward
    model that may be made from it.
    """
    pad = tokens.pad_id
    if pad is None and tokenizer is not None:
        pad = next((token_id for token_id in map(tokenizer.token_to_id, PADS) if token_id is not None), None)
    if pad is None:
        pad = tokens.eos_id
    if pad is None or task not in TEXT_TASKS:
        return replace(tokens, config_pad_id=pad)

    if tokens.pad_id is None:
        name = None if tokenizer is None else tokenizer.id_to_token(pad)
        if name is not None:  # for the tokenizer, too
            names = {"pad_token": name}
            tokens = replace(tokens, names=tokens.names | names, settings=tokens.settings | names)
        log.warning("no pad token is named: id %d (%s) becomes it; a text is read at its last other token", pad, name)
    return replace(tokens, pad_id=pad, config_pad_id=pad)


@torch.no_grad()
def reorder_head(head: nn.Module, rows: list[int]) -> None:
    """Put the outputs of a task's head into another order, each taken from its row of `rows`."""
    for parameter in head.get_submodule("out").parameters():
        parameter.copy_(parameter[rows])


def task_config(model: "Model", model_type: str) -> dict[str, Any]:
    """The fields of config.json for the task, its labels and the head's depth, and the special tokens."""
    fields: dict[str, Any] = {}
    if hasattr(model.config, "vocab_size"):
        fields |= model.tokens.to_config(classifies=model.task in TEXT_TASKS)
    fields["architectures"] = [class_name(type(model), model.task, model_type)]
    if model.task == "reward":  # transformers has no class for it: a classifier with one label
        fields |= {"handtune_task": "reward", "num_labels": 1}
    if model.head_layers > 1:
        fields["head_layers"] = model.head_layers
    if model.labels:
        fields["id2label"] = dict(enumerate(model.labels))
        fields["label2id"] = {name: i for i, name in enumerate(model.labels)}
    return fields

"""Matrices that a published model has in several modules: a token embedding that is the output matrix, too.

Here such a matrix is one parameter; PEFT stores, and replaces, each of the modules by itself. One of them alone, stored
with an adapter, is another model there, whose head and embedding are no longer one: that has no counterpart here.
"""

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..model import KnownModel


def tied_copies(model: nn.Module) -> dict[str, str]:
    """The published names of the second and further occurrences of tied tensors, each with that of the first."""
    if not isinstance(model, KnownModel):
        first: dict[int, str] = {}
        every = list(model.named_parameters(remove_duplicate=False))
        return {name: first[id(p)] for name, p in every if first.setdefault(id(p), name) != name}

    out = {}
    published = {key: source.names for key, source in model.key_map().items()}
    stored = {name for names in published.values() for name in names}
    prefixes = (model.base_prefix,) if isinstance(model.base_prefix, str) else model.base_prefix
    for short, (key, _) in model.tied_keys.items():
        tasks = next((tasks for pattern, tasks in model.head_keys.items() if fnmatchcase(short, pattern)), None)
        if short in stored or key not in published or (tasks is not None and model.task not in tasks):
            continue  # a matrix of its own, or of a head that this task doesn't have
        stack = short.partition(".")[0]
        inside = [prefix for prefix in prefixes if any(name.startswith(f"{prefix}{stack}.") for name in stored)]
        out[f"{inside[0]}{short}" if inside else short] = published[key][0]
    return out


def without_copies(
    model: nn.Module, stored: dict[str, Tensor], is_base: Callable[[str, Tensor], bool]
) -> dict[str, Tensor]:
    """An adapter's plain tensors, by published name, without second occurrences.

    `is_base`: whether the base's tensor of that published name has this value. ValueError where one of several differs
    from the others: where it is stored alone, from those of the base.
    """
    table = model.key_map() if isinstance(model, KnownModel) else {}
    spellings = {name for source in table.values() for name in source.also}

    out, copies = dict(stored), tied_copies(model)
    for copy, first in copies.items():
        pair = [name for name in (copy, first) if name in stored]
        if pair == [copy] and copy in spellings:
            out[first] = out.pop(copy)  # BERT's output bias, which transformers computes with under this name
            continue
        if len(pair) == 2 and not same_tensor(stored[copy], stored[first]):
            raise ValueError(
                f"{copy} and {first} are two matrices in this adapter, and one in the base, which ties them; give it a "
                "base with tie_word_embeddings = false and both matrices"
            )
        if len(pair) == 1 and not is_base(first, stored[pair[0]]):
            other = first if pair == [copy] else copy
            tied = [name.removesuffix(".weight") for name in (first, *(key for key in copies if copies[key] == first))]
            raise ValueError(
                f"{pair[0]} comes without {other}, to which the base ties it, so that they are two from then on; train "
                f"the adapter with {' and '.join(tied)} in modules_to_save and ensure_weight_tying, or on a base with "
                "tie_word_embeddings = false and both matrices"
            )
        out.pop(copy, None)
    return out


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether `a` is `b` once it is of its dtype. One on the meta device is like none."""
    return not b.is_meta and a.shape == b.shape and torch.equal(a.to(b), b)


def biased_output(model: nn.Module) -> str | None:
    """The published module of an output matrix that has a bias and is tied to another module, or None.

    PEFT computes it without the bias where token rows train (its TrainableTokensLayer).
    """
    copies = tied_copies(model)
    table = model.key_map() if isinstance(model, KnownModel) else {}
    known = {*copies, *(name for source in table.values() for name in source.names)}
    modules = [copy.removesuffix(".weight") for copy in copies if copy.endswith(".weight")]
    return next((module for module in modules if f"{module}.bias" in known), None)


def read_otherwise(model: nn.Module, adapted: Collection[str], rows: Collection[str]) -> str | None:
    """Why PEFT computes something else from factors on these published modules, or from token rows of those, or None.

    For it each occurrence of a tied matrix is a module. Factors change the one that they are on. Token rows go to all
    that transformers lists as tied, a head of its own among them where other occurrences are tied, but not to those
    inside a model that is wrapped for a task.
    """
    copies = tied_copies(model)
    pairs = {copy.removesuffix(".weight"): first.removesuffix(".weight") for copy, first in copies.items()}
    for copy, first in pairs.items():
        if first in adapted:
            return f"{copy} is the same matrix as {first}, and PEFT's factors on {first} don't reach it"
        if first in rows and isinstance(model, KnownModel) and copy.startswith(model.base_prefix):
            return f"{copy} is the same matrix as {first}, and PEFT's token rows of {first} don't reach it"

    if isinstance(model, KnownModel) and set(rows) & set(pairs.values()):
        stored = {name for source in model.key_map().values() for name in source.names}
        if apart := next((name for name in model.tied_keys if name in stored), None):
            head = apart.removesuffix(".weight")
            return f"{head} is a matrix of its own, over whose rows PEFT writes the token rows of the embedding"

    if rows and (output := biased_output(model)):
        return f"{output} has a bias, without which PEFT computes where token rows train"
    return None


def copies_beside(model: nn.Module, stored: Collection[str]) -> dict[str, str]:
    """The further occurrences to store beside these published tensors, and what each is a copy of.

    PEFT stores modules whole: with an output matrix goes its bias.
    """
    copies = tied_copies(model)
    modules = {copy.rpartition(".")[0] for copy, first in copies.items() if first in stored}
    return {copy: first for copy, first in copies.items() if copy.rpartition(".")[0] in modules}

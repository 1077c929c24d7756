"""Matrices that a published model has in several modules: a token embedding that is the output matrix, too.

Here such a matrix is one parameter; PEFT stores, and replaces, each of the modules by itself. One of them alone, stored
with an adapter, is another model there, whose head and embedding are no longer one: that has no counterpart here.
"""

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..model import KnownModel, facts_of

IsBase = Callable[[str, Tensor], bool]  # whether the base's tensor of a published name has this value


def published_names(model: nn.Module) -> dict[str, str]:
    """Our name of each tensor of one of our models by its published ones, those of tied copies not among them."""
    return {name: key for key, checkpoint_key in facts_of(model).key_map().items() for name in checkpoint_key.names}


def tied_copies(model: nn.Module) -> dict[str, str]:
    """The published names of the second and further occurrences of tied tensors, each with that of the first."""
    if not isinstance(model, KnownModel):
        first: dict[int, str] = {}
        parameters = list(model.named_parameters(remove_duplicate=False))
        return {name: first[id(p)] for name, p in parameters if first.setdefault(id(p), name) != name}

    copies = {}
    key_map = model.key_map()
    stored = published_names(model)
    for copy, (key, _) in model.tied_keys.items():
        # A copy that is stored is a matrix of its own, and that of another task's head isn't there at all.
        tasks = next((tasks for pattern, tasks in model.head_keys.items() if fnmatchcase(copy, pattern)), None)
        if copy in stored or key not in key_map or (tasks is not None and model.task not in tasks):
            continue
        copies[_with_base_prefix(model, copy, stored)] = key_map[key].names[0]
    return copies


def _with_base_prefix(model: KnownModel, copy: str, stored: Collection[str]) -> str:
    """The name of a copy as this task publishes it: inside of the base model ("bert.") where its stack is."""
    stack = copy.partition(".")[0]
    for prefix in model.base_prefix:
        if any(name.startswith(f"{prefix}{stack}.") for name in stored):
            return f"{prefix}{copy}"
    return copy


def without_copies(model: nn.Module, stored: dict[str, Tensor], is_base: IsBase) -> dict[str, Tensor]:
    """An adapter's plain tensors, by published name, without second occurrences.

    ValueError where one of several differs from the others: where it is stored alone, from those of the base.
    """
    other_spellings = {name for checkpoint_key in facts_of(model).key_map().values() for name in checkpoint_key.also}

    tensors = dict(stored)
    copies = tied_copies(model)
    for copy, first in copies.items():
        present = [name for name in (copy, first) if name in stored]
        if present == [copy] and copy in other_spellings:
            tensors[first] = tensors.pop(copy)  # BERT's output bias, which transformers computes with under this name
            continue

        # Two values, or one that isn't the base's, would make two matrices of what is one parameter here.
        if len(present) == 2 and not same_tensor(stored[copy], stored[first]):
            raise ValueError(
                f"{copy} and {first} are two matrices in this adapter, and one in the base, which ties them; give it a "
                "base with tie_word_embeddings = false and both matrices"
            )
        if len(present) == 1 and not is_base(first, stored[present[0]]):
            absent = first if present == [copy] else copy
            occurrences = [first, *(name for name in copies if copies[name] == first)]
            modules = " and ".join(name.removesuffix(".weight") for name in occurrences)
            raise ValueError(
                f"{present[0]} comes without {absent}, to which the base ties it, so that they are two from then on; "
                f"train the adapter with {modules} in modules_to_save and ensure_weight_tying, or on a base with "
                "tie_word_embeddings = false and both matrices"
            )
        tensors.pop(copy, None)
    return tensors


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether `a` is `b` once it is of its dtype. One on the meta device is like none."""
    return not b.is_meta and a.shape == b.shape and torch.equal(a.to(b), b)


def peft_difference(model: nn.Module, adapted: Collection[str], with_token_rows: Collection[str]) -> str | None:
    """Why PEFT computes something else from factors on these published modules, or from token rows of those, or None.

    For it each occurrence of a tied matrix is a module. Factors change the one that they are on. Token rows go to all
    that transformers lists as tied, a head of its own among them where other occurrences are tied, but not to those
    inside a model that is wrapped for a task.
    """
    facts = facts_of(model)
    copies = {copy.removesuffix(".weight"): first.removesuffix(".weight") for copy, first in tied_copies(model).items()}
    for copy, first in copies.items():
        # Here they change both, which are one parameter.
        if first in adapted:
            return f"{copy} is the same matrix as {first}, and PEFT's factors on {first} don't reach it"
        if first in with_token_rows and copy.startswith(facts.base_prefix):
            return f"{copy} is the same matrix as {first}, and PEFT's token rows of {first} don't reach it"

    # T5 1.1 has such a head: two stacks share the embedding, and the output matrix is another.
    stored = published_names(model)
    untied = next((name for name in facts.tied_keys if name in stored), None)
    if untied is not None and not {*with_token_rows}.isdisjoint(copies.values()):
        head = untied.removesuffix(".weight")
        return f"{head} is a matrix of its own, over whose rows PEFT writes the token rows of the embedding"

    # It computes such an output matrix without the bias where token rows train (its TrainableTokensLayer).
    biases = {*copies, *stored}
    if with_token_rows and (output := next((copy for copy in copies if f"{copy}.bias" in biases), None)):
        return f"{output} has a bias, without which PEFT computes where token rows train"
    return None


def copies_to_save(model: nn.Module, stored: Collection[str]) -> dict[str, str]:
    """The further occurrences to store beside these published tensors, and what each is a copy of.

    PEFT stores modules whole: with an output matrix goes its bias, and with that the matrix.
    """
    copies = tied_copies(model)
    modules = {copy.rpartition(".")[0] for copy, first in copies.items() if first in stored}
    modules |= {name.rpartition(".")[0] for name in stored}
    return {copy: first for copy, first in copies.items() if copy.rpartition(".")[0] in modules}

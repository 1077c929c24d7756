"""How the tensors of a model are published: the entries of the models' key maps."""

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

# Of a tied output matrix that is stored and is not the embedding. Which of the two is meant, who knows.
TIED = "the token embedding, but config.json has tie_word_embeddings = true; set it to false, or take the tensor out"

_NUMBER = re.compile(r"\b\d+\b")  # in a path: which layer it is


@dataclass(frozen=True)
class CheckpointKey:
    """How one of our parameters is stored in published checkpoints."""

    names: tuple[str, ...]  # the tensors whose rows, in this order, make up ours
    rows: tuple[int, ...] = ()  # how many rows each of them has; empty where there is one
    transposed: bool = False  # stored (in, out), as Conv1D does
    shape: tuple[int, ...] = ()  # stored with more dimensions than ours, as (D, H, hd) for (D, H·hd)
    # (H, n): the rows of n parts are stored head by head, (H, n, hd), and ours part by part, (n, H, hd)
    interleaved: tuple[int, int] | None = None
    also: tuple[str, ...] = ()  # another spelling of the names, read but not written
    files: tuple[str, ...] = ()  # what files call it, where transformers' modules aren't: see `checkpoint/renamed.py`
    optional: bool = False  # zero where the checkpoint lacks it

    @property
    def former_modules(self) -> dict[str, str]:
        """The modules of the names → what files call these, where there is a file's name for each."""
        if len(self.files) != len(self.names):
            return {}
        modules = ((name.rpartition(".")[0] for name in names) for names in (self.names, self.files))
        return dict(zip(*modules, strict=True))

    def ours(self, stored: Tensor) -> Tensor:
        """A stored tensor in our layout, as a view where it can be."""
        if self.shape and stored.shape == self.shape:
            stored = stored.flatten(1)  # (D, H, hd) → (D, H·hd)
        if self.transposed and stored.dim() == 2:
            stored = stored.T  # (in, out) → (out, in)

        # A damaged tensor, whose rows don't come out even, stays as it is: its shape is refused later, with its name.
        if self.interleaved and stored.dim() and len(stored) % (self.interleaved[0] * self.interleaved[1]) == 0:
            return stored.unflatten(0, (*self.interleaved, -1)).transpose(0, 1).flatten(0, 2)  # (n·H·hd, ...)
        return stored

    def as_stored(self, block: Tensor) -> Tensor:
        """Our rows as a view of them whose entries come in the order of the stored ones; its shape may be another."""
        transposed = self.transposed and block.dim() == 2
        if self.interleaved:
            block = block.unflatten(0, (*self.interleaved[::-1], -1)).transpose(0, 1)  # (H, n, hd, ...)
        if transposed:
            return block.movedim(-1, 0)  # (in, out)
        return block

    def theirs(self, block: Tensor) -> Tensor:
        """Our rows as they are stored, contiguous."""
        shape = block.shape
        if self.transposed and block.dim() == 2:
            shape = block.T.shape
        return self.as_stored(block).reshape(self.shape or shape).contiguous()


def expand_keys(model: nn.Module, templates: dict[str, str | CheckpointKey], prefix: str) -> dict[str, CheckpointKey]:
    """The key map of a model: each of its tensors that a template is for → how that is published.

    A template says how a module, or a single tensor, of the model is published: "layers.{i}.norm1": "h.{i}.ln_1", where
    {i} is any number, the same on both sides. A module's tensors keep their names behind the module's, and the rows of
    several published modules follow each other as the parts of ours. The plain name `x` stands for CheckpointKey((x,)).
    `prefix` stands in front of what is published, but neither of heads nor of other spellings.
    """

    def template_of(path: str) -> str | CheckpointKey | None:
        return templates.get(path, templates.get(_NUMBER.sub("{i}", path)))

    table = {}
    for key in model.state_dict():
        # A weight in four bits is a module, and its tensors stand for it.
        tensor = re.sub(r"\.weight\..*", ".weight", key)
        module, _, parameter = tensor.rpartition(".")

        # The template of the tensor itself goes before that of its module.
        suffix = ""
        template = template_of(tensor)
        if template is None:
            suffix = f".{parameter}"
            template = template_of(module)
        if template is None:
            continue  # an adapter's
        if isinstance(template, str):
            template = CheckpointKey((template,))

        # The same number on both sides.
        number = next(iter(_NUMBER.findall(tensor)), "")
        base = "" if tensor.startswith("head.") else prefix
        names = tuple(f"{base}{name.format(i=number)}{suffix}" for name in template.names)
        files = tuple(f"{base}{name.format(i=number)}{suffix}" for name in template.files)
        also = tuple(f"{name}{suffix}" for name in template.also)

        # Several names share the rows as the parts of a fused projection do.
        rows: tuple[int, ...] = ()
        if len(names) > 1:
            linear: Any = model.get_submodule(module)
            rows = tuple(part.size for part in linear.parts)
        transposed = template.transposed and tensor.endswith(".weight")
        table[tensor] = replace(template, names=names, rows=rows, also=also, files=files, transposed=transposed)
    return table

"""How the tensors of a model are published: the entries of the models' key maps."""

from dataclasses import dataclass

from torch import Tensor, nn

# Of a tied output matrix that is stored and is not the embedding. Which of the two is meant, who knows.
TIED = "the token embedding, but config.json has tie_word_embeddings = true; set it to false, or take the tensor out"


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
    optional: bool = False  # zero where the checkpoint lacks it

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


def head_key_map(head: nn.Module, task: str, head_keys: dict[str, tuple[str, ...]]) -> dict[str, CheckpointKey]:
    """The entries of a head whose last layer is published under one name: that of the task in the model's `head_keys`.

    An MLP head's hidden layers are in no published checkpoint; ours store them under the same name.
    """
    name = next((pattern.removesuffix(".*") for pattern, tasks in head_keys.items() if task in tasks), "")
    keys = (key for key, _ in head.named_parameters())
    return {f"head.{key}": CheckpointKey((f"{name}.{key.removeprefix('out.')}",)) for key in keys}

"""How the tensors of a model are published: the entries of the models' key maps."""

from dataclasses import dataclass

from torch import Tensor

# Of a tied output matrix that is stored and is not the embedding. Which of the two is meant, who knows.
TIED = "the token embedding, but config.json has tie_word_embeddings = true; set it to false, or take the tensor out"


@dataclass(frozen=True)
class CheckpointKey:
    """How one of our parameters is stored in published checkpoints.

    `names` are the tensors whose rows, in this order, make up ours; `rows` the number of rows of each (empty where
    there is one). `transposed`: stored (in, out), as Conv1D does. `shape`: stored with more dimensions than ours, as
    (D, H, hd) for (D, H·hd). `interleaved` (H, n): the rows of n parts are stored head by head, (H, n, hd), and ours
    part by part, (n, H, hd). `also`: another spelling of the names, read but not written. `optional`: zero where the
    checkpoint lacks it.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False
    shape: tuple[int, ...] = ()
    interleaved: tuple[int, int] | None = None
    also: tuple[str, ...] = ()
    optional: bool = False

    def ours(self, stored: Tensor) -> Tensor:
        """A stored tensor in our layout, as a view where it can be."""
        if self.shape and stored.shape == self.shape:
            stored = stored.flatten(1)
        if self.transposed and stored.dim() == 2:
            stored = stored.T
        if self.interleaved and stored.dim() and len(stored) % (self.interleaved[0] * self.interleaved[1]) == 0:
            return stored.unflatten(0, (*self.interleaved, -1)).transpose(0, 1).flatten(0, 2)
        return stored

    def as_stored(self, block: Tensor) -> Tensor:
        """Our rows as a view of them whose entries come in the order of the stored ones; its shape may be another."""
        transposed = self.transposed and block.dim() == 2
        if self.interleaved:
            block = block.unflatten(0, (*self.interleaved[::-1], -1)).transpose(0, 1)
        return block.movedim(-1, 0) if transposed else block

    def theirs(self, block: Tensor) -> Tensor:
        """Our rows as they are stored, contiguous."""
        shape = block.T.shape if self.transposed and block.dim() == 2 else block.shape
        return self.as_stored(block).reshape(self.shape or shape).contiguous()

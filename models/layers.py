"""What the architectures share: key/value cache, masks and positions, initialisation, names of weights and fields."""

import math
from dataclasses import dataclass, fields
from typing import Any, get_origin

import torch
from torch import Tensor, nn

from .._shapes import shown
from ..kernels import Linear
from .heads import MLPHead

ALL = slice(None)  # layers
# What no model comes near. Beyond, a number is damaged: it would overflow, or take hours to make a model of.
MAX_SIZE, MAX_LAYERS = 2**24, 1000
DEPTHS = ("n_layer", "n_decoder_layer")  # the fields that count layers

# Of a tied output matrix that is stored and is not the embedding. Which of the two is meant, who knows.
TIED = "the token embedding, but config.json has tie_word_embeddings = true; set it to false, or take the tensor out"


@dataclass(frozen=True)
class Published:
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


class KVCache:
    """Keys and values of the positions seen so far: for each layer two buffers (B, K, S, hd), filled from the left.

    Heads come first, because the products of a single query with its keys read them so.
    """

    def __init__(self, n_layer: int, batch: int, length: int, n_kv_head: int, head_width: int, like: Tensor):
        shape = (n_layer, 2, batch, n_kv_head, length, head_width)
        self.buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, T, K, hd) of the next T positions; give all keys and values so far, as views."""
        stop = self.length + k.shape[1]
        keys, values = self.buffer[layer].transpose(2, 3)  # (B, S, K, hd)
        keys[:, self.length : stop], values[:, self.length : stop] = k, v
        return keys[:, :stop], values[:, :stop]

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows (B,) in the place of the present ones, a row once, several times or not at all."""
        kept = self.buffer[:, :, rows, :, : self.length]
        if len(rows) != self.buffer.shape[2]:
            self.buffer = self.buffer.new_empty((*kept.shape[:4], *self.buffer.shape[4:]))
        self.buffer[:, :, :, :, : self.length] = kept


def key_bias(attention_mask: Tensor | None) -> Tensor | None:
    """Which keys (B, 1, 1, S) may be seen, for a mask (B, S) of ones and zeros; None where all may."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()[:, None, None, :]


def refuse_longer(
    input_ids: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, limit: int, past: int = 0
) -> None:
    """ValueError where rows, or packed segments, are longer than the model's `limit` of positions."""
    longest = past + input_ids.shape[1]
    if cu_seqlens is not None:
        longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    if longest > limit:
        raise ValueError(f"rows of {longest} tokens exceed the model's {limit} positions; cut them to {limit}")


def positions(input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, past: int = 0) -> Tensor:
    """Position ids (B or 1, T): counted over the real tokens of each row, or from each segment's start.

    Raises ValueError for a mask that does not say of each cached and new position whether it is real, or beside
    `cu_seqlens`.
    """
    t = input_ids.shape[1]
    if attention_mask is not None:
        if cu_seqlens is not None or attention_mask.shape[1] != past + t:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)}: expected (B, S) with S = {past} cached "
                f"+ {t} new positions, and none beside cu_seqlens, whose segments have no padding"
            )
        return (attention_mask.long().cumsum(1) - 1).clamp_(min=0)[:, -t:]
    index = torch.arange(past, past + t, device=input_ids.device)
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].long()
        index = index - starts.repeat_interleave(cu_seqlens.diff().long(), output_size=t)
    return index[None]


def unpacked(input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Segments of one row (1, N) as rows: ids and mask (n, T) padded on the right, and each token's place in them."""
    lengths = cu_seqlens.diff().long()
    n, width = len(lengths), int(lengths.max()) if max_seqlen is None else max_seqlen
    rows = torch.arange(n, device=input_ids.device).repeat_interleave(lengths, output_size=input_ids.shape[1])
    place = rows * width + positions(input_ids, None, cu_seqlens)[0]
    ids, mask = (torch.zeros(n * width, dtype=torch.long, device=input_ids.device) for _ in range(2))
    ids, mask = ids.index_copy(0, place, input_ids[0]), mask.index_fill(0, place, 1)
    return ids.view(n, width), mask.view(n, width), place


@torch.no_grad()
def initialize(module: nn.Module, std: float = 0.02) -> None:
    """N(0, std²) for matrices, zero for biases, one for norm weights: GPT-2's and BERT's initialisation.

    A head of D columns that scores a text begins with N(0, 1/(D + 1)) (Stiennon et al. 2020, arXiv:2009.01325).
    """
    for child in module.modules():
        if isinstance(child, Linear | nn.Embedding):
            child.weight.normal_(0.0, std)
        for name, parameter in child.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
    for child in module.modules():
        if isinstance(child, MLPHead) and child.scalar:
            child.out.weight.normal_(0.0, (child.out.in_features + 1) ** -0.5)


def own_spelling(published: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """config.json with the fields that transformers also takes under another name (`aliases`: that one → the field).

    Raises ValueError where both are there and contradict each other.
    """
    given = dict(published)
    for other, name in aliases.items():
        if given.get(other) is None:
            continue
        if given.get(name) is None:
            given[name] = given[other]
        if given[name] != given[other]:
            raise ValueError(f"{name} = {given[name]!r}, but {other} = {given[other]!r}; remove the wrong one")
    return given


def read_fields(kind: type, published: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Fields of the configuration class `kind` found in config.json, by `keys` (published name → ours).

    Raises ValueError for a value of another type, and a size below one or beyond all sense.
    """
    types = {field.name: field.type for field in fields(kind)}
    given = {theirs: ours for theirs, ours in keys.items() if theirs in published}
    for theirs, ours in given.items():
        _check_field(theirs, published[theirs], types[ours], MAX_LAYERS if ours in DEPTHS else MAX_SIZE)
    return {ours: published[theirs] for theirs, ours in given.items()}


def _check_field(name: str, value: Any, kind: Any, limit: int) -> None:
    """ValueError where a field of a configuration is no `kind`, or a number out of range."""
    fits = isinstance(value, kind | int if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} = {shown(value)}: expected {getattr(kind, '__name__', kind)}")
    if isinstance(value, bool):
        return
    if isinstance(value, int) and value < 1 and name != "start_id":  # which counts from zero
        raise ValueError(f"{name} = {value!r}: expected a positive number")
    if isinstance(value, int) and value > limit:
        raise ValueError(f"{name} = {shown(value)}: expected at most {limit:,}")
    if isinstance(value, float) and not 0 <= value < math.inf:
        raise ValueError(f"{name} = {value!r}: expected a finite number, not below zero")


def refuse_wider(n_head: int, head_width: int) -> None:
    """ValueError where the heads together are wider than any model."""
    if n_head * head_width > MAX_SIZE:
        raise ValueError(f"{n_head} heads of {head_width}: expected a width of at most {MAX_SIZE:,} together")


def overridden(presets: dict[str, dict], name: str, overrides: dict, kind: type) -> dict:
    """The preset called `name` with overrides, which are fields of the configuration class `kind`.

    ValueError for a name that isn't exact, and for a value as `read_fields` says.
    """
    if name not in presets:
        raise ValueError(f"preset {name!r} is unknown; known: {', '.join(presets)}")
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    if unknown := sorted(set(overrides) - set(types)):
        raise ValueError(f"{', '.join(unknown)}: no such configuration field; known: {', '.join(sorted(types))}")
    for field, value in overrides.items():
        if get_origin(types[field]) is not tuple:
            _check_field(field, value, types[field], MAX_LAYERS if field in DEPTHS else MAX_SIZE)
    return {**presets[name], **overrides}

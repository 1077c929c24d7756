"""What models are given, and what it means: masks, positions, segments laid end to end.

Shapes: B rows, T new tokens, S cached and new tokens, N tokens of all n segments of a packed row.
"""

import torch
from torch import Tensor

ALL_LAYERS = slice(None)


def hides_nothing(attention_mask: Tensor | None) -> bool:
    """Whether a mask of ones and zeros is known to be all ones; on a GPU, which isn't waited for, it never is."""
    return attention_mask is None or (not attention_mask.is_cuda and bool(attention_mask.all()))


def key_bias(attention_mask: Tensor | None) -> Tensor | None:
    """Which keys (B, 1, 1, S) may be seen, for a mask (B, S) of ones and zeros; None where all are known to be."""
    if attention_mask is None or hides_nothing(attention_mask):
        return None
    return attention_mask.bool()[:, None, None, :]  # (B, 1, 1, S)


def check_length(
    input_ids: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, limit: int, past: int = 0
) -> None:
    """ValueError where rows, or packed segments, are longer than the model's `limit` of positions."""
    longest = past + input_ids.shape[1]
    if max_seqlen is not None and cu_seqlens is not None:
        longest = max_seqlen
    elif cu_seqlens is not None:
        longest = int(cu_seqlens.diff().max())

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
        # Padding in front of the first real token would count as −1, which no table has.
        return (attention_mask.long().cumsum(1) - 1).clamp_(min=0)[:, -t:]  # (B, T)

    index = torch.arange(past, past + t, device=input_ids.device)  # (T,)
    if cu_seqlens is not None:
        # With `output_size` a GPU needn't be asked for the sum of the lengths.
        starts = cu_seqlens[:-1].long()  # (n,)
        index = index - starts.repeat_interleave(cu_seqlens.diff().long(), output_size=t)
    return index[None]  # (1, T)


def unpacked(input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The segments of one row (1, N) as rows of their own, padded on the right.

    Returns ids and mask (n, T), and where each token (N,) went in the rows laid end to end.
    """
    n = len(cu_seqlens) - 1
    lengths = cu_seqlens.diff().long()  # (n,)
    if max_seqlen is None:
        max_seqlen = int(lengths.max())

    # A token goes to its row, and in it to its position from the segment's start.
    rows = torch.arange(n, device=input_ids.device).repeat_interleave(lengths, output_size=input_ids.shape[1])  # (N,)
    index = rows * max_seqlen + positions(input_ids, None, cu_seqlens)[0]  # (N,)

    zeros = torch.zeros(n * max_seqlen, dtype=torch.long, device=input_ids.device)
    ids = zeros.index_copy(0, index, input_ids[0]).view(n, max_seqlen)  # (n, T)
    mask = zeros.index_fill(0, index, 1).view(n, max_seqlen)  # (n, T)
    return ids, mask, index

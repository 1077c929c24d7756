"""What models are given, and what it means: masks, positions, segments laid end to end."""

import torch
from torch import Tensor

ALL = slice(None)  # layers


def key_bias(attention_mask: Tensor | None) -> Tensor | None:
    """Which keys (B, 1, 1, S) may be seen, for a mask (B, S) of ones and zeros; None where all may."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()[:, None, None, :]


def check_length(
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

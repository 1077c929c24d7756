"""Attention with one interface for all shapes of mask: causal, packed, windowed, biased.

    out_t = Σ_s softmax_s(scale · q_t · k_s + bias_ts) v_s       over the s that t may see

No (T, S) mask is made for the structured cases. *Packed* rows (`cu_seqlens`) are segments laid end to end in one row;
they never see each other, because each is computed by itself. Segments of one length, or a single one, are the rows of
a batch, by a view. Texts that begin alike can share their beginning: it is a segment, and the others, of what follows,
see its keys and values in front of their own (`keys`). Which implementation serves which case, and why:

    case                      GPU, 16 bits              GPU, fp32    CPU
    whole rows                torch (cuDNN or           torch; with  rows.py, cpu.py
      (a query, too)          FlashAttention 2, as it   shared keys
                              prefers on this GPU)      Triton
    packed; in a window;      varlen, FlashAttention 2  Triton       rows.py: segments one by one,
      causal with T < S                                              a window in blocks of queries
    with a bias or ALiBi      Triton; a query: torch    the same     rows.py: a dense mask
    soft-capped               Triton; a query: blocks   the same     blocks.py
    with dropout              blocks.py, on all devices

torch's kernels are the fastest, and take no bias (or only as a dense one). Its varlen function is missing in older
versions, and wants heads of a multiple of 8 and at most 256, and a GPU from Ampere on; the kernels of
`forward_triton.py` take what it doesn't. They save q, k, v, the output and one number a query and head. What is left,
of wider heads or on a GPU without Triton, is computed as on a CPU.
Where the process has called torch.nn.attention.activate_flash_attention_impl("FA3") or "FA4", torch's function runs
that in place of FlashAttention 2.
"""

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend
from ..dropout import seed_for
from .blocks import Settings, block_attention
from .rows import add_alibi, packed_attention, row_attention

WIDEST = 256  # head width that torch's kernels and ours take


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    keys: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Multi-head attention of q (B, T, H, hd) over k, v (B, S, K, hd), H a multiple of K; gives (B, T, H, hd).

    `causal`: query t sees keys up to S − T + t (the queries are the last T of S positions). `window`: of those, the
    last `window` (or |t − s| < window if not causal). `cu_seqlens` (n + 1,) int: B is 1 and the row is made of segments
    with these bounds; `max_seqlen` is their greatest length, given on CUDA to avoid waiting for it. `keys`: the tokens
    that the segments see, where these are more than their own: an index (M,), one segment's behind the other's, and its
    bounds (n + 1,); the queries are the last of a segment's keys, and `max_seqlen` is the greatest number of keys.
    `bias`: additive (float) or allowed (bool), broadcastable to (B, H, T, S), on top of `causal` and `window`. `alibi`
    (H,): slopes of a bias that grows with the position, slope_h · (s − t) (https://arxiv.org/abs/2108.12409), and takes
    no gradient. `scale` is 1/√hd where not given. `softcap`: scaled scores x become softcap · tanh(x / softcap), before
    any bias. A query that may see nothing gives finite numbers without meaning. `dropout` of what is attended to has
    this probability, and by the same `seed` the same mask; None draws one.

    Raises ValueError where shapes don't fit, `bias` comes with `cu_seqlens`, or `keys` without.
    """
    _check(q, k, v, cu_seqlens, bias, alibi)
    if keys is not None and cu_seqlens is None:
        raise ValueError("keys: they are those of packed segments (cu_seqlens)")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    key_bounds = cu_seqlens
    if keys is not None:
        index, key_bounds = keys
        k = _selected(k, index)  # (1, M, K, hd)
        v = _selected(v, index)
    if key_bounds is None or max_seqlen is None:
        max_seqlen = k.shape[1] if key_bounds is None else int(key_bounds.diff().max())

    # The lengths are equal if the greatest, as often as there are segments, comes to all tokens.
    n_segments = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    if cu_seqlens is not None and keys is None and n_segments * max_seqlen == q.shape[1]:
        rows = (x[0].unflatten(0, (n_segments, max_seqlen)) for x in (q, k, v))  # (n, T, H or K, hd)
        out = attention(
            *rows, window=window, alibi=alibi, causal=causal, scale=scale, softcap=softcap, dropout=dropout, seed=seed
        )
        return out.flatten(0, 1)[None]  # (1, n · T, H, hd)

    # A window as long as the longest sequence hides nothing.
    if window is not None and window >= max_seqlen:
        window = None

    t, s = q.shape[1], k.shape[1]
    by_kernels = t > 1 and _our_kernels_take(q, k, v, bias)
    if dropout or (softcap is not None and not by_kernels):
        bounds = None if cu_seqlens is None or key_bounds is None else (cu_seqlens, key_bounds)
        settings = Settings(window, causal, scale, softcap)
        return block_attention(q, k, v, bounds, bias, alibi, settings, dropout, seed_for(dropout, seed))

    # Whole rows and single queries are torch's, but for the interpreter, under which our kernels are tested. In fp32
    # torch's kernels for a GPU share no keys among heads.
    plain = bias is None and alibi is None and softcap is None
    unmasked = plain and cu_seqlens is None and window is None
    shared = q.is_cuda and q.dtype == torch.float32 and q.shape[2] != k.shape[2]
    whole_rows = t == 1 or (unmasked and not shared and (t == s or not causal))
    if t > 1 and (backend.INTERPRETED or not whole_rows):
        if plain and _varlen_takes(q):
            return _varlen(q, k, v, cu_seqlens, key_bounds, max_seqlen, window, causal, scale)
        if by_kernels:
            if bias is not None:
                bias = bias[(None,) * (4 - bias.dim())]  # (B or 1, H or 1, T or 1, S or 1)
            shape = (cu_seqlens, key_bounds, max_seqlen, window, causal, softcap)
            return _Flash.apply(q, k, v, bias, alibi, *shape, scale)

    if cu_seqlens is None or key_bounds is None:
        return row_attention(q, k, v, window, add_alibi(bias, alibi, q, k), causal, scale)
    return packed_attention(q, k, v, cu_seqlens, key_bounds, window, alibi, causal, scale)


def _selected(x: Tensor, index: Tensor) -> Tensor:
    """The tokens `index` (M,) of x (1, S, K, hd), some of them several times: (1, M, K, hd)."""
    # As of an embedding: the gradient of a token is summed in order then, on a GPU, too, and there in fp32.
    return F.embedding(index, x[0].flatten(1)).unflatten(1, x.shape[2:])[None]


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, bias: Tensor | None, alibi: Tensor | None
) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k, v: expected (B, T, H, hd), (B, S, K, hd) twice; got {[tuple(x.shape) for x in (q, k, v)]}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q: its {q.shape[2]} heads must be a multiple of k's {k.shape[2]}")
    if cu_seqlens is not None and (bias is not None or q.shape[0] != 1):
        raise ValueError(f"cu_seqlens: goes with one packed row and no bias; got q {tuple(q.shape)}")
    if alibi is not None and alibi.shape != q.shape[2:3]:
        raise ValueError(f"alibi: expected a slope for each of {q.shape[2]} heads; got {tuple(alibi.shape)}")


def _varlen_takes(q: Tensor) -> bool:
    """Whether torch's function for packed segments computes this on its device."""
    if not (q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)) or not _from_ampere_on(q.device):
        return False

    # Of some widths consumer GPUs have no backward pass.
    width = q.shape[3]
    takes_width = width % 8 == 0 and width <= WIDEST and not 192 < width <= 224
    return takes_width and {"scale", "window_size"} <= _varlen_arguments()


@cache
def _from_ampere_on(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _varlen_arguments() -> frozenset[str]:
    """The arguments that torch's function for packed segments takes here; older versions lack some, or the function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _our_kernels_take(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether our kernels compute this. A bias whose gradient is added up over queries or keys stays with torch."""
    if q.shape[3] > WIDEST or not backend.on_triton(q, k, v):
        return False
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return True
    return bias.shape[-2:] == (q.shape[1], k.shape[1])


class _Flash(torch.autograd.Function):
    """Attention by our Triton kernels."""

    @staticmethod
    def forward(
        ctx, q, k, v, bias, alibi, cu_seqlens, key_bounds, max_seqlen, window, causal: bool, softcap, scale: float
    ) -> Tensor:
        from . import forward_triton

        ctx.mask = max_seqlen, window, causal, softcap
        ctx.scale = scale
        tensors = bias, alibi, cu_seqlens, key_bounds
        out, lse = forward_triton.forward(q, k, v, forward_triton.Mask(*tensors, *ctx.mask), scale)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from . import backward_triton, forward_triton

        q, k, v, out, lse, *tensors = ctx.saved_tensors
        mask = forward_triton.Mask(*tensors, *ctx.mask)
        grads = backward_triton.backward(grad, q, k, v, out, lse, mask, ctx.scale, ctx.needs_input_grad[:4])
        return *grads, *(None,) * 8


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, key_bounds: Tensor | None, longest: int,
    window: int | None, causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Packed segments, or rows of a batch as such, on CUDA and in one launch; `longest` is the most keys of one."""
    from torch.nn.attention.varlen import varlen_attn

    b, t = q.shape[:2]
    longest_queries = t if cu_seqlens is None else longest
    if cu_seqlens is not None and key_bounds is not None:
        bounds, key_bounds = cu_seqlens.int(), key_bounds.int()
    else:
        bounds, key_bounds = (torch.arange(b + 1, dtype=torch.int32, device=q.device) * x.shape[1] for x in (q, k))

    # Beside a query itself: how many keys in front of it, and how many behind it; −1 is all of them.
    reach = -1 if window is None else window - 1
    options: dict[str, Any] = {"scale": scale, "window_size": (reach, 0 if causal else reach)}
    if q.shape[2] != k.shape[2] and "enable_gqa" in _varlen_arguments():
        options["enable_gqa"] = True  # without this argument, grouped heads are taken unasked
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B · T, H, hd), (B · S, K, hd) twice
    out = varlen_attn(q, k, v, bounds, key_bounds, longest_queries, longest, **options)  # (B · T, H, hd)

    # It is a tuple only where the log-sum-exps are asked for, too.
    assert isinstance(out, Tensor)
    return out.unflatten(0, (b, t))

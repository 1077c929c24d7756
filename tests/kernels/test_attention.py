"""Attention in all its shapes against one dense formula in float64."""

from itertools import chain, pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor

from handtune.kernels import attention
from handtune.kernels.attn import attend, cpu
from handtune.kernels.attn.reference import attention_reference
from handtune.kernels.backend import INTERPRETED

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
BOUND = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2}


@pytest.fixture(params=[256, 4], ids=["one block", "blocks of 4"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "QUERY_BLOCK", request.param)


def qkv(b: int, t: int, h: int = 2, hd: int = 4, s: int | None = None, kv: int | None = None) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(b + t + h + hd)
    shapes = ((b, t, h, hd), (b, s or t, kv or h, hd), (b, s or t, kv or h, hd))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]


def seen(t: int, s: int, causal: bool, window: int | None = None, segments: tuple[int, ...] = ()) -> Tensor:
    """(T, S), true where query t may see key s: the definition, entry by entry."""
    owner = [i for i, n in enumerate(segments or (s,)) for _ in range(n)]
    allowed = torch.zeros(t, s, dtype=torch.bool)
    for row in range(t):
        at = s - t + row
        for key in range(s):
            near = window is None or abs(at - key) < window
            allowed[row, key] = (key <= at or not causal) and near and owner[at] == owner[key]
    return allowed


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, float("-inf"))


def check(tensors: tuple[Tensor, ...], dtype: torch.dtype, mask: Tensor, **settings) -> None:
    """Output and gradients of `attention` equal the dense formula's under this additive mask."""
    rounded = tuple(t.to(dtype) for t in tensors)
    ours, truth = leaves(rounded, dtype), leaves(rounded, torch.float64)
    out, expected = attention(*ours, **settings), attention_reference(*truth, bias=mask, causal=False)
    assert out.dtype == dtype
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(incoming)
    expected.backward(incoming.double())
    pairs = [(out.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(ours, truth, strict=True))]
    for name, (got, true) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        assert got.shape == true.shape
        error = (got.double() - true).abs().max() / true.abs().max().clamp(min=1)
        assert error <= BOUND[dtype], f"{name}: off by {error:.1e}"


@DTYPES
@CAUSAL
@pytest.mark.parametrize(("b", "t", "h", "hd"), [(1, 1, 1, 1), (2, 4, 1, 8), (1, 9, 3, 5), (2, 13, 2, 16)])
@pytest.mark.usefixtures("_blocks")
def test_dense(dtype: torch.dtype, causal: bool, b: int, t: int, h: int, hd: int) -> None:
    check(qkv(b, t, h, hd), dtype, additive(seen(t, t, causal)), causal=causal)


@DTYPES
@CAUSAL
@pytest.mark.usefixtures("_blocks")
def test_fewer_key_heads_than_query_heads(dtype: torch.dtype, causal: bool) -> None:
    check(qkv(2, 7, h=6, kv=2), dtype, additive(seen(7, 7, causal)), causal=causal)
    check(qkv(1, 7, h=4, kv=1), dtype, additive(seen(7, 7, causal)), causal=causal)


@DTYPES
@CAUSAL
@pytest.mark.parametrize("t", [1, 2, 5])
@pytest.mark.usefixtures("_blocks")
def test_queries_are_the_last_of_more_keys(dtype: torch.dtype, causal: bool, t: int) -> None:
    check(qkv(2, t, s=9), dtype, additive(seen(t, 9, causal)), causal=causal)
    check(qkv(2, t, h=4, s=9, kv=2), dtype, additive(seen(t, 9, causal)), causal=causal)


@DTYPES
@pytest.mark.parametrize(("h", "kv"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 20])
def test_one_query_with_a_cache(dtype: torch.dtype, h: int, kv: int, window: int | None) -> None:
    """As in generation: with left-padded rows, with a bias for each head, with slopes."""
    tensors, allowed = qkv(2, 1, h, s=9, kv=kv), seen(1, 9, True, window)
    check(tensors, dtype, additive(allowed), window=window)
    mask = torch.arange(9) >= torch.tensor([0, 3])[:, None]
    mask[:, -1] = True
    check(tensors, dtype, additive(allowed & mask[:, None, None, :]), window=window, bias=mask[:, None, None, :])
    heads = torch.randn(h, 1, 9, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    check(tensors, dtype, additive(allowed) + heads.double(), window=window, bias=heads)
    slopes = torch.linspace(0.1, 1, h)
    falling = slopes.double()[:, None, None] * (torch.arange(9) - 8)
    check(tensors, dtype, additive(allowed) + falling, window=window, alibi=slopes)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("h", "kv"), [(8, 8), (8, 2)])
def test_one_query_before_keys_that_are_not_there_yet(dtype: torch.dtype, h: int, kv: int) -> None:
    """As in a cache that is seen whole: behind a mask, and with slopes that count from the nearest key, far away."""
    q, k, v = (x.to(dtype) for x in qkv(1, 1, h, s=20, kv=kv))
    room = torch.zeros(1, 280, kv, q.shape[3], dtype=dtype)
    keys, values = (torch.cat((x, room), 1) for x in (k, v))
    mask = torch.arange(300)[None, None, None] < 20  # (1, 1, 1, 300)
    slopes = 2.0 ** -torch.arange(1.0, h + 1)
    for alibi in (None, slopes):
        expected = attention(q.double(), k.double(), v.double(), alibi=alibi)
        found = attention(q, keys, values, bias=mask, alibi=alibi)
        bound = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
        assert (found - expected).norm() <= bound * expected.norm()


@torch.no_grad()
def test_one_query_reads_the_window_alone() -> None:
    """Not the rest of the cache under a mask: what is not a number there would spread."""
    q, k, v = (x.float() for x in qkv(2, 1, 6, s=9, kv=2))
    k[:, :5] = v[:, :5] = float("nan")
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    assert attention(q, k, v, window=4).isfinite().all()
    assert attention(q, k, v, window=4, bias=mask).isfinite().all()


@DTYPES
@CAUSAL
@pytest.mark.parametrize("window", [1, 3, 4, 10, 11, 50])
@pytest.mark.parametrize("t", [11, 4])
def test_window(dtype: torch.dtype, causal: bool, window: int, t: int) -> None:
    check(qkv(2, t, s=11), dtype, additive(seen(t, 11, causal, window)), causal=causal, window=window)


@DTYPES
@CAUSAL
@pytest.mark.parametrize("window", [None, 3], ids=["no window", "window"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (1, 2, 9, 9), (2, 2, 9, 9)], ids=str)
def test_bias(dtype: torch.dtype, causal: bool, window: int | None, shape: tuple[int, ...]) -> None:
    """Added where it is a number, allowed where it is a truth value, on top of the rest, in any broadcast."""
    allowed = seen(9, 9, causal, window)
    generator = torch.Generator().manual_seed(0)
    number = torch.randn(shape, generator=generator).to(dtype)
    check(qkv(2, 9), dtype, number.double() + additive(allowed), causal=causal, window=window, bias=number)
    truth = (torch.rand(shape, generator=generator) < 0.6) | torch.eye(9, dtype=torch.bool)
    check(qkv(2, 9), dtype, additive(allowed & truth), causal=causal, window=window, bias=truth)


@DTYPES
@CAUSAL
@pytest.mark.parametrize("window", [None, 3], ids=["no window", "window"])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 1, 8, 2), (7,), (1, 1)], ids=str)
@pytest.mark.usefixtures("_blocks")
def test_packed(dtype: torch.dtype, causal: bool, window: int | None, lengths: tuple[int, ...]) -> None:
    n = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = additive(seen(n, n, causal, window, lengths))
    check(qkv(1, n, h=4, kv=2), dtype, mask, causal=causal, window=window, cu_seqlens=bounds, max_seqlen=max(lengths))
    check(qkv(1, n), dtype, mask, causal=causal, window=window, cu_seqlens=bounds)


# Beginnings, and what follows them: of each row its beginning's number, and how many tokens are its own.
SHARED = {
    "two beginnings": ((3, 4), ((0, 2), (0, 1), (0, 2), (1, 5))),
    "alike": ((3,), ((0, 2), (0, 2))),
    "longer than what goes in one call": ((40,), ((0, 3), (0, 3), (0, 1), (0, 7))),
    "none of its own": ((6,), ()),
}


def behind_beginnings(beginnings: tuple[int, ...], rows: tuple[tuple[int, int], ...]) -> tuple[list, list[int]]:
    """Which tokens each segment sees, and how many of these are its own, for beginnings that stand in front."""
    starts = [0, *torch.tensor(beginnings).cumsum(0).tolist()]
    seen_by = [list(range(*bounds)) for bounds in pairwise(starts)]
    lengths = list(beginnings)
    for beginning, own in rows:
        seen_by.append([*seen_by[beginning], *range(sum(lengths), sum(lengths) + own)])
        lengths.append(own)
    return seen_by, lengths


@DTYPES
@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("kind", ["plain", "window", "alibi", "both ways"])
@pytest.mark.usefixtures("_blocks")
def test_segments_that_share_their_beginning(dtype: torch.dtype, case: str, kind: str) -> None:
    """Entry by entry: a query sees what its segment sees, up to its own place among it."""
    seen_by, lengths = behind_beginnings(*SHARED[case])
    n = sum(lengths)
    window = 3 if kind == "window" else None
    slopes = torch.tensor([0.5, 0.125, 0.25, 1.0]) if kind == "alibi" else None
    mask = torch.full((4, n, n), float("-inf"), dtype=torch.float64)
    query = 0
    for tokens, own in zip(seen_by, lengths, strict=True):
        for place in range(len(tokens) - own, len(tokens)):
            for key_place, key in enumerate(tokens):
                distance = place - key_place
                if (distance >= 0 or kind == "both ways") and (window is None or distance < window):
                    mask[:, query, key] = 0 if slopes is None else -slopes.double() * distance
            query += 1

    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    keys = (torch.tensor(list(chain.from_iterable(seen_by))), torch.tensor([0, *map(len, seen_by)]).cumsum(0).int())
    settings = {"cu_seqlens": bounds, "keys": keys, "window": window, "alibi": slopes, "causal": kind != "both ways"}
    check(qkv(1, n, h=4, kv=2), dtype, mask, **settings)
    check(qkv(1, n, h=4), dtype, mask, max_seqlen=max(map(len, seen_by)), **settings)
    tensors = qkv(1, n, h=4, kv=2)
    torch.testing.assert_close(
        attention_reference(*tensors, **settings), attention_reference(*tensors, bias=mask, causal=False)
    )


@DTYPES
@CAUSAL
@pytest.mark.parametrize("lengths", [(5, 5), (5, 3, 6)], ids=str)
def test_a_packed_segment_is_the_segment_alone(dtype: torch.dtype, causal: bool, lengths: tuple[int, ...]) -> None:
    """Whatever stands in the other segments: NaN there changes nothing here."""
    tensors = tuple(t.to(dtype) for t in qkv(1, sum(lengths)))
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for start, stop in pairwise(bounds):
        poisoned = [torch.full_like(t, float("nan")) for t in tensors]
        for there, t in zip(poisoned, tensors, strict=True):
            there[:, start:stop] = t[:, start:stop]
        out = attention(*poisoned, cu_seqlens=torch.tensor(bounds), causal=causal)[:, start:stop]
        alone = attention(*(t[:, start:stop] for t in tensors), causal=causal)
        torch.testing.assert_close(out, alone, rtol=0, atol=BOUND[dtype] / 3)


@DTYPES
@CAUSAL
@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"bias": torch.rand(2, 1, 5, 9) < 0.7}], ids=str)
def test_alibi(dtype: torch.dtype, causal: bool, settings: dict) -> None:
    """A slope a head, times the distance to the key: alone, in a window, and on top of a bias."""
    slopes = torch.tensor([0.5, 0.125])
    distance = torch.arange(9) - torch.arange(4, 9)[:, None]
    allowed = seen(5, 9, causal, settings.get("window"))
    if "bias" in settings:
        settings = {"bias": settings["bias"] | torch.eye(9, dtype=torch.bool)[4:]}
        allowed = allowed & settings["bias"]
    mask = slopes.double()[:, None, None] * distance + additive(allowed)
    check(qkv(2, 5, s=9), dtype, mask, causal=causal, alibi=slopes, **settings)


@DTYPES
@pytest.mark.parametrize("lengths", [(4, 4), (5, 1, 3)], ids=str)
def test_alibi_packed(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    slopes, n = torch.tensor([0.5, 0.125]), sum(lengths)
    distance = torch.arange(n) - torch.arange(n)[:, None]
    mask = slopes.double()[:, None, None] * distance + additive(seen(n, n, True, None, lengths))
    check(qkv(1, n), dtype, mask, alibi=slopes, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())


def test_alibi_adds_to_an_additive_bias_and_gives_its_gradient() -> None:
    slopes, tensors = torch.tensor([0.5, 0.125], dtype=torch.float64), qkv(1, 6)
    ours, theirs = (torch.linspace(0, 1, 36).view(6, 6).double().requires_grad_() for _ in range(2))
    attention(*tensors, bias=ours, alibi=slopes).sum().backward()
    distance = torch.arange(6) - torch.arange(6)[:, None]
    mask = theirs + slopes[:, None, None] * distance + additive(seen(6, 6, True))
    attention_reference(*tensors, bias=mask, causal=False).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@CAUSAL
@pytest.mark.parametrize("window", [None, 3])
def test_the_reference_knows_the_masks_by_itself(causal: bool, window: int | None) -> None:
    """What the kernels' tests compare with is the definition, entry by entry; a query that sees nothing gives zeros."""
    tensors, lengths = qkv(1, 9), (4, 5)
    for segments, bounds in (((), None), (lengths, torch.tensor([0, 4, 9]))):
        got = attention_reference(*tensors, causal=causal, window=window, cu_seqlens=bounds)
        mask = additive(seen(9, 9, causal, window, segments))
        torch.testing.assert_close(got, attention_reference(*tensors, bias=mask, causal=False))
    blind = attention_reference(*tensors, bias=torch.arange(9)[:, None] != 2)
    assert not blind[:, 2].any() and blind[:, 3].any()


@DTYPES
def test_left_padding(dtype: torch.dtype) -> None:
    """Padded queries see nothing and stay finite, gradients too; real ones are as without padding."""
    tensors = tuple(t.to(dtype) for t in qkv(2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    inputs = leaves(tensors, dtype)
    out = attention(*inputs, bias=mask[:, None, None])
    assert out.isfinite().all()
    alone = attention(*(t[:1, 3:] for t in tensors))
    torch.testing.assert_close(out[:1, 3:], alone, rtol=0, atol=BOUND[dtype])
    out[mask].sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)
    assert all(not t.grad[~mask].any() for t in inputs)
    assert attention(*inputs, bias=mask[:, None, None], window=2).isfinite().all()


@DTYPES
@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"causal": False}, {"cu_seqlens": torch.tensor([0, 2, 9])}])
def test_scale(dtype: torch.dtype, settings: dict) -> None:
    q, k, v = (t.to(dtype) for t in qkv(1, 9))
    explicit = attention(q, k, v, scale=1.0, **settings)
    torch.testing.assert_close(explicit, attention(2 * q, k, v, **settings), rtol=0, atol=BOUND[dtype])


@DTYPES
@pytest.mark.parametrize(
    "settings",
    [{}, {"causal": False}, {"window": 3}, {"cu_seqlens": torch.tensor([0, 2, 9])}, {"bias": torch.ones(9, 9).tril()}],
    ids=["causal", "both ways", "window", "packed", "bias"],
)
@pytest.mark.usefixtures("_blocks")
def test_house_rules(dtype: torch.dtype, settings: dict) -> None:
    """Nothing is written into, two runs are bitwise equal, heads-first inputs and expanded gradients are taken."""
    bias = settings.get("bias")
    before_bias = None if bias is None else bias.clone()
    tensors = tuple(t.to(dtype) for t in qkv(1, 9))
    runs = []
    for heads_first in (False, False, True):
        inputs = [t.clone() for t in tensors]
        if heads_first:
            inputs = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
        inputs = [t.requires_grad_() for t in inputs]
        out = attention(*inputs, **settings)
        value = out.detach().clone()
        incoming = torch.linspace(-1, 1, 4, dtype=dtype).expand(out.shape)
        out.backward(incoming)
        assert torch.equal(out, value)
        assert torch.equal(incoming, torch.linspace(-1, 1, 4, dtype=dtype).expand(out.shape))
        assert all(torch.equal(a, b) for a, b in zip(inputs, tensors, strict=True))
        runs.append([value, *(t.grad for t in inputs)])
    assert bias is None or torch.equal(bias, before_bias)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    for a, b in zip(runs[0], runs[2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=BOUND[dtype])


@pytest.mark.parametrize("kv", [2, 1])
@pytest.mark.parametrize(("causal", "s"), [(True, 6), (False, 6), (False, 9)])
@pytest.mark.usefixtures("_blocks")
def test_gradcheck_of_the_recomputing_path(causal: bool, s: int, kv: int) -> None:
    inputs = leaves(qkv(2, 6, hd=3, s=s, kv=kv), torch.float64)
    recomputed = lambda *t: cpu.Recomputed.apply(*t, causal, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(recomputed, inputs, check_undefined_grad=False)


def test_bf16_keeps_q_k_v_and_no_probabilities() -> None:
    inputs = [torch.randn(1, 32, heads, 4, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(*inputs)
    sizes = [t.untyped_storage().nbytes() for t in inputs]
    assert kept == (
        [*sizes, sizes[0], 4 * 32 * 4] if INTERPRETED else sizes
    )  # Triton's: the output, a sum a query and head


@pytest.mark.parametrize(
    ("shapes", "settings", "says"),
    [
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 3, 2, 8)), {}, "q, k, v: expected"),
        (((4, 2, 8),) * 3, {}, "q, k, v: expected"),
        (((2, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), {}, "q, k, v: expected"),
        (((1, 4, 2, 8), (1, 4, 2, 4), (1, 4, 2, 4)), {}, "q, k, v: expected"),
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), {}, "its 3 heads must be a multiple of k's 2"),
        (((1, 4, 2, 8),) * 3, {"cu_seqlens": torch.tensor([0, 4]), "bias": torch.zeros(4, 4)}, "cu_seqlens: goes with"),
        (((2, 4, 2, 8),) * 3, {"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: goes with one packed row"),
        (((1, 4, 2, 8),) * 3, {"keys": (torch.arange(4), torch.tensor([0, 4]))}, "keys: they are those of packed"),
        (((2, 4, 2, 8),) * 3, {"alibi": torch.ones(3)}, "alibi: expected a slope for each of 2 heads"),
    ],
)
def test_refusals(shapes: tuple, settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attention(*(torch.zeros(shape) for shape in shapes), **settings)


def varlen_by_the_letter(q, k, v, q_bounds, k_bounds, max_q: int, max_k: int, scale: float, window_size) -> Tensor:
    """What torch says of its function: segment by segment, keys at most so far before and behind the query's place."""
    outs = []
    longest = [0, 0]
    for (q_start, q_stop), (k_start, k_stop) in zip(
        pairwise(q_bounds.tolist()), pairwise(k_bounds.tolist()), strict=True
    ):
        rows = [q[None, q_start:q_stop], k[None, k_start:k_stop], v[None, k_start:k_stop]]
        t, s = q_stop - q_start, k_stop - k_start
        ahead = torch.arange(s) - (torch.arange(t)[:, None] + s - t)  # of the query's place
        before, behind = (reach if reach >= 0 else s for reach in window_size)
        allowed = (ahead >= -before) & (ahead <= behind)
        outs.append(attention_reference(*rows, bias=allowed, causal=False, scale=scale)[0])
        longest = [max(longest[0], t), max(longest[1], s)]
    assert longest == [max_q, max_k] and q_bounds.dtype == k_bounds.dtype == torch.int32
    return torch.cat(outs)


def older_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)) -> Tensor:
    return varlen_by_the_letter(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def newer_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
) -> Tensor:
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen_by_the_letter(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


@CAUSAL
@pytest.mark.parametrize("torchs", [older_varlen, newer_varlen], ids=["without enable_gqa", "with it"])
@pytest.mark.parametrize("kv", [4, 2])
def test_torchs_packed_attention_is_asked_for_the_same(monkeypatch, torchs, causal: bool, kv: int) -> None:
    """As on a GPU: packed rows and windows by torch's function, in the form of older versions and of newer ones."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls: list[tuple] = []
    original = attend._varlen
    monkeypatch.setattr(varlen, "varlen_attn", torchs)
    monkeypatch.setattr(attend, "_varlen_takes", lambda q: True)
    monkeypatch.setattr(attend, "_varlen", lambda *args: calls.append(args) or original(*args))
    attend._varlen_arguments.cache_clear()

    lengths = (5, 1, 8)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    for window in (None, 1, 3):
        mask = additive(seen(14, 14, causal, window, lengths))
        check(qkv(1, 14, 4, 8, kv=kv), torch.float32, mask, causal=causal, window=window, cu_seqlens=bounds)
        rows = qkv(2, 4, 4, 8, s=9, kv=kv)
        check(rows, torch.float32, additive(seen(4, 9, causal, window)), causal=causal, window=window)
    attend._varlen_arguments.cache_clear()
    # Without a window, queries that see all keys are torch's plain rows, but for the interpreter.
    assert len(calls) == (6 if causal or INTERPRETED else 5)


def test_segments_of_one_length_are_plain_rows(monkeypatch) -> None:
    """Known from the greatest length, without a look at the bounds, which may be on a GPU."""
    monkeypatch.setattr(attend, "packed_attention", mock.Mock(side_effect=AssertionError))
    for lengths in ((6,), (3, 3), (2, 2, 2)):
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        mask = additive(seen(6, 6, True, None, lengths))
        check(qkv(1, 6), torch.float32, mask, cu_seqlens=bounds, max_seqlen=lengths[0])
    monkeypatch.setattr(attend, "_varlen_takes", lambda q: True)
    monkeypatch.setattr(attend, "_varlen", mock.Mock(side_effect=AssertionError))
    with pytest.raises(AssertionError):
        attention(*qkv(1, 6), cu_seqlens=torch.tensor([0, 2, 6]), max_seqlen=4)


def test_max_seqlen_says_nothing_of_unpacked_rows():
    q, k, v = (torch.randn(2, 8, 2, 4) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, window=3, max_seqlen=3), attention(q, k, v, window=3))

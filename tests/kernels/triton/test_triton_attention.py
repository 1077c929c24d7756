"""Attention's Triton kernels in all their shapes, against the dense formula in float64; interpreted, or on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from unittest import mock

import pytest
import torch
from kernel_cases import draw
from launches import launched
from torch import Tensor

from handtune.kernels import attention
from handtune.kernels.attn import forward_triton
from handtune.kernels.attn.reference import attention_reference
from handtune.models.layers.inputs import key_bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "fp16", "bf16"])
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])


def qkv(b: int, t: int, h: int = 1, hd: int = 8, s: int | None = None, kv: int | None = None) -> list[Tensor]:
    return [draw(b, t, h, hd), draw(b, s or t, kv or h, hd, seed=1), draw(b, s or t, kv or h, hd, seed=2)]


def placed(settings: dict) -> dict:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in settings.items()}


def leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(DEVICE, dtype, copy=True).requires_grad_() for x in tensors]


def run(function, inputs: list[Tensor], settings: dict) -> list[Tensor]:
    """The output, then the gradients of the inputs: q, k, v, and a bias where a fourth is given."""
    out = function(*inputs[:3], **settings, **({"bias": inputs[3]} if len(inputs) > 3 else {}))
    out.backward(draw(*out.shape, seed=3).to(inputs[0].dtype).to(out))
    return [out.detach(), *(x.grad for x in inputs)]


def check(tensors: list[Tensor], dtype: torch.dtype, **settings) -> None:
    rounded, settings = [x.to(dtype) for x in tensors], placed(settings)
    with launched() as kernels:
        ours = run(attention, leaves(rounded, dtype), settings)
    assert {"_forward_kernel", "_dq_kernel", "_dkv_kernel"} <= set(kernels)
    assert ("_dbias_kernel" in kernels) == (len(tensors) > 3)
    exact = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in settings.items()}
    truth = run(attention_reference, leaves(rounded, torch.float64), exact)
    for name, got, true in zip(("out", "dq", "dk", "dv", "dbias"), ours, truth, strict=False):
        assert got.shape == true.shape and got.dtype == dtype
        error = (got.double() - true).abs().max() / true.abs().max().clamp(min=1)
        assert error <= BOUND[dtype], f"{name}: off by {error:.1e}"


@contextmanager
def tiles(rows: int, columns: int) -> Iterator[None]:
    """Interpret with tiles of this many queries and keys."""
    with mock.patch.dict(forward_triton.SMALL, dict.fromkeys((64, 128, 256), (rows, columns, 1, 1))):
        yield


@DTYPES
@CAUSAL
@pytest.mark.parametrize(("b", "t", "h", "hd"), [(1, 2, 1, 1), (1, 17, 2, 5), (2, 16, 1, 16)])
def test_plain(dtype: torch.dtype, causal: bool, b: int, t: int, h: int, hd: int) -> None:
    # On a GPU plain rows are torch's; a window that leaves nothing out but the farthest pair is not.
    check(qkv(b, t, h, hd), dtype, causal=causal, **({"window": t - 1} if DEVICE == "cuda" else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("hd", [24, 80, 96, 256])
def test_width(dtype: torch.dtype, hd: int) -> None:
    check(qkv(1, 17, 1, hd), dtype, window=12)


@CAUSAL
@pytest.mark.parametrize("kv", [2, 1])
def test_fewer_key_heads(causal: bool, kv: int) -> None:
    check(qkv(1, 18, h=4, kv=kv), torch.float32, causal=causal, window=17)


@CAUSAL
@pytest.mark.parametrize(("t", "s"), [(2, 33), (20, 33), (33, 20)])
def test_queries_are_the_last_positions(causal: bool, t: int, s: int) -> None:
    """With more queries than keys, a causal mask leaves the first with nothing: zeros."""
    check(qkv(1, t, s=s), torch.float32, causal=causal, alibi=torch.tensor([0.1]))


@CAUSAL
@pytest.mark.parametrize(("t", "window"), [(21, 1), (40, 5), (21, 17), (40, 39)])
def test_window(causal: bool, t: int, window: int) -> None:
    check(qkv(1, t, s=40), torch.float32, causal=causal, window=window)


SOFT_CAPPED = {
    "rows": {},
    "a window": {"window": 5},
    "slopes": {"alibi": torch.tensor([0.1, 0.2])},
    "segments": {"cu_seqlens": torch.tensor([0, 3, 20, 40]), "max_seqlen": 20},
}


@DTYPES
@CAUSAL
@pytest.mark.parametrize("case", SOFT_CAPPED)
def test_soft_capped(case: str, causal: bool, dtype: torch.dtype) -> None:
    check(qkv(1, 40, h=2, kv=1), dtype, causal=causal, scale=0.9, softcap=1.5, **SOFT_CAPPED[case])


@pytest.mark.parametrize("shape", [(2, 1, 18, 18), (1, 2, 18, 18)], ids=str)
def test_soft_capped_below_a_bias_with_a_gradient(shape: tuple[int, ...]) -> None:
    check([*qkv(2, 18, h=2), draw(*shape, seed=5)], torch.float32, scale=0.9, softcap=1.5)


@CAUSAL
@pytest.mark.parametrize(("rows", "columns", "window"), [(16, 32, 3), (32, 16, 20)])
def test_oblong_tiles(causal: bool, rows: int, columns: int, window: int) -> None:
    with tiles(rows, columns):
        check(qkv(1, 40), torch.float32, causal=causal, window=window, alibi=torch.tensor([0.1]))


def test_window_visits_only_what_can_be_reached() -> None:
    """NaN in keys that no query of a block may reach changes nothing there."""
    q, k, v = (x.float().to(DEVICE) for x in qkv(1, 90))
    k[:, :8] = v[:, :8] = k[:, -8:] = v[:, -8:] = float("nan")
    out = attention(q, k, v, window=4, causal=False)
    assert out[:, 40:50].isfinite().all()


@CAUSAL
@pytest.mark.parametrize("settings", [{}, {"window": 4}, {"alibi": torch.tensor([0.5, 0.1])}], ids=str)
def test_packed(causal: bool, settings: dict) -> None:
    bounds = torch.tensor([0, 5, 6, 23], dtype=torch.int32)
    settings = {**settings, "cu_seqlens": bounds, "causal": causal, "max_seqlen": 17}
    check(qkv(1, 23, h=2, kv=1), torch.float32, **settings)


@pytest.mark.parametrize("settings", [{}, {"window": 4}, {"alibi": torch.tensor([0.5, 0.1])}], ids=str)
def test_packed_segments_that_share_their_beginning(settings: dict) -> None:
    """Two rows behind the first 9 tokens, and one alone: more keys than tokens, some of them thrice."""
    seen = [[*range(9)], [*range(14)], [*range(9), *range(14, 32)], [*range(32, 35)]]
    keys = (torch.tensor(list(chain.from_iterable(seen))).to(DEVICE), torch.tensor([0, 9, 23, 50, 53]).to(DEVICE))
    bounds = torch.tensor([0, 9, 14, 32, 35], dtype=torch.int32)
    check(qkv(1, 35, h=2, kv=1), torch.float32, cu_seqlens=bounds, keys=keys, max_seqlen=27, **settings)


def test_packed_in_half_precision() -> None:
    check(qkv(1, 26), torch.float16, cu_seqlens=torch.tensor([0, 20, 26], dtype=torch.int32), max_seqlen=20, window=9)


def test_packed_finds_the_longest_segment_and_takes_wide_bounds() -> None:
    check(qkv(1, 23), torch.float32, cu_seqlens=torch.tensor([0, 20, 23]))


@pytest.mark.parametrize(
    ("shape", "causal", "window"),
    [
        ((1, 2, 17, 17), True, None),
        ((1, 2, 17, 17), False, 5),
        ((2, 1, 17, 17), False, None),
        ((2, 2, 17, 17), True, 7),
        ((17, 17), True, None),
    ],
    ids=str,
)
def test_bias(shape: tuple[int, ...], causal: bool, window: int | None) -> None:
    """With its gradient added up where it is broadcast."""
    check([*qkv(2, 17, h=2), draw(*shape, seed=9)], torch.float32, causal=causal, window=window)


@DTYPES
def test_bias_in_all_precisions(dtype: torch.dtype) -> None:
    check([*qkv(2, 17, s=20), draw(1, 17, 20, seed=9)], dtype)


@pytest.mark.parametrize("shape", [(2, 1, 1, 21), (1, 2, 17, 21), (2, 1, 17, 1)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=["bool", "float"])
def test_bias_without_gradient(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    bias = draw(*shape)
    check(qkv(2, 17, h=2, s=21), torch.float32, causal=False, bias=bias > -0.5 if kind == torch.bool else bias.to(kind))


def test_bias_that_asks_for_sums_over_queries_is_left_to_torch() -> None:
    q, k, v = leaves(qkv(1, 18), torch.float32)
    bias = draw(1, 1, 1, 18).float().to(DEVICE).requires_grad_()
    with launched() as kernels:
        attention(q, k, v, bias=bias).sum().backward()
    assert not kernels and bias.grad.shape == bias.shape


def test_expanded_bias() -> None:
    bias = draw(1, 1, 17, 17).float().expand(2, 1, 17, 17)
    check(qkv(2, 17), torch.float32, bias=bias)
    check(qkv(2, 17), torch.float32, bias=bias[:, :, :1].expand(2, 1, 17, 17))


@DTYPES
def test_left_padding(dtype: torch.dtype) -> None:
    """Queries that see nothing give zeros and zero gradients; ALiBi on top, as BLOOM has it."""
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :17] = 0
    check(qkv(2, 20), dtype, bias=key_bias(mask), alibi=torch.tensor([0.5]))
    inputs = leaves(qkv(2, 20), dtype)
    out = attention(*inputs, bias=key_bias(mask).to(DEVICE))
    out.sum().backward()
    assert not out[0, :17].any() and not any(x.grad[0, :17].any() for x in inputs)


def test_scale() -> None:
    check(qkv(1, 18), torch.float32, scale=0.9, window=17)


def test_house_rules() -> None:
    """Nothing is written into, runs are bitwise equal, inputs and incoming gradients of any strides are taken."""
    originals = [x.half().to(DEVICE) for x in [*qkv(2, 17, h=2, kv=1), draw(1, 2, 17, 17)]]
    runs = []
    for turned in (False, False, True):
        inputs = [x.clone() for x in originals]
        if turned:
            inputs = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
        inputs = [x.requires_grad_() for x in inputs]
        out = attention(*inputs[:3], bias=inputs[3], window=16)
        value, incoming = out.detach().clone(), torch.linspace(-1, 1, 8, device=DEVICE, dtype=out.dtype)
        out.backward(incoming.expand(out.shape))
        assert torch.equal(out, value)
        assert torch.equal(incoming, torch.linspace(-1, 1, 8, device=DEVICE, dtype=out.dtype))
        assert all(torch.equal(a, b) for a, b in zip(inputs, originals, strict=True))
        runs.append([value, *(x.grad for x in inputs)])
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


@pytest.mark.parametrize(
    ("wants", "kernels"),
    [(0, ["_dq_kernel"]), (1, ["_dkv_kernel"]), (2, ["_dkv_kernel"]), (3, ["_dbias_kernel"])],
    ids=["q", "k", "v", "bias"],
)
def test_only_the_gradients_that_are_wanted(wants: int, kernels: list[str]) -> None:
    inputs = [x.float().to(DEVICE) for x in [*qkv(1, 4), draw(1, 1, 4, 4)]]
    inputs[wants].requires_grad_()
    out = attention(*inputs[:3], bias=inputs[3])
    with launched() as names:
        out.sum().backward()
    assert names == ["_delta_kernel", *kernels]


def test_one_query_is_left_to_torch() -> None:
    q, k, v = (x.float().to(DEVICE) for x in qkv(1, 1, s=9))
    with launched() as kernels:
        attention(q, k, v, window=4)
    assert not kernels

"""Soft-capped scores of attention and soft-capped logits of the loss, against the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import draw, error
from torch import Tensor

from handtune.kernels import attention, linear_cross_entropy
from handtune.kernels.attn import blocks
from handtune.kernels.attn.reference import attention_reference
from handtune.kernels.cross_entropy import chunks
from handtune.kernels.cross_entropy.reference import linear_cross_entropy_reference

T, H, HD = 11, 4, 8
ATTENTION_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
BOUNDS = torch.tensor([0, 3, 4, 11])
CASES = {
    "causal": {},
    "both ways": {"causal": False},
    "window": {"window": 3},
    "window both ways": {"window": 3, "causal": False},
    "mask": {"bias": torch.arange(T).remainder(3).ne(1)[None, None, None], "causal": False},
    "slopes": {"alibi": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "packed": {"cu_seqlens": BOUNDS},
    "packed in a window": {"cu_seqlens": BOUNDS, "window": 2},
    "packed of one length": {"cu_seqlens": torch.tensor([0, 11])},
    "packed with keys of others": {
        "cu_seqlens": BOUNDS,
        "keys": (torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 10]), torch.tensor([0, 3, 7, 15])),
    },
}


def leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]


def assert_alike(tensors: list[Tensor], dtype: torch.dtype, **settings) -> None:
    """Output and gradients are those of the formula; a fourth tensor is a bias."""
    rounded = [x.to(dtype) for x in tensors]
    results = []
    for function, wide in ((attention, dtype), (attention_reference, torch.float64)):
        inputs = leaves(rounded, wide)
        bias = {"bias": inputs[3]} if len(inputs) > 3 else {}
        out = function(*inputs[:3], scale=0.9, softcap=1.5, **settings, **bias)
        out.backward(draw(*out.shape, seed=3).to(dtype).to(out))
        results.append([out.detach(), *(x.grad for x in inputs)])
    for name, got, true in zip(("out", "dq", "dk", "dv", "dbias"), *results, strict=False):
        assert got.dtype == dtype
        assert error(got, true) <= ATTENTION_BOUND[dtype], f"{name}: off by {error(got, true):.1e}"


def qkv(t: int = T, s: int = T, kv_heads: int = H, rows: int = 1) -> list[Tensor]:
    return [draw(rows, t, H, HD), *(draw(rows, s, kv_heads, HD, seed=seed) for seed in (1, 2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [H, 2], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("case", CASES)
def test_scores(case: str, kv_heads: int, dtype: torch.dtype) -> None:
    assert_alike(qkv(kv_heads=kv_heads), dtype, **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_scores_in_several_blocks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 4)
    monkeypatch.setattr(blocks, "WIDTH_STEP", 4)
    assert_alike(qkv(kv_heads=2), torch.float64, **CASES[case])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, H, T, T), (1, 1, T, T)], ids=str)
def test_scores_below_a_bias_with_a_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_alike([*qkv(rows=2), draw(*shape, seed=5)], dtype, causal=False)


@pytest.mark.parametrize("settings", [{}, {"window": 4}], ids=str)
@pytest.mark.parametrize("t", [1, 4])
def test_scores_of_queries_behind_a_cache(t: int, settings: dict) -> None:
    assert_alike(qkv(t, kv_heads=2, rows=2), torch.float32, **settings)


def test_a_block_meets_only_the_keys_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in keys that no query of a block may see changes nothing there."""
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 4)
    q, k, v = qkv(24, 24)
    k[:, :8] = v[:, :8] = k[:, 20:] = v[:, 20:] = float("nan")
    settings = blocks.Settings(window=4, causal=False, scale=1.0, softcap=2.0)
    out = blocks.block_attention(q, k, v, None, None, None, settings, 0.0, 0)
    assert out[:, 12:16].isfinite().all() and not out[:, 8:12].isfinite().all()


def losses_of(function, inputs: list[Tensor], targets: Tensor, **settings) -> list[Tensor]:
    """The loss, its sum where it is one a position, and the gradients of x, weight and bias."""
    x, weight, *bias = inputs
    loss = function(x, weight, targets, *bias, softcap=2.0, **settings)
    loss.sum().backward()
    return [loss.detach().sum(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_logits(reduction: str, with_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_chunk_rows", lambda n, vocab: 4)
    inputs = [draw(2, 5, 6), draw(70, 6, seed=1), draw(70, seed=2)][: 3 if with_bias else 2]
    targets = torch.arange(10).mul(7).view(2, 5).masked_fill(torch.arange(10).view(2, 5) == 3, -100)
    rounded = [x.to(dtype) for x in inputs]
    ours = losses_of(linear_cross_entropy, leaves(rounded, dtype), targets, reduction=reduction)
    truth = losses_of(linear_cross_entropy_reference, leaves(rounded, torch.float64), targets)
    bound = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    for got, true in zip(ours, truth, strict=True):
        assert error(got, true) <= bound


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_gradient_alone(reduction: str, wanted: int) -> None:
    """Of x alone it is made with the loss, of the head alone by computing the logits again."""
    targets = torch.arange(10)
    together = losses_of(linear_cross_entropy, leaves([draw(10, 6), draw(70, 6, seed=1)], torch.float32), targets)
    alone = [x.requires_grad_(i == wanted) for i, x in enumerate((draw(10, 6).float(), draw(70, 6, seed=1).float()))]
    grads = losses_of(linear_cross_entropy, alone, targets, reduction=reduction)[1:]
    torch.testing.assert_close(grads[wanted], together[1 + wanted], rtol=1e-5, atol=1e-6)


def test_entropy_of_capped_logits() -> None:
    x, weight, targets = draw(10, 6), draw(70, 6, seed=1), torch.arange(10)
    _, entropy = linear_cross_entropy(x, weight, targets, softcap=2.0, reduction="none", with_entropy=True)
    logits = 2.0 * torch.tanh(F.linear(x, weight) / 2.0)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())

"""Queries and keys that are made again: the same gradients to the bit, and nothing of them kept."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kernel_cases import draw
from torch import Tensor

from handtune.kernels import RMSNorm, attention, rope
from handtune.kernels.attn import made_again as module
from handtune.kernels.attn.made_again import made_again

CASES = {
    "rows": {},
    "a window": {"window": 5},
    "packed": {"cu_seqlens": torch.tensor([0, 7, 40])},
    "keys of others": {"cu_seqlens": torch.tensor([0, 20, 40]), "keys": (torch.arange(40), torch.tensor([0, 20, 40]))},
    "a bias": {"bias": draw(1, 1, 40, 40).float()},
    "a soft-cap": {"softcap": 2.0},
    "dropout": {"dropout": 0.3, "seed": 5},
}


def gradients(case: str, dtype: torch.dtype, again: bool) -> list[Tensor]:
    """Of what q, k and v are made of, and of the norm's weight."""
    qkv = draw(1, 40, 4 + 2 + 2, 8).to(dtype).requires_grad_()
    norm = RMSNorm(8)
    angle = draw(40, 4, seed=3).float()
    calls = []

    def make() -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        q, k, _ = qkv.split((4, 2, 2), dim=2)
        return rope(norm(q), norm(k), angle.cos(), angle.sin())

    q, k = make()
    v = qkv.split((4, 2, 2), dim=2)[2]
    with made_again(make, q, k) if again else nullcontext():
        out = attention(q, k, v, **CASES[case])
    out.backward(draw(*out.shape, seed=7).to(dtype))
    assert calls == ([True, False] if again else [True])
    return [qkv.grad, norm.weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_bits(case: str, dtype: torch.dtype) -> None:
    for once, twice in zip(gradients(case, dtype, False), gradients(case, dtype, True), strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ["rows", "packed"])
def test_what_is_made_again_is_not_kept(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def watched(pack: Callable, unpack: Callable) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(pack(x)) or kept[-1], unpack)

    monkeypatch.setattr(module, "saved_tensors_hooks", watched)
    q, k, v = (draw(1, 40, heads, 8, seed=heads).to(dtype).requires_grad_() * 1 for heads in (4, 2, 2))
    with made_again(lambda: (q, k), q, k):
        attention(q, k, v, **CASES[case])
    storages = {x.untyped_storage().data_ptr() for x in kept if isinstance(x, Tensor)}
    assert v.untyped_storage().data_ptr() in storages
    assert not storages & {x.untyped_storage().data_ptr() for x in (q, k)}


def test_a_wrong_second_making_would_show() -> None:
    q, k, v = (draw(1, 40, heads, 8, seed=heads).requires_grad_() for heads in (4, 4, 4))
    with made_again(lambda: (q * 2, k), q, k):
        out = attention(q, k, v)
    out.sum().backward()
    wrong = k.grad.clone()
    k.grad = None
    attention(q, k, v).sum().backward()
    assert not torch.allclose(wrong, k.grad)

"""AdamW in eight bits in one launch, against the same in torch: weights, codes, scales and copies."""

import pytest
import torch
from launches import launched
from torch import Tensor

from handtune.kernels.optim.adamw8bit import adamw8bit_
from handtune.kernels.optim.adamw8bit_state import AdamW8bitParam
from handtune.kernels.optim.blockwise import BLOCK, dequantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS, EPS = (0.9, 0.99), 1e-6
SHAPES = [(1,), (257,), (64,), (3, 180)]
WITHOUT = 1  # the weight that gets a gradient only now and then
PARTS = (("exp_avg", "exp_avg_max", True, 0.0141), ("root_exp_avg_sq", "root_exp_avg_sq_max", False, 0.00704))


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(copies: torch.dtype | None = None) -> list[AdamW8bitParam]:
    """One weight of each shape; every other one decays, learns slower, and has a narrow copy."""
    out = []
    for i, shape in enumerate(SHAPES):
        weight = draw(shape, i).to(DEVICE).requires_grad_()
        copy = weight.detach().to(copies) if copies and i % 2 else None
        out.append(AdamW8bitParam(weight, scale=0.5 if i % 2 else 1.0, decay=0.1 if i % 2 else 0.0, copy=copy))
    return out


def update(trained: list[AdamW8bitParam], step: int, factor: float | None) -> list[str]:
    for i, param in enumerate(trained):
        gradient = 10.0 ** (i - 2) * draw(SHAPES[i], 100 * step + i)
        if i == 3:
            gradient[0] = 0  # whole blocks of zeros
        param.weight.grad = None if i == WITHOUT and step % 2 else gradient.to(DEVICE)
    c = None if factor is None else torch.tensor(factor, device=DEVICE)
    with launched() as kernels:
        adamw8bit_(trained, 0.01 / (1 + step), BETAS, EPS, c)
    return kernels


def test_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """To one value where rounding decides between two: at most the widest gap of a block's greatest magnitude."""
    ours = weights(torch.float16)
    assert all(update(ours, step, 0.25) == ["_adamw8bit_kernel"] for step in range(2))
    truth = weights(torch.float16)
    with monkeypatch.context() as patched:
        patched.setattr("handtune.kernels.backend.on_triton", lambda *_: False)
        assert all(update(truth, step, 0.25) == [] for step in range(2))
    for i, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        assert mine.step == true.step == (1 if i == WITHOUT else 2)
        assert (mine.weight - true.weight).abs().max() <= 2e-4
        if mine.copy is not None:
            torch.testing.assert_close(mine.copy.float(), mine.weight.detach(), rtol=1e-3, atol=1e-6)
        for codes, greatest, signed, gap in PARTS:
            scale = getattr(true, greatest)
            torch.testing.assert_close(getattr(mine, greatest), scale, rtol=1e-2, atol=1e-30)
            n = mine.weight.numel()
            a, b = (
                dequantize(getattr(x, codes).view(-1, BLOCK), getattr(x, greatest), signed).view(-1)[:n]
                for x in (mine, true)
            )
            blocks = torch.nn.functional.pad((a - b).abs(), (0, -n % BLOCK)).view(-1, BLOCK)
            assert (blocks <= 1.02 * gap * scale[:, None] + 1e-30).all()
            assert (blocks > 1e-4 * scale[:, None]).float().mean() < 0.01


def test_two_runs_are_bitwise_equal_and_gradients_stay() -> None:
    runs = [weights(), weights()]
    for trained in runs:
        for step in range(2):
            update(trained, step, None)
    for i, (a, b) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.exp_avg, b.exp_avg)
        assert torch.equal(a.root_exp_avg_sq, b.root_exp_avg_sq)
        assert (
            a.weight.grad is None
            or i == 3
            or torch.equal(a.weight.grad.cpu(), 10.0 ** (i - 2) * draw(SHAPES[i], 100 + i))
        )


def test_other_layouts_are_left_to_torch() -> None:
    param = AdamW8bitParam(draw((5, 90), 0).to(DEVICE).T.requires_grad_())
    param.weight.grad = torch.ones_like(param.weight)
    with launched() as kernels:
        adamw8bit_([param], 0.1, BETAS, EPS)
    assert kernels == []
    torch.testing.assert_close(param.weight.detach(), draw((5, 90), 0).to(DEVICE).T - 0.1, rtol=0, atol=1e-3)


def test_a_graph_that_needs_the_old_weight_says_so() -> None:
    param = AdamW8bitParam(torch.ones(3, device=DEVICE, requires_grad=True))
    y = param.weight.square().sum()
    param.weight.grad = torch.ones_like(param.weight)
    adamw8bit_([param], 0.1, BETAS, EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()

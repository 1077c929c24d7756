"""AdamW over all weights in one launch, against torch's in float64; and the engine's optimizer on top of it."""

import pytest
import torch
from launches import launched
from torch import Tensor, nn

from handtune.engine.training.optim import Optimizer
from handtune.kernels.optim.adamw import adamw_
from handtune.kernels.optim.adamw_state import AdamWParam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS, EPS = (0.9, 0.99), 1e-6
SHAPES = [(1,), (7,), (64,), (65,), (3, 50), (2, 3, 5, 7)]
WITHOUT = 2  # the weight that gets a gradient only now and then


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(copies: torch.dtype | None = None) -> list[AdamWParam]:
    """One weight of each shape; every other one decays, learns slower, and has a narrow copy."""
    out = []
    for i, shape in enumerate(SHAPES):
        weight = draw(shape, i).float().to(DEVICE).requires_grad_()
        copy = weight.detach().to(copies) if copies and i % 2 else None
        out.append(AdamWParam(weight, scale=0.5 if i % 2 else 1.0, decay=0.1 if i % 2 else 0.0, copy=copy))
    return out


def gradient(i: int, step: int) -> Tensor | None:
    return None if i == WITHOUT and step % 2 else 10 ** (i - 3) * draw(SHAPES[i], 100 * step + i)


def update(trained: list[AdamWParam], step: int, factor: float | None) -> None:
    for i, one in enumerate(trained):
        g = gradient(i, step)
        one.weight.grad = None if g is None else g.to(one.weight)
    c = None if factor is None else torch.tensor(factor, device=DEVICE)
    adamw_(trained, 0.01 / (1 + step), BETAS, EPS, c)


@pytest.mark.parametrize("factor", [None, 0.25])
def test_agrees_with_torch_in_float64(factor: float | None) -> None:
    ours, truth = weights(), [one.weight.detach().double().requires_grad_() for one in weights()]
    groups = [
        {"params": truth[first::2], "weight_decay": decay, "scale": scale}
        for first, decay, scale in ((0, 0.0, 1.0), (1, 0.1, 0.5))
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS)
    for step in range(5):
        with launched() as kernels:
            update(ours, step, factor)
        assert kernels == ["_adamw_kernel"]
        for i, weight in enumerate(truth):
            g = gradient(i, step)
            weight.grad = None if g is None else (factor or 1.0) * g.to(DEVICE)
        for group in reference.param_groups:
            group["lr"] = 0.01 / (1 + step) * group["scale"]
        reference.step()
    for i, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        state = reference.state[true]
        assert mine.step == state["step"] == (3 if i == WITHOUT else 5)
        for got, wanted in ((mine.weight, true), *((getattr(mine, k), state[k]) for k in ("exp_avg", "exp_avg_sq"))):
            assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_copies_follow(dtype: torch.dtype) -> None:
    """In the same launch, to an ulp (which is the interpreter's rounding); a weight that stays keeps its copy."""
    trained = weights(dtype)
    trained[3].copy.fill_(5)
    for i, one in enumerate(trained):
        one.weight.grad = None if i == 3 else torch.ones_like(one.weight)
    with launched() as kernels:
        adamw_(trained, 0.1, BETAS, EPS)
    assert kernels == ["_adamw_kernel"]
    assert (trained[3].copy == 5).all()
    for one in (trained[1], trained[5]):
        torch.testing.assert_close(one.copy.float(), one.weight.detach(), rtol=torch.finfo(dtype).eps, atol=0)


def test_other_layouts() -> None:
    """Transposed alike is updated in place; a gradient that lies otherwise in memory is left to torch."""
    for same in (True, False):
        weight = draw((5, 9), 0).float().to(DEVICE).T
        plain = weight.clone(memory_format=torch.contiguous_format)
        g = draw((9, 5), 1).float().to(DEVICE)
        ones = [AdamWParam(weight.requires_grad_()), AdamWParam(plain.requires_grad_())]
        plain.grad, weight.grad = g.clone(), g.clone()
        if same:
            weight.grad = g.T.contiguous().T
        with launched() as kernels:
            adamw_(ones[:1], 0.1, BETAS, EPS)
        assert bool(kernels) == same
        adamw_(ones[1:], 0.1, BETAS, EPS)
        torch.testing.assert_close(weight, plain, rtol=1e-6, atol=1e-7)


def test_gradients_stay_and_two_runs_are_bitwise_equal() -> None:
    runs = [weights(torch.float16), weights(torch.float16)]
    for trained in runs:
        for step in range(2):
            update(trained, step, 0.5)
        for i, one in enumerate(trained):
            assert one.weight.grad is None or torch.equal(one.weight.grad, gradient(i, 1).to(one.weight))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.exp_avg_sq, b.exp_avg_sq)
        assert a.copy is None or torch.equal(a.copy, b.copy)


def test_a_graph_that_needs_the_old_weight_says_so() -> None:
    one = AdamWParam(torch.ones(3, device=DEVICE, requires_grad=True))
    y = one.weight.square().sum()
    one.weight.grad = torch.ones_like(one.weight)
    adamw_([one], 0.1, BETAS, EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def optimizer(model: nn.Module) -> Optimizer:
    return Optimizer(
        model.named_parameters(), betas=BETAS, eps=EPS, weight_decay=0.1, scales={"2.weight": 0.5, "2.bias": 0.5}
    )


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(DEVICE, dtype)


def train(model: nn.Module, mine: Optimizer, steps: range) -> None:
    for step in steps:
        x = draw((4, 5), step).to(DEVICE, next(model.parameters()).dtype)
        model(x).square().sum().backward()
        mine.accumulate()
        mine.scale_gradients(4, 0.3)
        mine.step(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_optimizer_resumes_bitwise(dtype: torch.dtype) -> None:
    first, second = network(dtype), network(dtype)
    mine, other = optimizer(first), optimizer(second)
    with launched() as kernels:
        train(first, mine, range(3))
    assert kernels == ["_adamw_kernel"] * 3
    state = {key: value.clone() for key, value in mine.state_dict().items()}
    train(second, other, range(9, 10))
    other.load_state_dict(state)
    train(first, mine, range(3, 5))
    train(second, other, range(3, 5))
    for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_optimizer_equals_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = network(torch.float32), network(torch.float32)
    train(first, optimizer(first), range(4))
    monkeypatch.setattr("handtune.kernels.backend.on_triton", lambda *_: False)
    train(second, optimizer(second), range(4))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()

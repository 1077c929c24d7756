"""The optimizer: AdamW on fp32 masters, what decays, learning rates by name, schedules."""

import math

import pytest
import torch
from torch import nn

from handtune.engine.training.optim import Optimizer, lr_factor, lr_scales


def optimizer(named, **settings) -> Optimizer:
    usual = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    return Optimizer(named, **{**usual, **settings})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def factors(schedule: str, total: int, warmup: int, decay: float = 0.2, floor: float = 0.0) -> list[float]:
    return [round(lr_factor(schedule, step, total, warmup, decay, floor), 6) for step in range(total)]


def test_schedules_at_every_step() -> None:
    assert factors("constant", 5, 2) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert factors("constant", 3, 0) == [1.0, 1.0, 1.0]
    assert factors("linear", 8, 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors("linear", 4, 0, floor=0.5) == [1.0, 0.875, 0.75, 0.625]
    half = round(0.5 * (1 + math.cos(math.pi / 4)), 6)
    assert factors("cosine", 6, 2) == [0.5, 1.0, 1.0, half, 0.5, round(1 - half, 6)]
    assert factors("cosine", 4, 0, floor=0.2)[2] == 0.6
    assert factors("wsd", 10, 2, decay=0.4) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors("wsd", 10, 0, decay=0.2, floor=0.1)[8:] == [1.0, 0.55]


def test_equals_torch_adamw_in_fp32() -> None:
    """Gradients of three micro-batches, summed; matrices decay, biases don't."""
    ours, theirs = network(), network()
    mine = optimizer(ours.named_parameters())
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, foreach=False)
    for step in range(6):
        rate = 0.01 / (step + 1)
        x = torch.randn(9, 5, generator=torch.Generator().manual_seed(step))
        for part in x.split(3):
            ours(part).square().sum().backward()
            mine.accumulate()
        norm = mine.scale_gradients(9, 0.5)
        mine.step(rate)
        reference.zero_grad()
        (theirs(x).square().sum() / 9).backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_no_clipping_where_none_is_asked_for() -> None:
    model = network()
    mine = optimizer(model.named_parameters())
    (1000 * model(torch.ones(2, 5)).sum()).backward()
    assert mine.scale_gradients(2, None) > 1000
    assert mine.factor == 0.5


def test_only_matrices_decay() -> None:
    """With gradients of zero nothing moves but what decays."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "embed": nn.Embedding(3, 4)})
    mine = optimizer(model.named_parameters(), weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    mine.step(0.1)
    for name, parameter in model.named_parameters():
        kept = 1.0 - 0.1 * 0.5 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept)


def test_narrow_parameters_have_fp32_masters() -> None:
    """Updates a thousandth of what bf16 resolves: one is lost in the parameter, four hundred of them are not."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    mine = optimizer([("w", weight)], weight_decay=0.0)
    for step in range(400):
        weight.grad = torch.ones_like(weight)
        mine.accumulate()
        assert weight.grad is None
        mine.step(1e-4)
        if step == 0:
            assert torch.equal(weight.detach(), torch.ones_like(weight))
    master = mine.trained["w"].weight
    assert master.dtype == torch.float32
    assert (master - (1 - 400 * 1e-4)).abs().max() < 1e-4
    assert torch.equal(weight.detach(), master.detach().bfloat16())
    assert weight.max() < 0.97


def test_narrow_gradients_are_summed_in_fp32() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    mine = optimizer([("w", weight)])
    for value in (256.0, *[0.5] * 8):  # in bf16 256 + 0.5 is 256
        weight.grad = torch.full_like(weight, value)
        mine.accumulate()
    assert mine.gradients()[0].tolist() == [260.0, 260.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_their_own_masters(dtype) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=dtype))
    assert optimizer([("w", weight)]).trained["w"].weight is weight


def test_lr_scale_and_decay_by_layer() -> None:
    model = nn.ModuleDict({"embed": nn.Linear(1, 1), "layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(4))})
    model.update({"norm": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    names = ("head.weight", "layers.3.weight", "layers.0.weight", "embed.weight")
    scales = lr_scales(model, names, {"head.*": 10.0, "*": 2.0}, 1.0)
    assert (scales["head.weight"], scales["layers.3.weight"]) == (10.0, 2.0)
    assert lr_scales(model, ["norm.weight"], {"head.*": 10.0}, 1.0) == {"norm.weight": 1.0}
    assert lr_scales(model, names, {}, 0.5) == dict(zip(names, (1.0, 0.5, 0.5**4, 0.5**5), strict=True))
    base = nn.ModuleDict({"base": model})
    assert lr_scales(base, ["base.layers.2.weight"], {"*.layers.*": 3.0}, 0.5) == {"base.layers.2.weight": 3 * 0.25}


def test_scaled_rates_reach_the_update() -> None:
    """Adam's first step is the learning rate itself, whatever the gradient."""
    layers = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3)), "head": nn.Linear(2, 2)}
    )
    scales = lr_scales(layers, [name for name, _ in layers.named_parameters()], {"head.*": 4.0}, 0.5)
    mine = optimizer(layers.named_parameters(), weight_decay=0.0, scales=scales)
    before = {name: p.detach().clone() for name, p in layers.named_parameters()}
    for parameter in layers.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    mine.step(0.01)
    moved = {name: (before[name] - p).max().item() for name, p in layers.named_parameters()}
    expected = {"layers.0.weight": 0.125, "layers.1.weight": 0.25, "layers.2.weight": 0.5, "head.weight": 4.0}
    for name, factor in {**expected, "head.bias": 4.0}.items():
        assert moved[name] == pytest.approx(0.01 * factor, rel=1e-4)


def step_once(model: nn.Module, mine: Optimizer, seed: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    model(x).square().sum().backward()
    mine.accumulate()
    mine.scale_gradients(4, 1.0)
    mine.step(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back_bitwise(dtype) -> None:
    first = network().to(dtype)
    mine = optimizer(first.named_parameters())
    for seed in range(3):
        step_once(first, mine, seed)
    state = {key: value.clone() for key, value in mine.state_dict().items()}
    second = network().to(dtype)
    other = optimizer(second.named_parameters())
    step_once(second, other, 9)  # what is loaded replaces whatever was there
    other.load_state_dict(state)
    for seed in range(3, 6):
        step_once(first, mine, seed)
        step_once(second, other, seed)
    for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_parameters_is_refused() -> None:
    state = optimizer(network().named_parameters()).state_dict()
    other = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"3 parameters differ, 0\.bias is \(7,\) instead of \(8,\)"):
        optimizer(other.named_parameters()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"2 parameters differ, 0\.bias is \(7,\) instead of not there"):
        optimizer(list(network().named_parameters())[2:]).load_state_dict(state)


def test_loading_weights_alone_begins_anew() -> None:
    """What is kept of the best evaluation has no moments: none are left over."""
    model = network()
    mine = optimizer(model.named_parameters())
    step_once(model, mine, 0)
    best = {key: value.clone() for key, value in mine.state_dict().items() if key.startswith("weight.")}
    step_once(model, mine, 1)
    mine.load_state_dict(best)
    assert mine.state_dict().keys() == best.keys()
    assert all(torch.equal(value, best[key]) for key, value in mine.state_dict().items())


def test_a_gradient_in_another_memory_layout() -> None:
    """torch's fused AdamW would pair its entries with others' weights."""
    moved = []
    for turned in (False, True):
        weight = nn.Parameter(torch.ones(3, 2))
        gradient = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
        weight.grad = gradient.T.contiguous().T if turned else gradient
        optimizer([("w", weight)]).step(0.1)
        moved.append(weight.detach())
    torch.testing.assert_close(moved[0], moved[1])

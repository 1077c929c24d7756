"""The fused feed-forward: against the same modules in float64, and against its parts one by one; interpreted, or on a
GPU.
"""

from unittest import mock

import pytest
import torch
from launches import launched
from torch import Tensor, nn

from handtune.kernels import LayerNorm, Linear, RMSNorm, feed_forward
from handtune.kernels.mlp import prenorm
from handtune.kernels.quant.nf4 import Workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "fp16", "bf16"])
D, F = 16, 150 if DEVICE == "cpu" else 650  # several blocks of columns a piece


def build(
    dtype: torch.dtype, dropout: float = 0.0, centered: bool = False, bias: bool = False, d: int = D
) -> nn.ModuleDict:
    """A norm, gate and up, and down, with adapters that do something; the same numbers in each dtype."""
    torch.manual_seed(0)
    norm = LayerNorm(d) if centered else RMSNorm(d)
    up = Linear(d, 2 * F, bias=bias, parts=(("gate_proj", F), ("up_proj", F)))
    model = nn.ModuleDict({"norm": norm, "gate_up": up, "down": Linear(F, d, bias=bias)})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3).requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    for layer, ranks in ((up, [2, 3]), (model["down"], [3])):
        adapter = layer.new_adapter(list(layer.parts), ranks, [2.0, 0.5][: len(ranks)], dropout)
        for b in adapter.b:
            nn.init.normal_(b)
        layer.lora["default"] = adapter
        layer.active = "default"
    return model.to(DEVICE).train()


def run(model: nn.ModuleDict, x: Tensor, activation: str = "swiglu", recompute: bool = False) -> dict[str, Tensor]:
    """The output, and the gradients of x and of all factors."""
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(7)
    y = feed_forward(leaf, model["norm"], model["gate_up"], activation, model["down"], recompute)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(incoming)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **gradients}


def check(ours: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        error = (ours[name].double() - exact.double()).norm() / exact.double().norm()
        assert error <= bound, f"{name}: off by {error:.1e}"


@DTYPES
@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh"])
@pytest.mark.parametrize("lead", [(1,), (2, 17)], ids=str)
def test_agrees_with_float64(dtype: torch.dtype, activation: str, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, D, generator=torch.Generator().manual_seed(2)).to(dtype).to(DEVICE)
    with launched() as kernels:
        ours = run(build(dtype), x, activation)
    assert {"_activate_kernel", "_backward_kernel"} <= set(kernels)
    assert all(gradient.dtype == torch.float32 for name, gradient in ours.items() if ".lora." in name)
    exact = build(dtype)
    exact.double()
    check(ours, run(exact, x.double(), activation), BOUND[dtype])


@pytest.mark.parametrize("settings", [{"centered": True}, {"bias": True}], ids=str)
def test_layer_norm_and_biases(settings: dict) -> None:
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    model = build(torch.float32, **settings)
    for parameter in (*model["norm"].parameters(), model["gate_up"].bias, model["down"].bias):
        if parameter is not None:
            parameter.requires_grad_(parameter is model["norm"].weight)
    exact = build(torch.float32, **settings).double()
    for name, parameter in exact.named_parameters():
        parameter.requires_grad_(dict(model.named_parameters())[name].requires_grad)
    check(run(model, x), run(exact, x.double()), 1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_has_the_masks_of_the_parts(recompute: bool) -> None:
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    fused = run(build(torch.float32, dropout=0.4), x, recompute=recompute)
    with mock.patch.object(prenorm, "takes", return_value=False):
        parts = run(build(torch.float32, dropout=0.4), x)
    check(fused, parts, 1e-5)
    assert not torch.equal(fused["y"], run(build(torch.float32), x)["y"])


def test_recomputing_gives_the_same_bits_and_two_runs_do() -> None:
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    first, *others = (run(build(torch.float32), x, recompute=recompute) for recompute in (False, False, True))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_four_bits() -> None:
    """Against the parts, which read the same packed weights."""
    results = []
    for takes in (True, False):
        model = build(torch.float32, d=64)
        workspace = Workspace()
        for name in ("gate_up", "down"):
            model[name].quantize_(workspace)
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        with mock.patch.object(prenorm, "takes", prenorm.takes if takes else lambda *arguments: False):
            results.append(run(model, x))
    check(*results, 1e-5)


def test_what_it_does_not_take_goes_by_parts() -> None:
    x = torch.randn(3, D).to(DEVICE)
    cases = {
        "a trained weight": lambda model: model["down"].weight.requires_grad_(),
        "no adapter on one": lambda model: setattr(model["down"], "active", None),
        "DoRA": lambda model: model["gate_up"].lora["default"].add_magnitudes(model["gate_up"].weight),
    }
    for case in cases.values():
        model = build(torch.float32)
        case(model)
        with launched() as kernels:
            run(model, x)
        assert "_activate_kernel" not in kernels


def test_without_gradients_the_numbers_are_the_same() -> None:
    """Bit for bit: log-probabilities are taken without, and the ratio to those with must be 1."""
    model = build(torch.float32)
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    with torch.no_grad():
        alone = feed_forward(x, model["norm"], model["gate_up"], "swiglu", model["down"])
    assert torch.equal(alone, run(model, x)["y"])


def test_pissa_has_its_ranks_twice() -> None:
    results = []
    for takes in (True, False):
        model = build(torch.float32)
        for name in ("gate_up", "down"):
            model[name].lora["default"].start_from(model[name].weight)
            for factor in (model[name].lora["default"].a, *model[name].lora["default"].b):
                factor.data.mul_(1.1)  # at the start its part is zero
        x = torch.randn(20, D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        with mock.patch.object(prenorm, "takes", prenorm.takes if takes else lambda *arguments: False):
            results.append(run(model, x))
    check(*results, 2e-5)

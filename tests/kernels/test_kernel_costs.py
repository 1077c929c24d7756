"""What a linear layer computes and keeps: no product that nobody wants, no tensor that can be rebuilt."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import SCALE, draw
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from handtune.kernels import (
    LayerNorm,
    Linear,
    LoRALinearWeights,
    RMSNorm,
    activation_linear,
    lora_linear,
    norm_linear,
    swiglu,
)
from handtune.kernels.activations import ACTIVATIONS, Activation
from handtune.kernels.lora.arguments import LoRAArgs
from handtune.kernels.lora.linear import fused_linear
from handtune.kernels.lora.per_row import AdapterRows


def backward_products(wanted: set[str]) -> int:
    """Multiply-adds of the backward pass of a LoRA linear in which only these inputs want gradients."""
    n, k, m, r = 11, 7, 5, 2
    shapes = {"x": (n, k), "weight": (m, k), "bias": (m,), "a": (r, k), "b": (m, r)}
    inputs = [draw(*shape).requires_grad_(name in wanted) for name, shape in shapes.items()]
    y = lora_linear(*inputs)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        y.sum().backward()
    return counter.get_total_flops() // 2


def test_a_frozen_weight_costs_no_product() -> None:
    n, k, m, r = 11, 7, 5, 2
    low_rank = n * m * r  # dS
    assert backward_products({"a", "b"}) == low_rank + n * m * r + n * k * r
    assert backward_products({"x", "a", "b"}) == low_rank + n * m * r + n * k * r + n * k * r + n * m * k
    assert backward_products({"x", "b", "bias"}) == low_rank + n * m * r + n * k * r + n * m * k
    assert backward_products({"weight", "a", "b"}) == low_rank + n * m * r + n * k * r + n * m * k


@pytest.mark.parametrize(("wanted", "calls"), [({"u"}, 1), ({"bias"}, 1), ({"b"}, 1), ({"a"}, 2), ({"weight"}, 2)])
def test_the_activation_is_rebuilt_only_for_gradients_that_read_it(wanted: set[str], calls: int) -> None:
    seen = []

    def counted(u: Tensor) -> Tensor:
        seen.append(u)
        return u.relu()

    plan = LoRAArgs((0,), (SCALE,), activation=Activation(counted, ACTIVATIONS["relu"].backward))
    shapes = {"u": (11, 7), "weight": (5, 7), "bias": (5,), "a": (2, 7), "b": (5, 2)}
    u, weight, bias, a, b = (draw(*shape).requires_grad_(name in wanted) for name, shape in shapes.items())
    fused_linear(u, weight, bias, a, (b,), plan).sum().backward()
    assert len(seen) == calls


def saved_storages(function: Callable[[], Tensor]) -> dict[int, int]:
    """Storages that autograd keeps for the backward pass: address -> bytes."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function().sum()
    return seen


def adapted(k: int, m: int) -> Linear:
    linear = Linear(k, m)
    torch.nn.init.normal_(linear.weight)
    linear.weight.requires_grad_(False)
    linear.bias.requires_grad_(False)
    linear.lora["default"] = LoRALinearWeights(k, list(linear.parts), [2], [1.0], 0.1)
    linear.active = "default"
    return linear


def activations_kept(function: Callable[[], Tensor], *modules: torch.nn.Module) -> dict[int, int]:
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    return {address: size for address, size in saved_storages(function).items() if address not in weights}


@pytest.mark.parametrize("norm", [LayerNorm(32), RMSNorm(32)], ids=["layer_norm", "rms_norm"])
def test_norm_linear_keeps_h_and_no_normalised_rows(norm: LayerNorm | RMSNorm) -> None:
    n, linear = 64, adapted(32, 48)
    h = torch.randn(n, 32, requires_grad=True)
    kept = activations_kept(lambda: norm_linear(h, norm, linear), norm, linear)
    assert kept.pop(h.untyped_storage().data_ptr()) == n * 32 * 4
    assert sum(kept.values()) <= 4 * n * (2 + 2)  # S, of rank 2, and two statistics a row


def test_adapters_by_row_keep_h_and_no_normalised_rows() -> None:
    norm, linear = RMSNorm(32), adapted(32, 48)
    linear.active = AdapterRows(["default", None])
    h = torch.randn(2, 64, 32, requires_grad=True)
    kept = activations_kept(lambda: norm_linear(h, norm, linear), norm, linear)
    assert kept.pop(h.untyped_storage().data_ptr()) == 2 * 64 * 32 * 4
    stack = 4 * (2 * 32 + 48 * 2 + 1)  # of one adapter, with its scale
    assert sum(kept.values()) <= 4 * 64 * 2 + 4 * 2 * 64 + stack  # S of half the rows, and a statistic a row


@pytest.mark.parametrize(("name", "wide"), [("gelu", 32), ("silu", 32), ("swiglu", 64)])
def test_activation_linear_keeps_u_and_not_its_activation(name: str, wide: int) -> None:
    n, linear = 64, adapted(32, 48)
    u = torch.randn(n, wide, requires_grad=True)
    kept = activations_kept(lambda: activation_linear(u, name, linear), linear)
    assert kept.pop(u.untyped_storage().data_ptr()) == n * wide * 4
    assert sum(kept.values()) <= 4 * n * 2


def test_a_frozen_linear_keeps_no_activation() -> None:
    linear = Linear(32, 48).requires_grad_(False)
    torch.nn.init.normal_(linear.weight)
    h = torch.randn(64, 32, requires_grad=True)
    assert not activations_kept(lambda: linear(h), linear)
    h.grad = None
    linear(h).sum().backward()
    torch.testing.assert_close(h.grad, linear.weight.sum(0).expand(64, 32))


def test_linear_in_modules_equals_the_steps_one_by_one() -> None:
    linear, norm = adapted(32, 48).eval(), LayerNorm(32)
    torch.nn.init.normal_(linear.lora["default"].b[0])
    x, u = torch.randn(5, 32), torch.randn(5, 64)
    torch.testing.assert_close(norm_linear(x, norm, linear), linear(norm(x)))
    torch.testing.assert_close(activation_linear(u, "swiglu", linear), linear(swiglu(u)))
    low_rank = linear.lora["default"]
    by_hand = F.linear(x, linear.weight, linear.bias) + (x @ low_rank.a.T) @ low_rank.b[0].T
    torch.testing.assert_close(linear(x), by_hand)

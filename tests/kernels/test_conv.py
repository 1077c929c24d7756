"""The LoRA convolution: its formula, PEFT's layer, memory formats, what is computed, refusals."""

import peft
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import draw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from handtune.kernels import lora_conv2d
from handtune.kernels.conv import lora_conv2d_reference

GEOMETRIES = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "padding": 1},
]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
SCALE, NAMES = 0.7, ("x", "weight", "bias", "a", "b")


def inputs(groups: int = 1, kernel: tuple[int, int] = (3, 3), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(2, 4, 7, 6), (6, 4 // groups, *kernel), (6,), (2, 4, *kernel), (6, 2 // groups, 1, 1)]
    return [draw(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


@every_geometry
def test_gradients_are_those_of_the_function(geometry: dict) -> None:
    function = lambda *tensors: lora_conv2d(*tensors, scale=SCALE, **geometry)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs(geometry.get("groups", 1)), fast_mode=True)


def test_gradients_under_dropout_are_those_of_the_function() -> None:
    function = lambda *tensors: lora_conv2d(*tensors, padding=1, scale=SCALE, dropout=0.4, seed=3)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs(), fast_mode=True)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 1)], ids=str)
@every_layout
@every_geometry
def test_agrees_with_the_formula(geometry: dict, layout: torch.memory_format, kernel: tuple[int, int]) -> None:
    ours, theirs = (inputs(geometry.get("groups", 1), kernel) for _ in range(2))
    ours[0] = ours[0].detach().contiguous(memory_format=layout).requires_grad_()
    y = lora_conv2d(*ours, scale=SCALE, **geometry)
    expected = lora_conv2d_reference(*theirs, scale=SCALE, **geometry)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=layout)
    incoming = draw(*y.shape).contiguous(memory_format=layout)
    untouched = incoming.clone()
    y.backward(incoming)
    expected.backward(untouched)
    assert torch.equal(incoming, untouched)
    for name, mine, peer in zip(NAMES, ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, peer.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_takes_expanded_gradients_and_turned_inputs() -> None:
    ours, theirs = inputs(), inputs()
    ours[0] = ours[0].detach().transpose(0, 3).contiguous().transpose(0, 3).requires_grad_()
    lora_conv2d(*ours, scale=SCALE).sum().backward()
    lora_conv2d_reference(*theirs, scale=SCALE).sum().backward()
    for mine, peer in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, peer.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_zero_b_is_bitwise_the_base_and_runs_repeat(dtype: torch.dtype) -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs(dtype=dtype))
    assert torch.equal(lora_conv2d(x, weight, bias, a, torch.zeros_like(b)), F.conv2d(x, weight, bias))
    first, second = (inputs(dtype=dtype) for _ in range(2))
    for tensors in (first, second):
        lora_conv2d(*tensors, padding=1, dropout=0.3, seed=1).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(first, second, strict=True))


def test_dropout_acts_on_the_low_rank_branch_alone() -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs(dtype=torch.float32))
    x = torch.ones(8, 4, 7, 6)
    one = torch.eye(4).view(4, 4, 1, 1)
    mask = lora_conv2d(x, torch.zeros_like(one), None, one, one, dropout=0.4, seed=5)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (mask == 0).float().mean().item() == pytest.approx(0.4, abs=0.05)
    got = lora_conv2d(x, weight, bias, a, b, dropout=0.4, seed=5)
    low_rank = F.conv2d(F.conv2d(x * mask, a), b)
    torch.testing.assert_close(got, F.conv2d(x, weight, bias) + low_rank)
    assert not torch.equal(got, lora_conv2d(x, weight, bias, a, b, dropout=0.4, seed=6))


class Net(nn.Module):
    def __init__(self, **geometry) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, **geometry)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 5), "padding": (1, 2), "bias": False},
        {"kernel_size": 3, "padding": 1, "groups": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_agrees_with_peft(geometry: dict) -> None:
    torch.manual_seed(0)
    net = Net(**geometry)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["conv"], init_lora_weights=False)
    model = peft.get_peft_model(net, config)
    layer = model.base_model.model.conv
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    mine = [t.detach().clone().requires_grad_() for t in (x, a, b)]
    sizes = {"stride": base.stride, "padding": base.padding, "groups": base.groups}
    y = lora_conv2d(mine[0], base.weight, base.bias, mine[1], mine[2], scale=3.0, **sizes)
    expected = model(x)
    torch.testing.assert_close(y, expected)
    incoming = torch.randn_like(y)
    y.backward(incoming)
    expected.backward(incoming)
    for ours, theirs in zip(mine, (x, a, b), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert base.weight.grad is None


@every_layout
def test_bf16_is_as_exact_as_peft(layout: torch.memory_format) -> None:
    """Against fp64: the gradients of both factors, summed over many images, are no further off than PEFT's."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["conv"], init_lora_weights=False)
    model = peft.get_peft_model(Net(kernel_size=3, padding=1), config, autocast_adapter_dtype=False).bfloat16()
    layer = model.base_model.model.conv
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(64, 4, 14, 14).bfloat16().contiguous(memory_format=layout)
    incoming = torch.randn(64, 6, 14, 14).bfloat16().contiguous(memory_format=layout)
    model(x).backward(incoming)
    ours, exact = ([t.detach().to(dtype).requires_grad_() for t in (a, b)] for dtype in (torch.bfloat16, torch.float64))
    lora_conv2d(x, base.weight, base.bias, *ours, padding=1).backward(incoming)
    wide = (t.detach().double() for t in (x, base.weight, base.bias))
    lora_conv2d_reference(*wide, *exact, padding=1).backward(incoming.double())
    for mine, peer, truth in zip(ours, (a, b), exact, strict=True):
        error, theirs = ((t.grad.double() - truth.grad).norm() for t in (mine, peer))
        assert error <= 1.1 * theirs


@pytest.mark.parametrize("wanted", ["x", "weight", "a", "b", "bias"])
def test_computes_only_the_gradients_that_are_wanted(wanted: str) -> None:
    tensors = [t.detach().requires_grad_(name == wanted) for name, t in zip(NAMES, inputs(), strict=True)]
    y = lora_conv2d(*tensors)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    places, batch = y.shape[2] * y.shape[3], y.shape[0]
    per_place = {"x": 6 * 36 + 6 * 2 + 2 * 36, "weight": 6 * 36, "a": 6 * 2 + 2 * 36, "b": 6 * 2, "bias": 0}
    assert counter.get_total_flops() == 2 * batch * places * per_place[wanted]
    assert [t.grad is not None for t in tensors] == [name == wanted for name in NAMES]


def test_keeps_x_and_s_and_nothing_else() -> None:
    x, weight, bias, a, b = inputs()
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_conv2d(x, weight, bias, a, b, dropout=0.3, seed=0)
    given = {t.untyped_storage().data_ptr() for t in (x, weight, a, b)}
    assert given <= set(seen)
    assert sum(size for address, size in seen.items() if address not in given) == 8 * 2 * 2 * 5 * 4  # S


def test_autocast_computes_in_its_dtype() -> None:
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_conv2d(*tensors)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), lora_conv2d_reference(*tensors), rtol=0.05, atol=0.3)
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (4, 7, 6)}, r"x: expected \(B, 4, H, W\) for weight \(6, 4, 3, 3\) with 1 groups, got \(4, 7, 6\)"),
        ({"x": (2, 5, 7, 6)}, r"x: expected \(B, 4, H, W\) .* got \(2, 5, 7, 6\)"),
        ({"bias": (5,)}, r"bias: expected \(6,\) for weight \(6, 4, 3, 3\) .* got \(5,\)"),
        ({"a": (2, 4, 1, 1)}, r"a: expected \(R, 4, 3, 3\) for weight .* got \(2, 4, 1, 1\)"),
        ({"b": (6, 3, 1, 1)}, r"b: expected \(6, R/groups, 1, 1\) .* a \(2, 4, 3, 3\), got \(6, 3, 1, 1\)"),
        ({"b": (6, 2)}, r"b: expected .* got \(6, 2\)"),
        ({"a": (3, 4, 3, 3), "groups": 2}, "x: expected .B, 8, H, W."),
        ({"a": torch.float32}, r"a: torch.float32 on cpu, but x is torch.float64 on cpu"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"padding": "same"}, "padding: expected a number of pixels or a pair of them, got 'same'"),
        ({"stride": (1, 1, 1)}, r"stride: expected .* got \(1, 1, 1\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(change: dict, message: str) -> None:
    tensors, options = dict(zip(NAMES, inputs(), strict=True)), {}
    for name, value in change.items():
        if name not in tensors:
            options[name] = value
        elif isinstance(value, torch.dtype):
            tensors[name] = tensors[name].to(value)
        else:
            tensors[name] = draw(*value)
    with pytest.raises(ValueError, match=message):
        lora_conv2d(**tensors, **options)

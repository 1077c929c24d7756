"""NF4: the published numbers, what is stored, and a LoRA linear on it."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from handtune.kernels import LayerNorm, Linear, LoRALinearWeights, activation_linear, norm_linear
from handtune.kernels.lora.factors import LinearPart
from handtune.kernels.quant.nf4 import NF4Weight, Workspace, dynamic_map, nf4_levels, quantize_blocks

PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (33, 96), (300, 64)], ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).to(dtype)


def floats(bits: Tensor) -> np.ndarray:
    return bits.view(torch.float32).numpy()


def nearest(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return np.abs(values.astype(np.float64)[:, None] - numbers.astype(np.float64)).argmin(1)


def slowly(line: np.ndarray, size: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block by block, the index of the nearest number to each value over its block's maximum; and the maxima."""
    codes, maxima = [], []
    for start in range(0, len(line), size):
        block = line[start : start + size]
        maximum = np.abs(block).max()
        codes.append(nearest(block * (np.float32(1) / max(maximum, np.float32(1e-38))), numbers))
        maxima.append(maximum)
    return np.concatenate(codes), np.array(maxima, np.float32)


def test_levels_are_the_published_ones() -> None:
    assert nf4_levels().dtype == torch.float32
    assert nf4_levels().tolist() == list(PUBLISHED)


def test_dynamic_map_is_the_published_one() -> None:
    numbers = dynamic_map().tolist()
    assert len(set(numbers)) == 256
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[127], numbers[255]) == (pytest.approx(-0.99296875), 0.0, 1.0)
    for i in range(7):
        decade = [n for n in numbers if 10.0 ** (i - 7) < n < 10.0 ** (i - 6) and n != 1]
        assert decade == pytest.approx([10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / 2**i) for j in range(2**i)])
        assert all(-n in numbers for n in decade)


@DTYPES
@SHAPES
def test_stores_what_a_slow_reference_finds(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = draw(*shape, dtype=dtype)
    if shape[0] > 3:
        matrix[1:3] = 0  # a block of zeros and more
    weight = NF4Weight(matrix, Workspace())
    line = matrix.float().numpy().reshape(-1)
    codes, maxima = slowly(line, 64, nf4_levels().numpy())
    offset = floats(weight.offset)
    scales, ranges = slowly(maxima - offset, 256, dynamic_map().numpy())
    whole = np.pad(codes, (0, -len(codes) % 64), constant_values=7)
    assert np.array_equal(weight.codes.numpy(), 16 * whole[::2] + whole[1::2])
    assert np.array_equal(weight.scales.numpy(), scales)
    assert np.array_equal(floats(weight.ranges), ranges)
    assert offset == pytest.approx(maxima.mean(), rel=1e-6)  # numpy adds up in another order
    known = dynamic_map().numpy()[scales] * ranges.repeat(256)[: len(scales)] + offset
    values = nf4_levels().numpy()[codes] * known.repeat(64)[: len(line)]
    expected = torch.from_numpy(values.reshape(shape)).to(dtype)
    assert torch.equal(weight.dequantize(dtype), expected)
    assert torch.equal(weight.dequantize_into_buffer(dtype), expected)


def test_what_it_costs() -> None:
    weight = NF4Weight(draw(256, 512), Workspace())
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weight.parameters())
    assert stored == 256 * 512 * (0.5 + 1 / 64 + 4 / (64 * 256)) + 4


def test_error_is_bounded_by_the_gaps() -> None:
    """Half the largest gap times the block's maximum, and what the maximum itself is off by."""
    matrix = draw(64, 96)
    weight, (_, maxima) = NF4Weight(matrix, Workspace()), quantize_blocks(matrix)
    gap = nf4_levels().diff().max()
    error = (weight.dequantize(torch.float32) - matrix).view(-1, 64).abs().amax(1)
    assert ((gap / 2 * maxima + (weight.maxima() - maxima).abs()) * (1 + 1e-6) >= error).all()
    assert (weight.maxima() - maxima).abs().max() <= 0.01 * maxima.max()
    assert error.max() >= 0.8 * (gap / 2 * maxima).min()  # the bound is not idle


def test_agrees_with_bitsandbytes() -> None:
    """Runs where bitsandbytes is installed, which nothing here depends on."""
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as peer

    matrix = draw(256, 512)
    codes, state = peer.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4")
    ours = NF4Weight(matrix, Workspace())
    assert torch.equal(peer.create_dynamic_map(), dynamic_map())
    assert torch.equal(ours.codes, codes.view(-1))
    assert floats(ours.ranges) == pytest.approx(state.state2.absmax.numpy())
    assert floats(ours.offset) == pytest.approx(state.offset.item())
    off = (ours.scales.int() - state.absmax.view(-1).int()).abs()  # theirs on a CPU is nearly the nearest
    assert off.max() <= 1
    assert (off > 0).float().mean() <= 0.01
    assert (
        ours.dequantize(torch.float32) - peer.dequantize_4bit(codes, state)
    ).abs().max() <= 0.01 * matrix.abs().max()


def linears(dtype: torch.dtype, transposed: bool = False) -> tuple[Linear, Linear]:
    """A quantised layer with an adapter on two of its parts, and one with the same weight as an ordinary parameter."""
    weight = nn.Parameter(draw(48, 40, dtype=dtype), requires_grad=False)
    packed = Linear.around(nn.Parameter(weight.T.contiguous(), False) if transposed else weight, None, transposed)
    packed.bias = nn.Parameter(draw(48, dtype=dtype))
    packed.quantize_(Workspace())
    adapter = LoRALinearWeights(
        40, [LinearPart("q", 0, 16), LinearPart("v", 32, 16)], [2, 3], [0.5, 2.0], dropout=0.3
    ).to(dtype)
    for b in adapter.b:
        b.data.normal_(0, 0.3)
    packed.lora["a"], packed.active = adapter, "a"
    dense = copy.deepcopy(packed)
    assert packed.quantized is not None
    del dense.weight
    dense.weight = nn.Parameter(packed.quantized.dequantize(dtype), requires_grad=False)
    dense.transposed = False
    return packed, dense


def through(linear: Linear, x: Tensor, what: str) -> list[Tensor]:
    torch.manual_seed(3)  # of the dropout
    norm = LayerNorm(40).to(x.dtype)
    x = x.clone().requires_grad_()
    y = {
        "alone": lambda: linear(x),
        "behind a norm": lambda: norm_linear(x, norm, linear),
        "behind an activation": lambda: activation_linear(x, "gelu", linear),
    }[what]()
    y.backward(draw(*y.shape, dtype=y.dtype, seed=9))
    trained = [p for name, p in linear.named_parameters() if not name.startswith("weight")]
    assert len(trained) == 4
    return [y.detach(), *(t.grad.clone() for t in [x, *trained] if t.grad is not None)]


@pytest.mark.parametrize("what", ["alone", "behind a norm", "behind an activation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["(M, K)", "(K, M)"])
def test_linear_is_bitwise_that_of_the_decoded_weight(what: str, dtype: torch.dtype, transposed: bool) -> None:
    packed, dense = linears(dtype, transposed)
    x = draw(2, 5, 40, dtype=dtype)
    ours, theirs = through(packed, x, what), through(dense, x, what)
    assert len(ours) == 6
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradients_are_those_of_the_formula() -> None:
    packed, _ = linears(torch.float64)
    packed.eval()
    x = draw(3, 40, dtype=torch.float64).requires_grad_()
    trained = [p for name, p in packed.named_parameters() if not name.startswith("weight")]
    assert torch.autograd.gradcheck(lambda x, *_: packed(x), (x, *trained))


def test_nothing_as_large_as_the_weight_is_saved() -> None:
    packed, dense = linears(torch.float32)
    sizes: dict[Linear, int] = {}
    for linear in (packed, dense):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            linear(draw(3, 40))
        sizes[linear] = max(t.numel() for t in saved)
    assert sizes[dense] == 48 * 40
    assert sizes[packed] <= 3 * 40 * 5


def test_survives_casting_copying_and_inference_mode() -> None:
    packed, _ = linears(torch.float32)
    before = packed.weight.dequantize(torch.float32)
    with torch.inference_mode():
        packed(draw(3, 40))
    packed(draw(3, 40).requires_grad_()).sum().backward()
    twin = copy.deepcopy(packed).to(torch.bfloat16)
    assert torch.equal(twin.weight.dequantize(torch.float32), before)
    assert twin(draw(3, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(draw(3, 40)).dtype == torch.bfloat16
    twin.load_state_dict(packed.state_dict())
    assert torch.equal(twin.weight.dequantize(torch.float32), before)


def test_buffer_is_one_and_grows() -> None:
    workspace = Workspace()
    small, large = NF4Weight(draw(3, 64), workspace), NF4Weight(draw(9, 70), workspace)
    small.dequantize_into_buffer(torch.float32)
    first = large.dequantize_into_buffer(torch.float32)
    assert torch.equal(first, large.dequantize(torch.float32))
    assert small.dequantize_into_buffer(torch.float32).data_ptr() == first.data_ptr()
    assert small.dequantize_into_buffer(torch.bfloat16).data_ptr() != first.data_ptr()

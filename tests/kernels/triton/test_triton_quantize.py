"""NF4's Triton kernels against the format written in plain torch; under the interpreter, or on a GPU."""

import pytest
import torch
from kernel_cases import draw, error
from launches import launched
from torch import Tensor, nn

from handtune.kernels import Linear, LoRALinearWeights, backend
from handtune.kernels.lora.factors import LinearPart
from handtune.kernels.quant.nf4 import FEW_ROWS, NF4Weight, Workspace, nf4_levels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (5, 7), (37, 450)], ids=str)  # the last: two ranges
ULP = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter's bf16 is an ulp off
BOUND = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def matrix(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different size, blocks of zeros, and behind the end what must not be read."""
    line = torch.full((m * k + 64,), 99.0, dtype=torch.float64)
    out = line[: m * k].view(m, k)
    out.copy_(draw(m, k))
    if m > 4:
        out[:2], out[-2:] = 0, 3 * out[-2:]
    return line.to(DEVICE, dtype)[: m * k].view(m, k)


def made_by_torch(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> NF4Weight:
    with monkeypatch.context() as patch:
        patch.setattr(backend, "on_triton", lambda *tensors: False)
        return NF4Weight(weight, Workspace())


def decoded(packed: NF4Weight) -> Tensor:
    """level · maximum in float64 (M, K), from what is stored."""
    codes = torch.stack((packed.codes >> 4, packed.codes & 15), 1).view(-1, 64).long().cpu()
    values = nf4_levels().double()[codes] * packed.maxima().double().cpu()[:, None]
    m, k = packed.shape
    return values.view(-1)[: m * k].view(m, k)


@DTYPES
@SHAPES
def test_stores_what_torch_stores(shape, dtype, monkeypatch) -> None:
    weight = matrix(*shape, dtype=dtype)
    before = weight.clone()
    with launched() as kernels:
        packed = NF4Weight(weight, Workspace())
    assert kernels == ["_quantize_kernel"]
    assert torch.equal(weight, before)
    expected = dict(made_by_torch(weight, monkeypatch).named_parameters())
    for name, tensor in packed.named_parameters():
        assert torch.equal(tensor, expected[name]), name
    turned = NF4Weight(weight.T.contiguous().T, Workspace())
    assert torch.equal(turned.codes, packed.codes)


@DTYPES
@SHAPES
def test_decodes(shape, dtype) -> None:
    packed = NF4Weight(matrix(*shape), Workspace())
    truth = decoded(packed)
    with launched() as kernels:
        own, lent = packed.dequantize(dtype), packed.dequantize_into_buffer(dtype)
    assert kernels == ["_dequantize_kernel"] * 2
    assert torch.equal(own, lent)
    assert own.dtype == dtype
    assert error(own, truth) <= ULP[dtype]
    zero = own.cpu().double()[truth == 0]
    assert not zero.count_nonzero()


@DTYPES
@pytest.mark.parametrize("rows", [3, FEW_ROWS])
@pytest.mark.parametrize("shape", [(1, 64), (40, 192)], ids=str)
def test_product_decodes_on_the_way(shape, rows, dtype) -> None:
    packed = NF4Weight(matrix(*shape), Workspace())
    x, bias = draw(rows, shape[1]).to(DEVICE, dtype), draw(shape[0], seed=1).to(DEVICE, dtype)
    assert packed.supports_fused_matmul(x)
    with launched() as kernels:
        plain, added = packed.product(x, None), packed.product(x, bias)
    assert kernels == ["_product_kernel"] * 2
    truth = x.double().cpu() @ decoded(packed).to(dtype).double().T
    assert plain.dtype == dtype
    assert error(plain, truth) <= BOUND[dtype]
    assert error(added, truth + bias.double().cpu()) <= BOUND[dtype]
    turned = x.T.contiguous().T
    assert torch.equal(packed.product(turned, None), plain)


def test_product_of_more_blocks_than_a_range_has() -> None:
    packed, x = NF4Weight(matrix(5, 3712), Workspace()), draw(1, 3712).to(DEVICE, torch.float32)
    assert len(packed.ranges) == 2
    assert error(packed.product(x, None), x.double().cpu() @ decoded(packed).T) <= 3e-6


def adapted(m: int, k: int, dtype: torch.dtype) -> Linear:
    linear = Linear.around(nn.Parameter(matrix(m, k, dtype), requires_grad=False), None)
    linear.quantize_(Workspace())
    adapter = LoRALinearWeights(k, [LinearPart("", 0, m)], [3], [0.5], device=DEVICE).to(dtype)
    adapter.a.data.copy_(draw(3, k))
    adapter.b[0].data.copy_(draw(m, 3))
    linear.lora["a"], linear.active = adapter, "a"
    return linear


@DTYPES
@pytest.mark.parametrize("lead", [(1,), (2, 3), (2, 17)], ids=str)
@pytest.mark.parametrize("shape", [(24, 64), (9, 20), (7, 5)], ids=str)
def test_layer_and_its_gradients(shape, lead, dtype) -> None:
    """Few rows of whole blocks go through the product, all others through the decoded weight; backward always does."""
    linear, k = adapted(*shape, dtype), shape[1]
    x = draw(*lead, k).to(DEVICE, dtype).requires_grad_()
    incoming = draw(*lead, shape[0], seed=2).to(DEVICE, dtype)
    before = incoming.clone()
    with launched() as kernels:
        y = linear(x)
        forward = list(kernels)
        y.backward(incoming)
    few = torch.Size(lead).numel() <= FEW_ROWS and k % 64 == 0
    assert ("_product_kernel" in forward, "_dequantize_kernel" in forward) == (few, not few)
    assert "_dequantize_kernel" in kernels[len(forward) :]
    assert torch.equal(incoming, before)

    factors = linear.lora["a"]
    inputs = [t.detach().double().cpu().requires_grad_() for t in (x, factors.a, factors.b[0])]
    weight = decoded(linear.quantized).to(dtype).double()
    truth = inputs[0] @ (weight + 0.5 * inputs[2] @ inputs[1]).T
    truth.backward(incoming.double().cpu())
    assert error(y.detach(), truth.detach()) <= BOUND[dtype]
    for own, true in zip((x, factors.a, factors.b[0]), inputs, strict=True):
        assert error(own.grad, true.grad) <= BOUND[dtype]


def test_expanded_gradient_and_two_runs() -> None:
    linear = adapted(24, 192, torch.float16)
    runs = []
    for _ in range(2):
        x = draw(3, 192).to(DEVICE, torch.float16).requires_grad_()
        y = linear(x)
        y.sum().backward()
        runs.append((y.detach(), x.grad, linear.lora["a"].a.grad))
        linear.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    factors, weight = linear.lora["a"], decoded(linear.quantized)
    whole = weight + 0.5 * factors.b[0].double().cpu() @ factors.a.double().cpu()
    assert error(runs[0][1], whole.sum(0).expand(3, -1)) <= 3e-3

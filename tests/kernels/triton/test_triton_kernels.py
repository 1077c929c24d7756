"""The Triton kernels: one contract for all, against plain torch in float64; under the interpreter, or on a GPU."""

import pytest
import torch
from kernel_cases import CASES, MASK_DTYPE, draw, dropped, error, leaves, outputs, run
from launches import launched

from handtune.kernels import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [((1,), 1), ((13,), 7), ((2, 17), 24), ((37,), 33)]  # leading dimensions of x, and its width
NAMES = [name for name in CASES if name not in ("linear", "gelu", "gelu_tanh", "relu", "silu", "tanh")]  # torch's own
every_case = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize(("lead", "width"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@every_case
def test_agrees_with_float64(name, dtype, lead, width, monkeypatch) -> None:
    """The kernel is as near to the formula in float64 as plain torch is, given the same rounded inputs."""
    monkeypatch.setitem(MASK_DTYPE, torch.float64, dtype)
    case = CASES[name](lead, width)
    rounded = tuple(t.to(dtype) for t in case.inputs)
    with launched() as kernels:
        ours = run(case.op, leaves(rounded, dtype, DEVICE))
    assert kernels
    reference = run(case.reference, leaves(rounded, dtype))
    truth = run(case.reference, leaves(rounded, torch.float64, DEVICE))
    bound = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for i, (mine, theirs, true) in enumerate(zip(ours, reference, truth, strict=True)):
        assert mine.dtype == dtype
        assert error(mine, true) <= max(bound, 2 * error(theirs, true)), f"tensor {i}"


@every_case
def test_transposed_input(name: str) -> None:
    """x with its first and last dimension swapped in memory gives what contiguous x gives."""
    case = CASES[name]((2, 5), 8)
    expected = run(case.op, leaves(case.inputs, torch.float32, DEVICE))
    turned = [t.float().to(DEVICE).transpose(0, -1).contiguous().transpose(0, -1) for t in case.inputs]
    got = run(case.op, [t.detach().requires_grad_() for t in turned])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_case
def test_expanded_gradient(name: str) -> None:
    """`y.sum().backward()` hands in a gradient of stride zero."""
    case = CASES[name]((3, 15), 8)
    ours, reference = leaves(case.inputs, torch.float32, DEVICE), leaves(case.inputs, torch.float32, DEVICE)
    sum(y.sum() for y in outputs(case.op(*ours))).backward()
    sum(y.sum() for y in outputs(case.reference(*reference))).backward()
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@every_case
def test_writes_into_nothing_that_is_not_its_own(name: str) -> None:
    case = CASES[name]((2, 17), 8)
    inputs = leaves(case.inputs, torch.float32, DEVICE)
    before = [t.detach().clone() for t in inputs]
    out = outputs(case.op(*inputs))
    values = [y.detach().clone() for y in out]
    incoming = [draw(*y.shape).to(y) for y in out]
    copies = [g.clone() for g in incoming]
    torch.autograd.backward(out, incoming)
    for now, then in zip([*inputs, *out, *incoming], [*before, *values, *copies], strict=True):
        assert torch.equal(now, then)


@every_case
def test_two_runs_are_bitwise_equal(name: str) -> None:
    case = CASES[name]((3, 15), 33)
    first, second = (run(case.op, leaves(case.inputs, torch.float16, DEVICE)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    mask = dropped(torch.zeros(100, 50, device=DEVICE), 0.3, 1)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert not torch.equal(mask, dropped(torch.zeros(100, 50, device=DEVICE), 0.3, 2))


def test_a_norm_with_a_weight_in_fp32_rounds_once() -> None:
    """As in Gemma, x̂ in fp32 meets 1 + w in fp32; the interpreter cuts what a GPU rounds, which costs a unit."""
    torch.manual_seed(0)
    x = torch.randn(40, 64, device=DEVICE).bfloat16()
    weight = 1 + 0.1 * torch.randn(64, device=DEVICE)
    exact = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    with launched() as kernels:
        out = rms_norm(x, weight, 1e-6)
    assert kernels
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= 2**-7 * exact.abs()).all()
    narrow = rms_norm(x, weight.bfloat16(), 1e-6)
    assert not ((narrow.double() - exact).abs() <= 2**-7 * exact.abs()).all()  # of a weight in x's dtype: twice

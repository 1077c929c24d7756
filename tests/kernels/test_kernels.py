"""Every kernel but attention and cross-entropy: one contract for all, against plain torch in float64."""

import pytest
import torch
from kernel_cases import CASES, MASK_DTYPE, draw, dropped, error, leaves, lora, outputs, run

from handtune.kernels import activate, lora_linear, rms_norm, rope, split_rope, swiglu

SIZES = [((1,), 1), ((13,), 7), ((2, 3), 24), ((3, 5), 33)]  # leading dimensions of x, and its width
every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_gradcheck(name: str) -> None:
    case = CASES[name]((2, 3), 4)
    assert torch.autograd.gradcheck(case.op, leaves(case.inputs, torch.float64), check_undefined_grad=False)


@pytest.mark.parametrize(("lead", "width"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_case
def test_agrees_with_float64(
    name: str, dtype: torch.dtype, lead: tuple[int, ...], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is as near to the formula in float64 as plain torch is, given the same rounded inputs."""
    monkeypatch.setitem(MASK_DTYPE, torch.float64, dtype)
    case = CASES[name](lead, width)
    rounded = tuple(t.to(dtype) for t in case.inputs)
    ours, reference = run(case.op, leaves(rounded, dtype)), run(case.reference, leaves(rounded, dtype))
    truth = run(case.reference, leaves(rounded, torch.float64))
    bound = {torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    for i, (mine, theirs, true) in enumerate(zip(ours, reference, truth, strict=True)):
        assert mine.dtype == dtype
        assert error(mine, true) <= max(bound, 2 * error(theirs, true)), f"tensor {i}"


@every_case
def test_transposed_input(name: str) -> None:
    """x with its first and last dimension swapped in memory gives what contiguous x gives."""
    for lead in ((13,), (2, 5)):
        case = CASES[name](lead, 8)
        expected = run(case.op, leaves(case.inputs, torch.float64))
        turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in case.inputs]
        got = run(case.op, [t.detach().requires_grad_() for t in turned])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_case
def test_expanded_gradient(name: str) -> None:
    """`y.sum().backward()` hands in a gradient of stride zero."""
    case = CASES[name]((3, 5), 8)
    ours, reference = leaves(case.inputs, torch.float64), leaves(case.inputs, torch.float64)
    sum(y.sum() for y in outputs(case.op(*ours))).backward()
    sum(y.sum() for y in outputs(case.reference(*reference))).backward()
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@every_case
def test_writes_into_nothing_that_is_not_its_own(name: str) -> None:
    case = CASES[name]((2, 5), 8)
    inputs = leaves(case.inputs, torch.float32)
    before = [t.detach().clone() for t in inputs]
    out = outputs(case.op(*inputs))
    values = [y.detach().clone() for y in out]
    incoming = [draw(*y.shape).float() for y in out]
    copies = [g.clone() for g in incoming]
    torch.autograd.backward(out, incoming)
    for now, then in zip([*inputs, *out, *incoming], [*before, *values, *copies], strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_case
def test_two_runs_are_bitwise_equal(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]((3, 5), 33)
    first, second = (run(case.op, leaves(case.inputs, dtype)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_case
def test_each_gradient_alone(name: str) -> None:
    """An input that wants no gradient gets none, and the others get what they get together."""
    case = CASES[name]((3, 5), 6)
    inputs = leaves(case.inputs, torch.float64)
    n_out = len(run(case.op, inputs)) - len(inputs)
    for wanted in range(len(inputs)):
        alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        grads = run(case.op, alone)[n_out:]
        assert [g is None for g in grads] == [i != wanted for i in range(len(inputs))]
        torch.testing.assert_close(grads[wanted], inputs[wanted].grad, rtol=1e-12, atol=1e-12)


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    mask = dropped(torch.zeros(200, 50), 0.3, 1)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (mask == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(mask, dropped(torch.zeros(200, 50), 0.3, 2))


def test_dropout_without_a_seed_follows_torchs_generator() -> None:
    case = lora((3,), 8)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(lora_linear(*case.inputs, dropout=0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("name", ["lora", "lora dropout", "layer_norm linear", "swiglu linear", "rms_norm"])
def test_one_vector_and_no_rows(name: str) -> None:
    vector = CASES[name]((), 8)
    ours, reference = (run(f, leaves(vector.inputs, torch.float64)) for f in (vector.op, vector.reference))
    torch.testing.assert_close(ours, reference)
    empty = CASES[name]((0,), 8)
    for got, like in zip(run(empty.op, leaves(empty.inputs, torch.float32))[1:], empty.inputs, strict=True):
        assert got.shape == like.shape
        assert not got.any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": (2, 4)}, r"x: last dimension must be K = 5 of weight \(6, 5\), got \(2, 4\)"),
        ({"bias": (5,)}, r"bias: expected \(6,\)"),
        ({"a": (3, 4)}, r"a: expected \(R, 5\)"),
        ({"b": (6, 2)}, r"ranks \[2\] must add up"),
        ({"b": (7, 3)}, r"rows 0 to 7 lie outside"),
        ({"rows": (0, 1)}, "one of each a part"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
    ],
    ids=str,
)
def test_lora_linear_refuses_what_does_not_fit(change: dict, says: str) -> None:
    shapes = {"x": (2, 5), "weight": (6, 5), "bias": (6,), "a": (3, 5), "b": (6, 3)}
    tensors = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    settings = {key: value for key, value in change.items() if key not in shapes}
    with pytest.raises(ValueError, match=says):
        lora_linear(**tensors, **settings)


def test_other_refusals() -> None:
    x = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"a: torch\.float64 on cpu, but x is torch\.float32"):
        lora_linear(x, x, None, x.double(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="activation 'gelo' is unknown; known: geglu"):
        activate(x, "gelo")
    with pytest.raises(ValueError, match="gate_up: the last dimension must be even"):
        swiglu(x)
    with pytest.raises(ValueError, match=r"weight: expected shape \(5,\)"):
        rms_norm(x, torch.ones(4))
    with pytest.raises(ValueError, match="cos, sin: expected"):
        rope(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"qkv: expected H \+ 2K heads with H = 2"):
        split_rope(torch.zeros(1, 2, 3, 8), 2, torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="cos, sin: expected"):
        split_rope(torch.zeros(1, 2, 4, 8), 2, torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_weight_in_fp32_scales_what_is_not_rounded_yet() -> None:
    """As Gemma's norms have it: x in bf16, 1 + w in fp32, one rounding at the end; forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(40, 64).bfloat16().requires_grad_()
    weight = (1 + 0.1 * torch.randn(64)).requires_grad_()
    wide = x.detach().float().requires_grad_()
    exact = torch.nn.functional.rms_norm(wide, (64,), weight, 1e-6)
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())

    grad = torch.randn(40, 64).bfloat16()
    expected = torch.autograd.grad(exact, (wide, weight), grad.float())
    dx, dw = torch.autograd.grad(out, (x, weight), grad)
    assert dw.dtype == torch.float32
    torch.testing.assert_close(dw, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, expected[0].bfloat16(), rtol=1e-2, atol=1e-2)

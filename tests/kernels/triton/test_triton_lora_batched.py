"""The multi-adapter LoRA linear as Triton kernels: the contract of all kernels, for rows of different adapters."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import MASK_DTYPE, Case, draw, dropped, error, leaves, run
from launches import launched
from torch import Tensor

from handtune.kernels import Segments, lora_linear, lora_linear_batched
from handtune.kernels.lora.batched import lora_linear_batched_reference
from handtune.kernels.matmul_cpu import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
G, M, R = 4, 19, 3
# Leading dimensions of x, its width, and the adapter of each row: a row alone; decoding, a token each; one block;
# blocks and pieces cut by the end of a run and by their size; every other row, in three dimensions; nearly all one's.
BATCHES = {
    "one row": ((1,), 1, [2]),
    "one token each": ((4,), 33, [3, 0, -1, 0]),
    "one block": ((13,), 7, [1] * 13),
    "uneven": ((55,), 24, [2] * 3 + [0] * 35 + [-1] * 5 + [2] * 11 + [3]),
    "alternating": ((2, 17), 20, [0, -1, 3] * 11 + [1]),
    "one large": ((51,), 20, [1] * 25 + [0] + [1] * 25),
}
every_batch = pytest.mark.parametrize("name", BATCHES)


def where(name: str) -> Segments:
    return Segments.of(BATCHES[name][2], 1, DEVICE)


def case(name: str, dropout: float = 0.0) -> Case:
    lead, k, owners = BATCHES[name]

    def reference(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Row by row; under dropout, the base of all rows and the low-rank branch of the masked ones."""
        flat = x.reshape(-1, k)
        masked = flat * dropped(flat, dropout, 5) if dropout else flat
        low_rank = lora_linear_batched_reference(masked, torch.zeros_like(weight), None, a, b, owners)
        return (F.linear(flat, weight, bias) + low_rank).view(*lead, M)

    return Case(
        lambda *tensors: lora_linear_batched(*tensors, where(name), dropout=dropout, seed=5),
        reference,
        (draw(*lead, k), draw(M, k, seed=1), draw(M, seed=2), draw(G, R, k, seed=3), draw(G, M, R, seed=4)),
    )


def expected_kernels(name: str, dropout: float) -> set[str]:
    """Those of the products down to the rank and up again; single rows have their own, which know no dropout."""
    if name not in ("one row", "one token each"):
        return {"_lora_a_kernel", "_add_lora_kernel"}
    return (
        {"_lora_a_kernel", "_add_lora_row_kernel", "_add_lora_kernel"}
        if dropout
        else {"_lora_a_row_kernel", "_add_lora_row_kernel"}
    )


@every_dtype
@pytest.mark.parametrize(
    ("name", "dropout"), [(name, 0.0) for name in BATCHES] + [("one token each", 0.4), ("uneven", 0.4)]
)
def test_agrees_with_float64(name: str, dtype: torch.dtype, dropout: float, monkeypatch) -> None:
    """The kernels are as near to the formula in float64 as plain torch is, given the same rounded inputs."""
    monkeypatch.setitem(MASK_DTYPE, torch.float64, dtype)
    one = case(name, dropout)
    rounded = tuple(t.to(dtype) for t in one.inputs)
    with launched() as kernels:
        ours = run(one.op, leaves(rounded, dtype, DEVICE))
    assert set(kernels) == {
        *expected_kernels(name, dropout),
        "_s_and_b_gradients_kernel",
        "_a_gradient_kernel",
        "_sum_pieces_kernel",
    }
    reference = run(one.reference, leaves(rounded, dtype))
    truth = run(one.reference, leaves(rounded, torch.float64, DEVICE))
    bound = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for i, (mine, theirs, true) in enumerate(zip(ours, reference, truth, strict=True)):
        assert mine.dtype == dtype
        assert error(mine, true) <= max(bound, 2 * error(theirs, true)), f"tensor {i}"


@every_batch
def test_rows_without_an_adapter_are_bitwise_the_base(name: str) -> None:
    x, weight, bias, a, b = leaves(case(name).inputs, torch.float32, DEVICE)
    y, base = lora_linear_batched(x, weight, bias, a, b, where(name)), linear(x, weight, bias)
    bare = torch.tensor([g < 0 for g in BATCHES[name][2]], device=DEVICE).view(x.shape[:-1])
    assert torch.equal(y[bare], base[bare])
    assert (y[~bare] != base[~bare]).any(-1).all()
    grad = draw(*y.shape).to(y)
    (of_x,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(of_x[bare], linear(grad.view(-1, M), weight.T).view(x.shape)[bare])


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_another_adapters_infinity_stays_where_it_is() -> None:
    """Nor does a row that is read under a mask, which is the first, spoil another adapter's gradient."""
    tensors = leaves(case("uneven").inputs, torch.float32, DEVICE)
    x, owners = tensors[0], BATCHES["uneven"][2]
    with torch.no_grad():
        tensors[3][0] = tensors[4][0] = torch.inf
        x[0] = torch.nan
    y = lora_linear_batched(*tensors, where("uneven"))
    assert y.isfinite().all(1).tolist() == [i > 0 and owner != 0 for i, owner in enumerate(owners)]
    y.backward(torch.ones_like(y))
    assert [t.grad[3].isfinite().all().item() for t in tensors[3:]] == [True, True]
    assert x.grad.isfinite().all(1).tolist() == [owner != 0 for owner in owners]


def test_one_adapter_is_lora_linear() -> None:
    x, weight, bias, a, b = leaves(case("one block").inputs, torch.float32, DEVICE)
    y = lora_linear_batched(x, weight, bias, a, b, where("one block"), dropout=0.4, seed=2)
    expected = lora_linear(x, weight, bias, a[1], b[1], dropout=0.4, seed=2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grad = draw(*y.shape).to(y)
    of_y, of_expected = (torch.autograd.grad(out, (x, weight, bias, a, b), grad) for out in (y, expected))
    for mine, peer in zip(of_y, of_expected, strict=True):
        torch.testing.assert_close(mine, peer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["one token each", "uneven"])
def test_sibling_parts(name: str) -> None:
    """Two parts of different rank and height, with rows of y that have none."""
    (n,), k, owners = BATCHES[name]
    shapes = [(n, k), (25, k), (25,), (G, 5, k), (G, 3, 2), (G, 18, 3)]
    ours, theirs = (leaves(tuple(draw(*s, seed=i) for i, s in enumerate(shapes)), torch.float32) for _ in range(2))
    ours = [t.detach().to(DEVICE).requires_grad_() for t in ours]
    y = lora_linear_batched(*ours[:4], ours[4:], where(name), rows=(1, 6))
    x, weight, bias, a, first, second = theirs
    base, none = F.linear(x, weight, bias), torch.zeros(n, 1)
    low = [lora_linear_batched_reference(x, torch.zeros(b.shape[1], k), None, c, b, owners)
           for b, c in ((first, a[:, :2]), (second, a[:, 2:]))]  # fmt: skip
    expected = base + torch.cat((none, low[0], none, none, low[1], none), 1)
    grad = draw(*y.shape).float()
    y.backward(grad.to(DEVICE))
    expected.backward(grad)
    for mine, peer in zip([y, *(t.grad for t in ours)], [expected, *(t.grad for t in theirs)], strict=True):
        torch.testing.assert_close(mine.cpu(), peer, rtol=1e-4, atol=1e-4)


def test_transposed_input() -> None:
    one = case("alternating")
    expected = run(one.op, leaves(one.inputs, torch.float32, DEVICE))
    turned = [t.float().to(DEVICE).transpose(0, -1).contiguous().transpose(0, -1) for t in one.inputs]
    got = run(one.op, [t.detach().requires_grad_() for t in turned])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["one token each", "alternating"])
def test_expanded_gradient(name: str) -> None:
    """`y.sum().backward()` hands in a gradient of stride zero."""
    one = case(name)
    ours, reference = leaves(one.inputs, torch.float32, DEVICE), leaves(one.inputs, torch.float32, DEVICE)
    one.op(*ours).sum().backward()
    one.reference(*reference).sum().backward()
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["one token each", "uneven"])
def test_writes_into_nothing_that_is_not_its_own(name: str) -> None:
    one = case(name)
    inputs = leaves(one.inputs, torch.float32, DEVICE)
    before = [t.detach().clone() for t in inputs]
    y = one.op(*inputs)
    value, incoming = y.detach().clone(), draw(*y.shape).to(y)
    copy = incoming.clone()
    y.backward(incoming)
    for now, then in zip([*inputs, y, incoming], [*before, value, copy], strict=True):
        assert torch.equal(now, then)


@every_batch
def test_two_runs_are_bitwise_equal(name: str) -> None:
    one = case(name)
    first, second = (run(one.op, leaves(one.inputs, torch.float16, DEVICE)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_row_has_an_adapter() -> None:
    x, weight, bias, a, b = leaves(case("one block").inputs, torch.float32, DEVICE)
    y = lora_linear_batched(x, weight, bias, a, b, Segments.of([-1] * 13, 1, DEVICE))
    assert torch.equal(y, F.linear(x, weight, bias))
    y.sum().backward()
    assert not a.grad.any() and not b.grad.any()

"""The multi-adapter LoRA linear on CPU: against row by row `lora_linear`, however its rows are cut up."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import draw
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from handtune.kernels import Segments, lora_linear, lora_linear_batched
from handtune.kernels.backend import INTERPRETED
from handtune.kernels.lora import row_groups
from handtune.kernels.lora.batched import lora_linear_batched_reference
from handtune.kernels.matmul_cpu import linear

G, K, M, R = 4, 5, 6, 3
BATCHES = {  # adapter of each sequence, lengths
    "one each": ((0, 1, 2, 3), 1),
    "shuffled": ((2, 0, 3), 1),
    "with the base": ((1, -1, 0), 1),
    "repeated": ((0, 2, 0, 2, 2), 1),
    "even": ((1, 2, 3), 4),
    "even, shuffled": ((3, 0), 4),
    "uneven": ((2, -1, 0, 2), (5, 2, 3, 1)),
    "empty segment": ((1, 0, 1, 3), (2, 0, 1, 3)),
    "one adapter": ((2, 2), 3),
    "the base alone": ((-1, -1), 2),
    "no row": ((), 1),
}
every_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


@pytest.fixture(params=[512, 2], ids=["together", "one by one"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of torch: rows gathered and padded, and adapter by adapter with rows gathered two at a time."""
    monkeypatch.setattr(row_groups, "MAX_GATHERED_ROWS", request.param)
    monkeypatch.setattr(row_groups, "MIN_RUN_LENGTH", 2)


def owners(batch: tuple) -> list[int]:
    adapters, lengths = batch
    sizes = [lengths] * len(adapters) if isinstance(lengths, int) else lengths
    return [adapter for adapter, size in zip(adapters, sizes, strict=True) for _ in range(size)]


def inputs(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(n, K), (M, K), (M,), (G, R, K), (G, M, R)]
    return [draw(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


def row_by_row(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, of_row: list[int]) -> Tensor:
    rows = [
        lora_linear(x[i : i + 1], weight, bias, a[g], b[g]) if g >= 0 else F.linear(x[i : i + 1], weight, bias)
        for i, g in enumerate(of_row)
    ]
    return torch.cat(rows) if rows else x.new_empty(0, M)


@every_batch
def test_agrees_with_lora_linear_row_by_row(batch: tuple, cut: None) -> None:
    of_row = owners(batch)
    ours, theirs = inputs(len(of_row)), inputs(len(of_row))
    y, expected = lora_linear_batched(*ours, Segments.of(*batch)), row_by_row(*theirs, of_row)
    torch.testing.assert_close(y, expected)
    if of_row:
        torch.testing.assert_close(lora_linear_batched_reference(*theirs, of_row), expected)
        incoming = draw(*y.shape)
        untouched = incoming.clone()
        y.backward(incoming)
        expected.backward(untouched)
        assert torch.equal(incoming, untouched)
        for mine, peer in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, torch.zeros_like(peer) if peer.grad is None else peer.grad)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", ["with the base", "repeated", "uneven", "even"])
def test_gradients_are_those_of_the_function(name: str, dropout: float, cut: None) -> None:
    where = Segments.of(*BATCHES[name])
    function = lambda *tensors: lora_linear_batched(*tensors, where, dropout=dropout, seed=3)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs(where.bounds[-1]), fast_mode=True)


def test_the_ways_of_cutting_up_are_all_taken() -> None:
    """A view where rows lie even; else gathered; too many of those, a view a run; and crumbs gathered by adapter."""

    def kinds(*batch) -> list[tuple[str, tuple[int, int]]]:
        steps = Segments.of(*batch).steps
        return [("view" if isinstance(step.rows, slice) else "gathered", step.shape) for step in steps]

    assert kinds((0, 1, 2), 300) == [("view", (3, 300))]
    assert kinds((-1, 2, 1), 300) == [("view", (2, 300))]
    assert kinds((2, -1, 1), 20) == [("gathered", (2, 20))]
    assert kinds((2, 1), (300, 3)) == [("view", (1, 3)), ("view", (1, 300))]
    assert kinds((0, 1) * 400, 1) == [("gathered", (1, 400))] * 2
    assert kinds((0, 1) * 600, 1) == [("gathered", (1, 512)), ("gathered", (1, 88))] * 2
    assert kinds((0, 1) * 20, 16) == [("view", (1, 16))] * 40


@every_batch
def test_rows_without_an_adapter_are_bitwise_the_base(batch: tuple, cut: None) -> None:
    of_row = owners(batch)
    x, weight, bias, a, b = inputs(len(of_row), torch.float32)
    y, base = lora_linear_batched(x, weight, bias, a, b, Segments.of(*batch)), linear(x, weight, bias)
    bare = [i for i, g in enumerate(of_row) if g < 0]
    assert torch.equal(y[bare], base[bare])
    assert all(not torch.equal(y[i], base[i]) for i, g in enumerate(of_row) if g >= 0)
    grad = draw(*y.shape).float()
    (of_y,), (of_base,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(F.linear(x, weight, bias), x, grad)
    assert torch.equal(of_y[bare], linear(grad, weight.T)[bare])
    torch.testing.assert_close(of_y[bare], of_base[bare])


def test_another_adapters_infinity_stays_where_it_is(cut: None) -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs(6, torch.float32))
    a[1] = b[1] = torch.inf
    x[3] = torch.nan
    y = lora_linear_batched(x, weight, bias, a, b, Segments.of((0, 1, 0, 2, -1), (2, 1, 1, 1, 1)))
    assert y.isfinite().all(1).tolist() == [True, True, False, False, True, True]


def test_permuted_rows_give_permuted_rows(cut: None) -> None:
    of_row = [2, -1, 0, 2, 2, 1, 0, -1, 1, 3]
    order = torch.randperm(len(of_row), generator=torch.Generator().manual_seed(0))
    ours, turned = inputs(len(of_row)), inputs(len(of_row))
    turned[0] = turned[0].detach()[order].requires_grad_()
    grad = draw(len(of_row), M)
    y = lora_linear_batched(*ours, Segments.of(of_row))
    z = lora_linear_batched(*turned, Segments.of([of_row[i] for i in order]))
    torch.testing.assert_close(z, y[order])
    y.backward(grad)
    z.backward(grad[order])
    torch.testing.assert_close(turned[0].grad, ours[0].grad[order])
    for mine, other in zip(ours[1:], turned[1:], strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_one_adapter_is_lora_linear(cut: None) -> None:
    """With dropout too: the mask is the same."""
    ours, theirs = inputs(6), inputs(6)
    y = lora_linear_batched(*ours, Segments.of((1,), 6), dropout=0.4, seed=2)
    x, weight, bias, a, b = theirs
    expected = lora_linear(x, weight, bias, a[1], b[1], dropout=0.4, seed=2)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for mine, peer in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, peer.grad)


def test_lower_ranks_are_padded_with_zeros(cut: None) -> None:
    x, weight, bias, a, b = inputs(6)
    low_a, low_b = draw(1, K, seed=8), draw(M, 1, seed=9)
    padded_a, padded_b = (torch.stack((t[0], torch.zeros_like(t[1]))).detach() for t in (a, b))
    padded_a[1, :1], padded_b[1, :, :1] = low_a, low_b
    y = lora_linear_batched(x, weight, bias, padded_a, padded_b, Segments.of((0, 1), 3))
    torch.testing.assert_close(y[:3], lora_linear(x[:3], weight, bias, a[0], b[0]))
    torch.testing.assert_close(y[3:], lora_linear(x[3:], weight, bias, low_a, low_b))


def test_sibling_parts(cut: None) -> None:
    """Two parts of different rank and height, with rows that have none; x of three dimensions."""
    shapes = [(3, 4, K), (9, K), (9,), (G, 5, K), (G, 3, 2), (G, 4, 3)]
    x, weight, bias, a, *bs = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    adapters, grad = (2, -1, 0), draw(3, 4, 9)
    y = lora_linear_batched(x, weight, bias, a, bs, Segments.of(adapters, 4), rows=(1, 5))
    one = lambda g: lora_linear(x[g], weight, bias, a[adapters[g]], [b[adapters[g]] for b in bs], rows=(1, 5))  # noqa: E731
    expected = torch.stack((one(0), F.linear(x[1], weight, bias), one(2)))
    torch.testing.assert_close(y, expected)
    tensors = (x, weight, bias, a, *bs)
    for mine, peer in zip(
        torch.autograd.grad(y, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(mine, peer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_runs_are_bitwise_equal(dtype: torch.dtype, cut: None) -> None:
    found = []
    for _ in range(2):
        tensors = inputs(11, dtype)
        y = lora_linear_batched(*tensors, Segments.of(*BATCHES["uneven"]), dropout=0.2, seed=1)
        y.sum().backward()  # an incoming gradient of stride zero
        found.append([y, *(t.grad for t in tensors)])
        assert all(t.grad.dtype == dtype for t in tensors)
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_transposed_input(cut: None) -> None:
    x, *rest = (t.detach() for t in inputs(11))
    where = Segments.of(*BATCHES["uneven"])
    turned = x.T.contiguous().T
    torch.testing.assert_close(lora_linear_batched(turned, *rest, where), lora_linear_batched(x, *rest, where))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "a", "b"])
def test_computes_only_the_gradients_that_are_wanted(wanted: str) -> None:
    n, names = 8, ("x", "weight", "bias", "a", "b")
    tensors = [t.detach().requires_grad_(name == wanted) for name, t in zip(names, inputs(n), strict=True)]
    y = lora_linear_batched(*tensors, Segments.of((0, 1), 4))
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        y.sum().backward()
    low = n * M * R  # dS
    products = {"x": low + n * R * K + n * M * K, "weight": n * M * K, "bias": 0, "a": low + n * R * K, "b": 2 * low}
    assert counter.get_total_flops() == 2 * products[wanted]
    assert [t.grad is not None for t in tensors] == [name == wanted for name in names]


def test_keeps_x_and_s_and_nothing_else() -> None:
    x, weight, bias, a, b = inputs(12)
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear_batched(x, weight, bias, a, b, Segments.of((0, 2), 6))
    given = {t.untyped_storage().data_ptr() for t in (x, weight, a, b)}
    assert given <= set(seen)
    assert sum(size for address, size in seen.items() if address not in given) == 8 * 12 * R


@pytest.mark.skipif(INTERPRETED, reason="its blocks are smaller")
def test_tables_for_triton() -> None:
    where = Segments.of((2, 0, -1, 2), (70, 3, 2, 1))
    assert (where.adapters, where.bounds) == ((2, 0, -1, 2), (0, 70, 73, 75, 76))
    assert where.order.tolist() == [70, 71, 72, *range(70), 75]
    assert where.blocks.tolist() == [[0, 0, 3], [2, 3, 67], [2, 67, 74]]
    assert where.pieces.tolist() == [[0, 0, 3], [2, 3, 74]]
    assert where.totals.tolist() == [[0, 0, 1], [2, 1, 2]]
    assert not where.single_rows
    few = Segments.of((1, 1, -1, 0))
    assert few.single_rows
    assert few.adapters == (1, -1, 0)
    assert few.blocks.tolist() == [[0, 0, 1], [1, 1, 2], [1, 2, 3]]
    assert few.pieces.tolist() == [[0, 0, 1], [1, 1, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (12, 4)}, r"x: last dimension must be K = 5 of weight \(6, 5\), got \(12, 4\)"),
        ({"bias": (5,)}, r"bias: expected \(6,\) for weight \(6, 5\), got \(5,\)"),
        ({"a": (3, 5)}, r"a: expected \(G, R, 5\) for weight \(6, 5\), got \(3, 5\)"),
        ({"b": (3, 6, 3)}, r"b: expected \(G, M, R\) with G = 4 of a \(4, 3, 5\), got \(3, 6, 3\)"),
        ({"b": (4, 6, 2)}, r"b: ranks \[2\] must add up to the ranks of a \(4, 3, 5\)"),
        ({"b": (4, 7, 3)}, r"b: rows 0 to 7 lie outside weight \(6, 5\)"),
        ({"rows": (0, 3)}, "b, rows: one of each a part, got 1 and 2"),
        ({"b": torch.float32}, "b: torch.float32 on cpu, but x is torch.float64 on cpu"),
        ({"dropout": -0.1}, r"dropout: expected a probability in \[0, 1\), got -0.1"),
        ({"segments": Segments.of((0, 1), 5)}, "segments: they cover 10 rows, but x has 12"),
        ({"segments": Segments.of((4,), 12)}, r"segments: adapter 4 is not among the 4 of a \(4, 3, 5\)"),
        ({"segments": Segments.of((0,), 12, "meta")}, "segments: on meta, but x is on cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(change: dict, message: str) -> None:
    given = dict(zip(("x", "weight", "bias", "a", "b"), inputs(12), strict=True), segments=Segments.of((0, 1), 6))
    for name, value in change.items():
        if isinstance(value, torch.dtype):
            given[name] = given[name].to(value)
        else:
            given[name] = draw(*value) if name in ("x", "bias", "a", "b") else value
    with pytest.raises(ValueError, match=message):
        lora_linear_batched(**given)


@pytest.mark.parametrize(("adapters", "lengths"), [((0, 1), (1,)), ((-2,), 1), ((0,), -1)], ids=str)
def test_refuses_batches_that_make_no_sense(adapters: tuple, lengths: int | tuple) -> None:
    with pytest.raises(ValueError, match=r"lengths: one of each|expected adapters from -1 and lengths from 0 up"):
        Segments.of(adapters, lengths)

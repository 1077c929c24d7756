"""Linear head + cross-entropy in one: both reductions, against the full logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from handtune.kernels import linear_cross_entropy
from handtune.kernels.cross_entropy import chunks
from handtune.kernels.cross_entropy.reference import linear_cross_entropy_reference

SIZES = [((1,), 1, 2), ((13,), 7, 11), ((2, 3), 24, 64), ((3, 5), 33, 1)]  # leading dimensions of x, D, V


def problem(lead: tuple[int, ...], d: int, v: int, ignored: bool = True, seed: int = 0) -> tuple[Tensor, ...]:
    """x (..., D), weight (V, D), bias (V,), targets (...) with about a third ignored."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((*lead, d), (v, d), (v,))
    )
    targets = torch.randint(v, lead, generator=generator)
    if ignored:
        targets[torch.rand(lead, generator=generator) < 0.3] = -100
    return x, weight, bias, targets


def leaves(*tensors: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.to(dtype, copy=True).requires_grad_() for t in tensors]


def full_losses(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """One loss a position, by way of the full logits."""
    logits = F.linear(x, weight, bias).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none").view(targets.shape)


@pytest.fixture(params=[False, True], ids=["one chunk", "chunks of 4"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(chunks, "_chunk_rows", lambda n, vocab: 4)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("ignored", [False, True], ids=["all targets", "some ignored"])
@pytest.mark.usefixtures("_chunks")
def test_gradcheck(reduction: str, with_bias: bool, ignored: bool) -> None:
    x, weight, bias, targets = problem((2, 5), 3, 6, ignored)
    inputs = leaves(x, weight, bias)[: 3 if with_bias else 2]

    def loss(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(x, weight, targets, bias, reduction=reduction)

    assert torch.autograd.gradcheck(loss, inputs, check_undefined_grad=False)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck_with_index(reduction: str) -> None:
    x, weight, bias, targets = problem((2, 5), 3, 6)
    index = (targets.flatten() != -100).nonzero()[:, 0]

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets.flatten()[index], bias, index=index, reduction=reduction)

    assert torch.autograd.gradcheck(loss, leaves(x, weight, bias), check_undefined_grad=False)


@pytest.mark.parametrize(("lead", "d", "v"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.usefixtures("_chunks")
def test_agrees_with_float64(reduction: str, dtype: torch.dtype, lead: tuple[int, ...], d: int, v: int) -> None:
    x, weight, bias, targets = problem(lead, d, v)
    rounded = [t.to(dtype) for t in (x, weight, bias)]
    ours, truth = leaves(*rounded, dtype=dtype), leaves(*rounded)
    weights = torch.linspace(0.5, 2.0, targets.numel()).view(targets.shape)
    if reduction == "sum":
        loss = linear_cross_entropy(ours[0], ours[1], targets, ours[2])
        oracle = linear_cross_entropy_reference(truth[0], truth[1], targets, truth[2])
        (loss * 3).backward()
        (oracle * 3).backward()
    else:
        loss = linear_cross_entropy(ours[0], ours[1], targets, ours[2], reduction="none")
        oracle = full_losses(truth[0], truth[1], targets, truth[2])
        loss.backward(weights)
        oracle.backward(weights.double())
    assert loss.dtype == torch.float32
    assert loss.shape == oracle.shape
    bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for got, true in [(loss.detach(), oracle.detach()), *((a.grad, b.grad) for a, b in zip(ours, truth, strict=True))]:
        assert (got.double() - true).abs().max() <= bound * true.abs().max().clamp(min=1)
    assert not ours[0].grad[targets == -100].any()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("n", [3, 4, 5, 8, 9])
def test_chunk_boundaries(reduction: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk fewer, exactly full chunks, and a last chunk of one row."""
    monkeypatch.setattr(chunks, "_chunk_rows", lambda n, vocab: 4)
    x, weight, _, targets = problem((n,), 5, 7, ignored=False)
    ours, reference = leaves(x, weight), leaves(x, weight)
    linear_cross_entropy(*ours, targets, reduction=reduction).sum().backward()
    full_losses(*reference, targets).sum().backward()
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_never_more_than_a_chunk_of_logits(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation, forward or backward, gives a tensor of rows × vocabulary beyond the chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (97,):
                    self.size = max(self.size, tensor.numel())
            return out

    monkeypatch.setattr(chunks, "_chunk_rows", lambda n, vocab: 4)
    x, weight, _, targets = problem((30,), 3, 97)
    with Largest() as largest:
        linear_cross_entropy(*leaves(x, weight), targets, reduction=reduction).sum().backward()
    assert largest.size == 4 * 97


def test_chunk_size_keeps_logits_near_32_mib() -> None:
    assert chunks._chunk_rows(10, 50257) == 16
    assert chunks._chunk_rows(8192, 50257) == 333
    assert chunks._chunk_rows(8192, 256000) == 65
    assert chunks._chunk_rows(8192, 2**22) == 16
    assert chunks._chunk_rows(1000, 2) == 1000


def products(x_wants: bool, weight_wants: bool, reduction: str, n_ignored: int = 0, grad: bool = True) -> int:
    """Multiply-adds, in units of N · D · V, of forward and backward."""
    x, weight, _, targets = problem((10,), 3, 7, ignored=False)
    targets[:n_ignored] = -100
    x.requires_grad_(x_wants)
    weight.requires_grad_(weight_wants)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
        if grad and (x_wants or weight_wants):
            loss.backward()
    units = counter.get_total_flops() / 2 / (10 * 3 * 7)
    assert units == pytest.approx(round(units, 1))
    return round(units, 1)


def test_products_only_for_wanted_gradients_and_kept_rows() -> None:
    assert products(False, False, "sum") == 1
    assert products(True, False, "sum") == 2
    assert products(False, True, "sum") == 2
    assert products(True, True, "sum") == 3
    assert products(True, True, "sum", n_ignored=4) == pytest.approx(1.8)
    assert products(True, False, "none") == 2
    assert products(False, True, "none") == 3
    assert products(True, True, "none") == 4
    assert products(True, True, "sum", grad=False) == 1  # evaluating a head that is being trained


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_each_gradient_alone(reduction: str) -> None:
    x, weight, bias, targets = problem((2, 5), 3, 6)
    together = leaves(x, weight, bias)
    linear_cross_entropy(*together[:2], targets, together[2], reduction=reduction).sum().backward()
    for wanted in range(3):
        alone = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, weight, bias))]
        linear_cross_entropy(*alone[:2], targets, alone[2], reduction=reduction).sum().backward()
        assert [t.grad is None for t in alone] == [i != wanted for i in range(3)]
        # x alone, and of losses one by one, has its gradient from the forward pass, by another order of operations.
        bound = 1e-15 if (wanted, reduction) == (0, "none") else 0.0
        torch.testing.assert_close(alone[wanted].grad, together[wanted].grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_inputs_and_gradient_stay_as_they_were(reduction: str) -> None:
    x, weight, bias, targets = problem((2, 5), 3, 6)
    inputs = leaves(x, weight, bias, dtype=torch.float32)
    before = [*(t.detach().clone() for t in inputs), targets.clone()]
    loss = linear_cross_entropy(*inputs[:2], targets, inputs[2], reduction=reduction)
    incoming = torch.full_like(loss, 1.5)
    loss.backward(incoming, retain_graph=True)
    first = [t.grad.clone() for t in inputs]
    loss.backward(incoming)
    assert (incoming == 1.5).all()
    assert all(torch.equal(a, b) for a, b in zip([*inputs, targets], before, strict=True))
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(inputs, first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_runs_are_bitwise_equal(reduction: str, dtype: torch.dtype) -> None:
    x, weight, bias, targets = problem((3, 11), 33, 70)
    results = []
    for _ in range(2):
        inputs = leaves(x, weight, bias, dtype=dtype)
        loss = linear_cross_entropy(*inputs[:2], targets, inputs[2], reduction=reduction)
        loss.sum().backward()
        results.append([loss, *(t.grad for t in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_transposed_input_and_expanded_gradient() -> None:
    x, weight, _, targets = problem((4, 4), 5, 7)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    w = weight.T.contiguous().T.requires_grad_()
    linear_cross_entropy(turned, w, targets, reduction="none").sum().backward()
    reference = leaves(x, weight)
    full_losses(*reference, targets).sum().backward()
    torch.testing.assert_close(turned.grad, reference[0].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w.grad, reference[1].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_chunks")
def test_entropy() -> None:
    x, weight, bias, targets = problem((3, 5), 4, 9)
    x.requires_grad_()
    losses, entropy = linear_cross_entropy(x, weight, targets, bias, reduction="none", with_entropy=True)
    expected = torch.distributions.Categorical(logits=F.linear(x, weight, bias)).entropy()
    kept = targets != -100
    torch.testing.assert_close(entropy[kept], expected[kept].detach(), rtol=1e-12, atol=1e-12)
    assert not entropy[~kept].any()
    assert not entropy.requires_grad
    torch.testing.assert_close(losses, full_losses(x, weight, targets, bias))
    x, targets = torch.zeros(1, 4), torch.tensor([3])
    uniform = linear_cross_entropy(x, torch.ones(8, 4), targets, reduction="none", with_entropy=True)
    torch.testing.assert_close(torch.cat(uniform), torch.full((2,), 8.0).log())


def test_index_picks_the_rows_that_have_targets() -> None:
    x, weight, bias, targets = problem((3, 5), 4, 9)
    index = (targets.flatten() != -100).nonzero()[:, 0]
    chosen = targets.flatten()[index]
    searched, given = leaves(x), leaves(x)
    loss = linear_cross_entropy(searched[0], weight, targets, bias)
    by_index = linear_cross_entropy(given[0], weight, chosen, bias, index=index)
    (loss + by_index).backward()
    assert torch.equal(loss, by_index)
    assert torch.equal(searched[0].grad, given[0].grad)
    single = linear_cross_entropy(x, weight, chosen, bias, index=index, reduction="none")
    assert torch.equal(single, linear_cross_entropy(x, weight, targets, bias, reduction="none").flatten()[index])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_large_logits_and_no_target_at_all(reduction: str) -> None:
    x, weight, bias, targets = problem((6,), 3, 5)
    inputs = leaves(x * 1e4, weight, bias, dtype=torch.float32)
    loss = linear_cross_entropy(*inputs[:2], targets, inputs[2], reduction=reduction).sum()
    loss.backward()
    reference = linear_cross_entropy_reference(inputs[0].double(), inputs[1].double(), targets, inputs[2].double())
    torch.testing.assert_close(loss.double(), reference)
    assert all(t.grad.isfinite().all() for t in inputs)

    inputs = leaves(x, weight)
    nothing = linear_cross_entropy(*inputs, torch.full_like(targets, -100), reduction=reduction).sum()
    nothing.backward()
    assert nothing == 0
    assert not any(t.grad.any() for t in inputs)


def test_refusals() -> None:
    x, weight, _, targets = problem((2, 5), 3, 6)
    with pytest.raises(ValueError, match=r"x: last dimension must be D of weight \(6, 4\), got \(2, 5, 3\)"):
        linear_cross_entropy(x, torch.zeros(6, 4), targets)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(x, weight, targets, reduction="mean")
    with pytest.raises(ValueError, match="with_entropy"):
        linear_cross_entropy(x, weight, targets, with_entropy=True)
    with pytest.raises(ValueError, match=r"targets: \(10,\) doesn't fit x \(2, 5, 3\)"):
        linear_cross_entropy(x, weight, targets.flatten())

"""Linear head + cross-entropy as Triton kernels: both reductions, against the full logits in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import error, leaves
from launches import launched
from torch import Tensor

from handtune.kernels import linear_cross_entropy
from handtune.kernels.cross_entropy import chunks_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [((1,), 1, 2), ((13,), 7, 64), ((2, 9), 24, 130), ((3, 5), 33, 1)]  # leading dimensions of x, D, V
BOUND = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
both = pytest.mark.parametrize("reduction", ["sum", "none"])
every_dtype = pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four rows of 130 in fp32, so that there are several and the last one is not full."""
    monkeypatch.setattr(chunks_triton, "_CHUNK", {0: 4 * 192 * 4})


def problem(lead: tuple[int, ...], d: int, v: int, ignored: bool = True) -> tuple[list[Tensor], Tensor]:
    """x (..., D), weight (V, D) and bias (V,); targets (...) with about a third ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*lead, d), (v, d), (v,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    targets = torch.randint(v, lead, generator=generator)
    if ignored:
        targets[torch.rand(lead, generator=generator) < 0.3] = -100
    targets.view(-1)[-1] = v - 1
    return inputs, targets.to(DEVICE)


def full_losses(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    logits = F.linear(x, weight, bias).flatten(0, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none").view(targets.shape)


def run(function, inputs: list[Tensor], targets: Tensor, reduction: str, **settings) -> list[Tensor]:
    """The loss and the gradients of the inputs, for incoming gradients that differ by row where there are rows."""
    x, weight, *bias = inputs
    loss = function(x, weight, targets, *bias, **settings)
    if reduction == "sum":
        loss = loss.sum()
    incoming = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    loss.backward(incoming)
    return [loss.detach(), *(t.grad for t in inputs)]


def ours(reduction: str):
    return partial(linear_cross_entropy, reduction=reduction)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("lead", "d", "v"), SIZES, ids=str)
@every_dtype
@both
def test_agrees_with_float64(reduction, dtype, lead, d, v, with_bias, softcap) -> None:
    inputs, targets = problem(lead, d, v)
    rounded = tuple(t.to(dtype) for t in inputs[: 3 if with_bias else 2])
    with launched() as kernels:
        got = run(ours(reduction), leaves(rounded, dtype, DEVICE), targets, reduction, softcap=softcap)
    assert {"_loss_kernel", "_gradient_kernel"} <= set(kernels)
    plain = run(full_losses, leaves(rounded, dtype, DEVICE), targets, reduction, softcap=softcap)
    truth = run(full_losses, leaves(rounded, torch.float64, DEVICE), targets, reduction, softcap=softcap)
    assert got[0].dtype == torch.float32
    for i, (mine, theirs, true) in enumerate(zip(got, plain, truth, strict=True)):
        assert error(mine, true) <= max(BOUND[dtype], 2 * error(theirs, true)), f"tensor {i}"
    assert not got[1][targets == -100].any()


@pytest.mark.parametrize("v", [5, 64, 150])
def test_entropy(v: int) -> None:
    (x, weight, bias), targets = problem((2, 3), 4, v)
    x, weight, bias = leaves((4 * x, weight, bias), torch.float32, DEVICE)
    losses, entropy = linear_cross_entropy(x, weight, targets, bias, reduction="none", with_entropy=True)
    logits = F.linear(x, weight, bias).detach().double()
    expected = torch.distributions.Categorical(logits=logits).entropy().masked_fill(targets == -100, 0)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    torch.testing.assert_close(losses, full_losses(x, weight, targets, bias))


@both
def test_index_picks_rows_and_the_host_never_waits(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, weight, _), targets = problem((3, 5), 8, 70)
    index = (targets.flatten() != -100).nonzero()[:, 0]
    chosen = targets.flatten()[index]
    x, weight = leaves((x, weight), torch.float32, DEVICE)
    expected = linear_cross_entropy(x, weight, targets, reduction=reduction)
    waits = ["item", "tolist", "nonzero", "__bool__", "__int__", "__float__"]
    with monkeypatch.context() as patched:
        for name in waits if DEVICE == "cpu" else []:
            patched.setattr(Tensor, name, lambda *_: pytest.fail("the host waits for the device"))
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            got = linear_cross_entropy(x, weight, chosen, index=index, reduction=reduction)
            got.sum().backward()
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected if reduction == "sum" else expected.flatten()[index])


@both
def test_each_gradient_alone(reduction: str) -> None:
    """What wants no gradient gets none; without any gradient wanted, the logits stay as they are."""
    inputs, targets = problem((2, 4), 5, 70)
    tensors = leaves(tuple(inputs), torch.float32, DEVICE)
    together = run(ours(reduction), tensors, targets, reduction)[1:]
    for wanted in range(3):
        alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        grads = run(ours(reduction), alone, targets, reduction)[1:]
        assert [g is None for g in grads] == [i != wanted for i in range(3)]
        if (reduction, wanted) == ("none", 0):  # made with the losses, and scaled afterwards
            torch.testing.assert_close(grads[0], together[0], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(grads[wanted], together[wanted])
    with launched() as kernels, torch.no_grad():
        ours(reduction)(*tensors[:2], targets)
    assert set(kernels) == {"_loss_kernel"}


def test_transposed_input_and_expanded_gradient() -> None:
    (x, weight, bias), targets = problem((4, 4), 5, 70)
    expected = leaves((x, weight, bias), torch.float32, DEVICE)
    full_losses(*expected[:2], targets, expected[2]).sum().backward()
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T, torch.stack((bias, bias), 1)]
    mine = leaves(tuple(turned), torch.float32, DEVICE)
    column = mine[2][:, 0]
    linear_cross_entropy(*mine[:2], targets.T.contiguous().T, column, reduction="none").sum().backward()
    for got, wanted in zip((mine[0].grad, mine[1].grad, mine[2].grad[:, 0]), expected, strict=True):
        torch.testing.assert_close(got, wanted.grad, rtol=1e-4, atol=1e-5)


@both
def test_writes_into_nothing_that_is_not_its_own(reduction: str) -> None:
    inputs, targets = problem((2, 4), 5, 70)
    tensors = leaves(tuple(inputs), torch.float32, DEVICE)
    before = [t.detach().clone() for t in (*tensors, targets)]
    loss = ours(reduction)(*tensors[:2], targets, tensors[2])
    incoming = torch.full_like(loss, 1.5)
    loss.backward(incoming, retain_graph=True)
    first = [t.grad.clone() for t in tensors]
    loss.backward(incoming)
    assert (incoming == 1.5).all()
    assert all(torch.equal(a, b) for a, b in zip((*tensors, targets), before, strict=True))
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(tensors, first, strict=True))


@both
def test_two_runs_are_bitwise_equal(reduction: str) -> None:
    inputs, targets = problem((2, 7), 9, 130)
    first, second = (
        run(ours(reduction), leaves(tuple(inputs), torch.float16, DEVICE), targets, reduction) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both
def test_extreme_logits(reduction: str) -> None:
    """Logits of ten thousands, one of −∞ (a token that is ruled out), and one that is NaN."""
    (x, weight, bias), targets = problem((6,), 3, 70, ignored=False)
    bias[7] = float("-inf")
    targets = torch.where(targets == 7, 8, targets)
    tensors = leaves((1e4 * x, weight, bias), torch.float32, DEVICE)
    got = run(ours(reduction), tensors, targets, reduction)
    truth = run(full_losses, leaves(tuple(tensors), torch.float64, DEVICE), targets, reduction)
    assert all(g.isfinite().all() for g in got)
    for mine, true in zip(got[:3], truth, strict=False):
        assert error(mine, true) <= 1e-5 * 1e4
    bias[9] = float("nan")
    tensors = leaves((x, weight, bias), torch.float32, DEVICE)
    assert ours(reduction)(*tensors[:2], targets, tensors[2]).isnan().all()


def test_a_target_outside_the_vocabulary_gives_nan() -> None:
    (x, weight, _), targets = problem((2,), 3, 70, ignored=False)
    targets[0] = 70
    x, weight = leaves((x, weight), torch.float32, DEVICE)
    assert linear_cross_entropy(x, weight, targets, reduction="none").isnan().tolist() == [True, False]


@both
def test_no_target_at_all(reduction: str) -> None:
    (x, weight, _), targets = problem((6,), 3, 70)
    tensors = leaves((x, weight), torch.float32, DEVICE)
    nothing = ours(reduction)(*tensors, torch.full_like(targets, -100)).sum()
    nothing.backward()
    assert nothing == 0
    assert not any(t.grad.any() for t in tensors)

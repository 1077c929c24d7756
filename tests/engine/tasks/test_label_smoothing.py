"""Label smoothing without logits, against torch's cross-entropy on the full logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from handtune.engine.tasks.common import smoothing_penalty
from handtune.kernels import linear_cross_entropy

SMOOTHING = 0.3


def problem(dtype: torch.dtype, n: int = 7, d: int = 5, v: int = 11) -> tuple[list[Tensor], Tensor]:
    """x (n, D), weight (V, D) and bias (V,); targets (n,)."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (v, d), (v,))]
    return [x.to(dtype).requires_grad_() for x in tensors], torch.randint(v, (n,), generator=generator)


def smoothed(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    head = (weight, targets, bias)
    return linear_cross_entropy(x, *head) + SMOOTHING * smoothing_penalty(x, *head)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_equals_torchs_loss_and_gradients(dtype: torch.dtype, bound: float, with_bias: bool) -> None:
    (x, weight, bias), targets = problem(dtype)
    ours = [x, weight, *([bias] if with_bias else [])]
    truth = [t.detach().double().requires_grad_() for t in ours]
    loss = smoothed(x, weight, targets, bias if with_bias else None)
    expected = F.cross_entropy(
        F.linear(*truth), targets, reduction="sum", label_smoothing=SMOOTHING
    )  # fmt: skip
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) <= bound * expected.item()
    for got, true in zip(ours, truth, strict=True):
        assert (got.grad.double() - true.grad).abs().max() <= bound * true.grad.abs().max()


def test_gradcheck() -> None:
    (x, weight, bias), targets = problem(torch.float64, 4, 3, 6)
    assert torch.autograd.gradcheck(lambda x, w, b: smoothed(x, w, targets, b), (x, weight, bias))


def test_it_needs_no_further_product_with_the_vocabulary() -> None:
    (x, weight, bias), targets = problem(torch.float32)
    with FlopCounterMode(display=False) as counter:
        smoothing_penalty(x, weight, targets, bias).backward()
    assert counter.get_total_flops() == 0

"""Optimizer states in eight bits: the paper's values and bound, and one update against fp32 moments."""

import pytest
import torch
from torch import Tensor

from handtune.kernels.optim.adamw8bit import adamw8bit_
from handtune.kernels.optim.adamw8bit_state import AdamW8bitParam
from handtune.kernels.optim.blockwise import BLOCK, codebook, dequantize, quantize
from handtune.kernels.optim.muon import MuonParam, muon_, orthogonal

BOUND = {True: 0.00704, False: 0.00352}  # of a block's greatest magnitude
BETAS, EPS = (0.9, 0.999), 1e-8
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_values_are_those_of_the_paper() -> None:
    """Seven decades with 1 to 64 values and their opposites, 0 and 1; unsigned, 2 to 128."""
    signed, unsigned = codebook(True, CPU), codebook(False, CPU)
    assert signed.values.unique().numel() == unsigned.values.unique().numel() == 256
    assert (signed.values[127], signed.values[255], unsigned.values[0], unsigned.values[255]) == (0, 1, 0, 1)
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        for values, count in ((signed.values, 2**decade), (unsigned.values, 2 ** (decade + 1))):
            inside = values[(values > low) & (values < high)]
            assert len(inside) == count
            assert inside.mean().item() == pytest.approx(0.55 * high, rel=1e-5)
    torch.testing.assert_close(signed.values[:127], -signed.values[128:255].flip(0))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_the_error_is_bounded_and_nearest(signed: bool) -> None:
    x = draw(40, BLOCK) ** 3 * 10 ** draw(40, 1, seed=1)
    if not signed:
        x = x.abs()
    x[3] = 0
    codes, greatest = quantize(x, signed)
    back = dequantize(codes, greatest, signed)
    error = (back - x).abs()
    assert (error <= BOUND[signed] * greatest[:, None]).all()
    assert (
        error.max() > 0.9 * BOUND[signed] * greatest[error.amax(1).argmax()]
    )  # the bound is no larger than it must be
    assert (codes.dtype, greatest.dtype) == (torch.uint8, torch.float32)

    # Among all values none is nearer, but that unsigned entries above zero don't become zero.
    distance = (codebook(signed, CPU).values * greatest[:5, None, None] - x[:5, :, None]).abs()
    nearest = distance.amin(-1)
    if not signed:
        assert (back[x > 0] > 0).all()
        nearest = torch.where(x[:5] > 1e-6 * greatest[:5, None], nearest, error[:5])
    torch.testing.assert_close(error[:5], nearest, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(1,), (255,), (257,), (3, 700)], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
def test_an_update_is_adamws_from_the_dequantized_moments(shape: tuple[int, ...], turned: bool) -> None:
    """And what is stored of the new moments is within the bound of them."""
    weight = draw(*shape)
    if turned:
        weight = weight.mT.contiguous().mT if len(shape) > 1 else weight.repeat_interleave(2)[::2]
    param = AdamW8bitParam(weight.requires_grad_(), scale=0.5, decay=0.1, copy=torch.zeros(shape, dtype=torch.bfloat16))
    n = weight.numel()
    for step in range(1, 5):
        m, root = (x.reshape(-1)[:n] for x in _moments(param))
        gradient, factor = 100 * draw(*shape, seed=step), torch.tensor(0.01)
        before = weight.detach().reshape(-1).clone()
        weight.grad = gradient.clone()
        adamw8bit_([param], 0.01, BETAS, EPS, factor)

        g = (gradient * factor).reshape(-1)
        m = 0.9 * m + 0.1 * g
        root = (0.999 * root**2 + 0.001 * g**2).sqrt()
        moved = 0.005 / (1 - 0.9**step) * m / (root / (1 - 0.999**step) ** 0.5 + EPS)
        torch.testing.assert_close(weight.detach().reshape(-1), before * (1 - 0.0005) - moved, rtol=1e-5, atol=1e-7)
        assert torch.equal(param.copy, weight.detach().bfloat16())
        assert torch.equal(weight.grad, gradient)
        for exact, stored, signed in zip((m, root), _moments(param), (True, False), strict=True):
            blocks = torch.nn.functional.pad(exact, (0, -n % BLOCK)).view(-1, BLOCK)
            errors = (stored - blocks).abs() / (BOUND[signed] * blocks.abs().amax(1, keepdim=True) + 1e-9)
            assert errors.view(-1)[:n].max() <= 1  # what stands behind the end is nobody's


def _moments(param: AdamW8bitParam) -> tuple[Tensor, Tensor]:
    return (
        dequantize(param.exp_avg.view(-1, BLOCK), param.exp_avg_max, True),
        dequantize(param.root_exp_avg_sq.view(-1, BLOCK), param.root_exp_avg_sq_max, False),
    )


def test_the_moments_stay_near_adamws_over_many_steps() -> None:
    """A hundred steps towards a target: the weights are where fp32 moments bring them, to 2 % of the way."""
    target = draw(16, 64)
    ours, theirs = torch.zeros(16, 64, requires_grad=True), torch.zeros(16, 64, requires_grad=True)
    param = AdamW8bitParam(ours)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=BETAS, eps=EPS, weight_decay=0.0)
    for step in range(100):
        noise = draw(16, 64, seed=step)
        ours.grad = ours.detach() - target + noise
        theirs.grad = theirs.detach() - target + noise
        adamw8bit_([param], 0.01, BETAS, EPS)
        reference.step()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert (ours - target).norm() < 0.6 * target.norm()


def test_gradients_missing_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight without a gradient stays; however many blocks are widened at a time, the bits are the same."""
    results = []
    for chunk in (2**20, 2 * BLOCK):
        monkeypatch.setattr("handtune.kernels.optim.adamw8bit.CHUNK", chunk)
        moved, stays = AdamW8bitParam(draw(7, 300).requires_grad_()), AdamW8bitParam(draw(9).requires_grad_())
        for step in range(2):
            moved.weight.grad = draw(7, 300, seed=step)
            adamw8bit_([moved, stays], 0.1, BETAS, EPS)
        assert torch.equal(stays.weight, draw(9)) and stays.step == 0
        results.append([moved.weight, moved.exp_avg, moved.root_exp_avg_sq, moved.exp_avg_max])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5)], ids=str)
def test_muon_makes_singular_values_equal(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(draw(*shape)).float())
    assert 0.6 < values.min() <= values.max() < 1.3


def test_each_part_of_a_fused_projection_is_a_matrix() -> None:
    """q, k and v in one weight move as three matrices move by torch's Muon; a step's gradients have a factor."""
    parts = [draw(n, 8, seed=n).requires_grad_() for n in (8, 4, 4)]
    fused = MuonParam(torch.cat([p.detach() for p in parts]).requires_grad_(), (8, 4, 4), scale=0.5, decay=0.1)
    reference = torch.optim.Muon(parts, lr=0.05, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step, factor in enumerate((1.0, 0.25, 8.0)):
        for i, part in enumerate(parts):
            part.grad = draw(*part.shape, seed=10 * step + i)
        fused.weight.grad = torch.cat([part.grad for part in parts])
        for part in parts:
            part.grad *= factor
        muon_([fused], 0.1, torch.tensor(factor))
        reference.step()
    assert torch.equal(fused.weight, torch.cat(parts))

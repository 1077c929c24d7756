"""A CPU's products: each way to x Wᵀ against float64, and packed weights that notice when the weight has changed."""

import pytest
import torch

from handtune.kernels import matmul_cpu
from handtune.kernels.matmul_cpu import PackedWeight, linear

BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
ROWS = (0, 1, 2, 4, 5, 16, 33)
onednn = pytest.mark.skipif(not matmul_cpu._has_onednn(), reason="this torch has no oneDNN")


def problem(n: int, m: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n + m + k)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((n, k), (m, k), (m,)))


def check(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == x.dtype and found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=BOUND[x.dtype], atol=BOUND[x.dtype] * x.shape[1] ** 0.5)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (7, 5), (257, 64), (64, 257), (1031, 513), (513, 1031)])
def test_every_way_agrees_with_float64(dtype: torch.dtype, n: int, m: int, k: int) -> None:
    x, weight, bias = problem(n, m, k, dtype)
    for given in (bias, None):
        check(linear(x, weight, given), x, weight, given)
        check(linear(x, weight.T.contiguous().T, given), x, weight, given)
    check(linear(x.repeat(1, 2)[:, :k], weight), x, weight, None)


@onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", ROWS)
def test_a_packed_weight_gives_the_weights_products(dtype: torch.dtype, n: int) -> None:
    x, weight, bias = problem(n, 257, 64, dtype)
    packed = PackedWeight(weight)
    assert packed.shape == weight.shape
    for given in (bias, None):
        check(packed.product(x, given), x, weight, given)
        check(PackedWeight(weight.T.contiguous().T).product(x, given), x, weight, given)

    # A change in place, as by a step or a merge, is seen.
    weight.mul_(2)
    check(packed.product(x, bias), x, weight, bias)


@onednn
def test_what_is_packed() -> None:
    weight = torch.ones(4, 4)
    assert PackedWeight.supports(weight, rows=4)
    assert not PackedWeight.supports(weight, rows=1)  # of one row the plain weight is read as fast
    assert PackedWeight.supports(weight.bfloat16(), rows=1)
    assert not PackedWeight.supports(weight.double(), rows=4)
    assert not PackedWeight.supports(torch.ones(0, 4), rows=4)
    with torch.inference_mode():
        assert not PackedWeight.supports(torch.ones(4, 4), rows=4)

"""The settings of CUDA that a run makes; they can be read without one."""

import pytest
import torch
from small_lines import ROWS, Line, line, squares

from handtune.engine import evaluate


@pytest.fixture(autouse=True)
def restored():
    """Everything as it was afterwards."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before[:3]
    torch.use_deterministic_algorithms(before[3])


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("before", [True, False])
def test_convolutions_are_as_exact_as_matrix_products(precision, before) -> None:
    torch.set_float32_matmul_precision(precision)
    for start in (line, lambda: evaluate(Line(), [torch.stack(ROWS)], squares)):
        torch.backends.cudnn.allow_tf32 = before
        start()
        assert torch.backends.cudnn.allow_tf32 == (precision == "high")


@pytest.mark.parametrize("name", ["tf32", "ieee"])
def test_the_newer_spelling_counts_too(name) -> None:
    torch.backends.cuda.matmul.fp32_precision = name
    line()
    assert torch.backends.cudnn.allow_tf32 == (name == "tf32")


def test_a_deterministic_run_means_convolutions_too(monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = True
    line()
    assert not torch.backends.cudnn.deterministic and torch.backends.cudnn.benchmark
    line(deterministic=True)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()

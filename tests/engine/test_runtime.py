"""The settings of CUDA that a run makes; they can be read without one."""

from functools import partial

import pytest
import torch
from small_lines import ROWS, Line, line, squares

from handtune.engine import evaluate
from handtune.engine.runtime import configure_determinism

CUDNN = torch.backends.cudnn


@pytest.fixture(autouse=True)
def restored():
    """Everything as it was afterwards."""
    precision = torch.get_float32_matmul_precision()
    before = CUDNN.allow_tf32, CUDNN.deterministic, CUDNN.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    CUDNN.allow_tf32, CUDNN.deterministic, CUDNN.benchmark = before[:3]
    torch.use_deterministic_algorithms(before[3])


def inside(start=line, **settings) -> tuple[bool, bool, bool, bool]:
    """The settings with which the loss is computed."""
    seen = []

    def loss_fn(model, batch):
        flags = CUDNN.allow_tf32, CUDNN.deterministic, CUDNN.benchmark
        seen.append((*flags, torch.are_deterministic_algorithms_enabled()))
        return squares(model, batch)

    start(loss_fn=loss_fn, **settings)
    assert len(set(seen)) == 1
    return seen[0]


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("before", [True, False])
def test_convolutions_are_as_exact_as_matrix_products(precision, before) -> None:
    torch.set_float32_matmul_precision(precision)
    for start in (line, partial(evaluate, Line(), [torch.stack(ROWS)])):
        CUDNN.allow_tf32 = before
        assert inside(start)[0] == (precision == "high")
        assert CUDNN.allow_tf32 == before


@pytest.mark.parametrize("name", ["tf32", "ieee"])
def test_the_newer_spelling_counts_too(name) -> None:
    torch.backends.cuda.matmul.fp32_precision = name
    assert inside()[0] == (name == "tf32")


def test_settings_in_the_newer_spelling_come_back() -> None:
    """One for convolutions and another for recurrent networks, which torch refuses to read in the older spelling."""
    CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = "ieee", "tf32"
    inside()
    assert (CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision) == ("ieee", "tf32")


def test_a_deterministic_run_means_convolutions_too(monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    CUDNN.benchmark = True
    assert inside()[1:] == (False, True, False)
    assert inside(deterministic=True)[1:] == (True, False, True)


def test_a_deterministic_run_fills_no_memory_before_it_writes_it(monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filled = []
    with configure_determinism(deterministic=True):
        filled.append(torch.utils.deterministic.fill_uninitialized_memory)
    assert [*filled, torch.utils.deterministic.fill_uninitialized_memory] == [False, True]

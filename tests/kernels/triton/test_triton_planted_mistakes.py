"""The kernels' contract catches mistakes: each one planted here, in a copy of the source, makes a test of it fail."""

import importlib.util
import sys
from pathlib import Path

import pytest
import test_triton_kernels as contract
import torch

import handtune.kernels
from handtune.kernels.backend import INTERPRETED

KERNELS = Path(handtune.kernels.__file__).parent

# What is planted: file, right line, wrong line, and the test of the contract that must fail.
MISTAKES = {
    "a mask dropped from the variance": (
        "norms_triton",
        "centered = tl.where(inside, v - mu, 0.0)",
        "centered = v - mu",
        lambda patch: contract.test_agrees_with_float64("layer_norm", torch.float32, (13,), 7, patch),
    ),
    "a mask dropped from the norm in front of a projection": (
        "lora.norms_triton",
        "v = tl.where(inside, v - mu[:, None], 0.0)",
        "v = v - mu[:, None]",
        lambda patch: contract.test_agrees_with_float64("layer_norm linear", torch.float32, (13,), 7, patch),
    ),
    "the gradient overwritten": (
        "norms_triton",
        "dx = torch.empty_like(x)",
        "dx = grad",
        lambda patch: contract.test_writes_into_nothing_that_is_not_its_own("rms_norm"),
    ),
    "the scale of the second part taken for the first": (
        "lora.products",
        "joined[rows, ranks] = b * scale",
        "joined[rows, ranks] = b * args.scales[0]",
        lambda patch: contract.test_agrees_with_float64("lora parts", torch.float32, (13,), 7, patch),
    ),
    "v turned, too": (
        "rotary_triton",
        "sin_row, sin_token, False,",
        "sin_row, sin_token, True,",
        lambda patch: contract.test_agrees_with_float64("split_rope", torch.float32, (13,), 7, patch),
    ),
    "what dropout keeps not scaled up": (
        "lora.linear_triton",
        "da = da / (1 - p)",
        "da = da",
        lambda patch: contract.test_agrees_with_float64("lora dropout", torch.float32, (13,), 7, patch),
    ),
    "another mask in the backward pass": (
        "lora.linear_triton",
        "first_column, k, seed, p",
        "first_column, k, seed + 1, p",
        lambda patch: contract.test_agrees_with_float64("lora dropout", torch.float32, (13,), 7, patch),
    ),
}


@pytest.mark.skipif(not INTERPRETED, reason="a wrong kernel has no business on a GPU")
@pytest.mark.parametrize("what", MISTAKES)
def test_a_planted_mistake_is_caught(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, right, wrong, test = MISTAKES[what]
    test(monkeypatch)  # passes as it is
    name = f"handtune.kernels.{file}"
    package, _, leaf = name.rpartition(".")
    source = (KERNELS / f"{file.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert right in source
    (tmp_path / f"{leaf}.py").write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{leaf}.py")
    broken = importlib.util.module_from_spec(spec)
    if file == "lora.products":  # reached through names that are bound already
        spec.loader.exec_module(broken)
        monkeypatch.setattr(sys.modules[name], "_block_diagonal", broken._block_diagonal)
    else:
        monkeypatch.setitem(sys.modules, name, broken)
        spec.loader.exec_module(broken)
        monkeypatch.setattr(sys.modules[package], leaf, broken, raising=False)
    with pytest.raises(AssertionError):
        test(monkeypatch)

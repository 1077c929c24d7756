"""The count of a block's launches and bytes is made of the calls that are really made: a planted one changes it."""

import sys
from unittest import mock

import pytest
import torch
from project import BENCHMARKS

pytest.importorskip("triton")
sys.path.append(str(BENCHMARKS))
from block_bytes import block_calls, size, totals

from handtune.kernels.mlp import fused

SIZES = {"d_model": 256, "d_ff": 512, "n_head": 4, "n_kv_head": 2, "vocab_size": 64}
TOKENS = 2048


def test_a_planted_call_is_counted() -> None:
    plain = totals(block_calls(TOKENS, 16, SIZES))
    original = fused._product

    def with_a_copy(*args):
        return original(*args).clone()  # (N, 2F)

    with mock.patch.object(fused, "_product", with_a_copy):
        planted = totals(block_calls(TOKENS, 16, SIZES))
    u = torch.empty(TOKENS, 2 * SIZES["d_ff"], dtype=torch.bfloat16)
    assert planted["launches"] == plain["launches"] + 1
    assert planted["gigabytes"] == pytest.approx(plain["gigabytes"] + 2 * size(u) / 1e9)


def test_a_block_without_an_adapter() -> None:
    """Two norms, four products, rope, swiglu, two sums; backward as many, and the gradients' sums."""
    names = [call.name for call in block_calls(TOKENS, 0, SIZES)]
    assert names.count("mm") == 8 and names.count("_rope_kernel") == 2
    assert not [name for name in names if "lora" in name or "gradient" in name]


def test_what_lora_costs_a_block_of_llama_8b() -> None:
    """The bounds that the kernels are built for, 2.2 GB and 60 launches, with what a frozen block has."""
    frozen, adapted = (totals(block_calls(8192, rank)) for rank in (0, 16))
    assert adapted["gigabytes"] - frozen["gigabytes"] <= 2.2
    assert adapted["launches"] <= 60

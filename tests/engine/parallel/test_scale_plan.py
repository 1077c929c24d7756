"""The arithmetic of benchmarks/scale_plan.py, by hand for one case, and against what others have published."""

import sys

import pytest
from project import BENCHMARKS

from handtune.engine.parallel import tree

sys.path.append(str(BENCHMARKS))
import scale_plan as plan


def test_a_llama_has_the_published_number_of_parameters() -> None:
    sizes = {name: round(model.total / 1e9, 2) for name, model in plan.MODELS.items()}
    assert sizes == {"llama-8b": 8.03, "llama-70b": 70.55, "llama-405b": 405.85}
    assert round(plan.MODELS["llama-8b"].factors(16) / 1e6, 1) == 41.9  # PEFT's count for all-linear


def test_by_hand() -> None:
    """8B in shards over two machines: 16 GB of weights cross the network twice, but for the sixteenth that is here."""
    model, machine = plan.MODELS["llama-8b"], plan.Machine()
    cost = plan.cost(model, plan.Plan(16, "full", 16, 16, 1024, 1024), machine)
    assert cost.between == pytest.approx(2 * 2 * 8.03e9 * 15 / 16, rel=1e-3)
    assert cost.waits_for == "the network"
    assert cost.seconds == pytest.approx(cost.between / machine.network + cost.tree)
    # 168 MB in 16 pieces: inside of the machine a process sends or receives 16 of them, then half, then a quarter, and
    # between the two machines the two that are left to it; then all are told to all.
    inside, across = 28 / 16 * 168e6 / 360e9, (2 / 16 + 1) * 168e6 / 40e9
    assert cost.tree == pytest.approx(inside + across + (28 + 2 + 16) * 20e-6, rel=0.02)
    alone = plan.cost(model, plan.Plan(1, "none", 16, 16, 1024, 1024), machine)
    assert (alone.between, alone.inside, alone.tree, alone.waits_for) == (0, 0, 0, "computing")
    assert alone.memory > cost.memory


def test_what_others_have_measured_lies_below() -> None:
    for _, _, name, each, theirs in plan.PUBLISHED:
        ours = plan.cost(plan.MODELS[name], each, plan.Machine()).tokens_per_second
        assert 0.6 < theirs / ours < 1


def test_gradients_travel_in_as_many_pieces_as_the_tree_has() -> None:
    assert plan.PIECE_BITS == tree.PIECE_BITS

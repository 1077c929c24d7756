"""Freezing by glob, unfreezing on schedule, and the report of what trains."""

import pytest
import torch
from torch import nn

from handtune.engine import LoRAConfig, add_lora, freeze, trainable_report, unfreeze
from handtune.engine.parallel.tree import GradientTree
from handtune.engine.training.freezing import match, unfreeze_due
from handtune.models import GPT2


def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2.from_name("gpt2", vocab_size=61, max_positions=40, n_layer=3, n_head=3, d_model=24)


def trains(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_globs() -> None:
    gpt2 = model()
    names = trains(gpt2)
    freeze(gpt2, "*")
    assert not trains(gpt2)
    unfreeze(gpt2, "layers.2.*", "norm.*")
    assert trains(gpt2) == {n for n in names if n.startswith(("layers.2.", "norm."))}
    freeze(gpt2, "*.bias")
    assert trains(gpt2) == {n for n in names if n.startswith(("layers.2.", "norm.")) and not n.endswith(".bias")}
    unfreeze(gpt2, "layers.[01].qkv.weight")
    assert {"layers.0.qkv.weight", "layers.1.qkv.weight"} < trains(gpt2)
    assert set(match(gpt2, ["layers.1.o.*"])) == {"layers.1.o.weight", "layers.1.o.bias"}


@pytest.mark.parametrize("change", [freeze, unfreeze])
def test_a_glob_without_a_match_is_refused_and_changes_nothing(change) -> None:
    gpt2 = model()
    freeze(gpt2, "layers.0.*")
    before = trains(gpt2)
    with pytest.raises(
        ValueError, match=r"'layers\.7\.\*' matches no parameter; names start with embed, head, layers, norm"
    ):
        change(gpt2, "*", "layers.7.*")
    assert trains(gpt2) == before


def test_frozen_parameters_get_no_gradient_and_do_not_stop_the_others() -> None:
    gpt2 = model()
    freeze(gpt2, "*")
    unfreeze(gpt2, "layers.1.*")
    gpt2(torch.tensor([[1, 2, 3]])).square().mean().backward()
    assert {name for name, p in gpt2.named_parameters() if p.grad is not None} == trains(gpt2)


def test_schedule() -> None:
    """Howard and Ruder: the top first, then one layer more an epoch."""
    gpt2 = model()
    everything = trains(gpt2)
    schedule = {"norm.*": 0, "layers.2.*": 0, "layers.1.*": 1, "layers.0.*": 1.5, "embed.*": 2}

    def tops(epoch: float) -> set[str]:
        unfreeze_due(gpt2, schedule, epoch)
        return {".".join(name.split(".")[:2]) for name in trains(gpt2)}

    top = {"norm.weight", "norm.bias", "layers.2"}
    assert tops(0) == top
    assert tops(0.99) == top
    assert tops(1.0) == top | {"layers.1"}
    assert tops(1.5) == top | {"layers.1", "layers.0"}
    assert tops(7.0) == top | {"layers.1", "layers.0", "embed.tokens", "embed.positions"}
    assert trains(gpt2) == everything
    assert tops(0) == top  # a run resumed at its beginning
    with pytest.raises(ValueError, match="matches no parameter"):
        unfreeze_due(gpt2, {"layer.*": 0}, 1.0)


def test_report_counts_each_parameter_once() -> None:
    gpt2 = model()
    d, inner, layer = 24, 96, 4 * 24 + (72 * 24 + 72) + (24 * 24 + 24) + (96 * 24 + 96) + (24 * 96 + 24)
    assert inner == 4 * d
    embed, norm = 61 * d + 40 * d, 2 * d
    report = trainable_report(gpt2)
    assert report.total == report.trainable == embed + 3 * layer + norm  # the tied head is the embedding
    assert report.modules == (("embed", embed), ("layers", 3 * layer), ("norm", norm))
    assert report.weights == report.gradients == 4 * report.total
    assert report.optimizer == 8 * report.total

    freeze(gpt2, "*")
    assert trainable_report(gpt2).trainable == trainable_report(gpt2).optimizer == 0
    assert "trains 0 of" in str(trainable_report(gpt2))
    assert "nothing" in str(trainable_report(gpt2))


@pytest.mark.parametrize("micro_batches", range(1, 18))
def test_report_of_gradients_that_wait(micro_batches) -> None:
    """Those of the micro-batches of a step, in the tree in which they are added up, at the most at once."""
    module = torch.nn.Linear(4, 3)
    tree = GradientTree(module.parameters())
    most = 0
    for _ in range(micro_batches):
        module(torch.ones(2, 4)).sum().backward()
        held = [p.grad for p in module.parameters()] + [g for node in tree.nodes.values() for g in node.values()]
        most = max(most, sum(gradient.nbytes for gradient in held))
        tree.add()
    tree.finish()
    assert trainable_report(module, micro_batches=micro_batches).gradients == most


def test_report_of_adapters_and_narrow_weights() -> None:
    gpt2 = model().to(torch.bfloat16)
    base = trainable_report(gpt2)
    assert base.weights == base.gradients == 2 * base.total
    assert base.optimizer == 12 * base.total  # two moments and a master in fp32
    add_lora(gpt2, LoRAConfig(rank=2, targets=["qkv"]))
    unfreeze(gpt2, "norm.*")
    report = trainable_report(gpt2)
    low_rank, norm = 3 * 2 * (24 + 72), 2 * 24
    assert report.total == base.total + low_rank
    assert report.trainable == low_rank + norm
    assert dict(report.modules) == {"LoRA": low_rank, "norm": norm}
    assert report.weights == base.weights + 4 * low_rank
    assert report.gradients == 4 * low_rank + 2 * norm
    assert report.optimizer == 8 * low_rank + 12 * norm
    share = 100 * report.trainable / report.total
    assert str(report).startswith(f"trains {report.trainable:,} of {report.total:,} parameters ({share:.2f} %)")

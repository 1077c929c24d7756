"""The feed-forward computed once more in the backward pass: the same numbers, and u is not kept."""

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from handtune.engine import LoRAConfig, add_lora, set_adapter
from handtune.kernels import LayerNorm, Linear, RMSNorm, feed_forward
from handtune.kernels.linear import Projection
from handtune.kernels.mlp import prenorm


def build(dropout: float, gated: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    norm = RMSNorm(16) if gated else LayerNorm(16)
    parts = (("gate", 24), ("up", 24)) if gated else ()
    model = nn.ModuleDict({"norm": norm, "up": Linear(16, 48, parts=parts), "down": Linear(24 if gated else 48, 16)})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    add_lora(model, LoRAConfig(rank=2, dropout=dropout))
    for name, parameter in model.named_parameters():
        if ".b." in name:
            nn.init.normal_(parameter)
    return model.train()


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputing_changes_nothing_and_keeps_less(dropout: float, gated: bool, monkeypatch) -> None:
    model, found, freed = build(dropout, gated), [], []
    x, grad = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    widest: list[StorageWeakRef] = []

    project = Projection.__call__

    def watched(projection: Projection, h: Tensor) -> Tensor:
        y = project(projection, h)
        if projection.norm[0] is not None:
            widest.append(StorageWeakRef(y.untyped_storage()))
        return y

    monkeypatch.setattr(Projection, "__call__", watched)
    monkeypatch.setattr(prenorm, "takes", lambda *arguments: False)  # `fused.py` has a test of its own
    for recompute in (False, True):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        y = feed_forward(leaf, model["norm"], model["up"], "swiglu" if gated else "gelu", model["down"], recompute)
        freed.append(bool(widest) and widest[-1].expired())
        set_adapter(model, None)  # the backward pass does not look which adapter is active by then
        y.backward(grad)
        set_adapter(model, "default")
        found.append([y.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert freed == [False, True]
    assert len(widest) == 3  # made once, and twice
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-6, atol=1e-6)

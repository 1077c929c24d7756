"""A small GPT-2 with adapters, and what tests of adapters ask of it."""

from typing import Any

import torch
from small_models import token_rows
from torch import Tensor, nn

from handtune.engine import LoRAConfig, add_lora
from handtune.models import GPT2

IDS = torch.tensor(token_rows((9, 9)))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(input_ids=IDS)
    return out if isinstance(out, Tensor) else out.logits


def shaken(model: nn.Module, seed: int = 5) -> nn.Module:
    """Random numbers in every adapter factor and whatever else trains, so that a lost tensor is noticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def small_gpt2(dtype: torch.dtype = torch.float32, **overrides: Any) -> GPT2:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "max_positions": 40, "n_layer": 2, "n_head": 3, "d_model": 24}
    return GPT2.from_name("gpt2", **{**sizes, **overrides}).eval().to(dtype)


def adapted(config: LoRAConfig | None = None, **overrides: Any) -> GPT2:
    model = small_gpt2(**overrides)
    add_lora(model, config or LoRAConfig(rank=3, alpha=5))
    return shaken(model)


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, bool], list[type], list[Any]]:
    """Everything about a model that a refusal must leave alone."""
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        [type(module) for module in model.modules()],
        [getattr(module, "active", None) for module in model.modules()],
    )


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    state, *rest = snapshot(model)
    assert state.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][key]) for key, value in state.items())
    assert rest == list(before[1:])


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model.eval()(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    bound = 1e-5 * max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)

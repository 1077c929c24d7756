"""On a GPU the host never waits for a number within a forward and backward pass: it would leave the GPU idle.

Fake tensors have no values; an operation that asks for one fails. They run with the choices that are made on a GPU.
"""

import sys
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from project import BENCHMARKS
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_map_only

from handtune.engine import LoRAConfig, add_lora
from handtune.engine.data.batches import Collate, to_device
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.masked_lm import MaskedCollate, masked_lm_loss
from handtune.kernels import linear
from handtune.models import GPT2, Bert, Bloom, Llama
from handtune.models.bloom import model as bloom
from handtune.models.layers import inputs

pytest.importorskip("triton")
sys.path.append(str(BENCHMARKS))
from resources import recorded

SIZES = {"n_layer": 2, "d_model": 64, "n_head": 4, "vocab_size": 64}
MODELS = {
    "gpt2": lambda: GPT2.from_name("gpt2", max_positions=64, **SIZES),
    "llama": lambda: Llama.from_name("SmolLM2-135M", n_kv_head=2, d_ff=48, max_positions=64, **SIZES),
    "bloom": lambda: Bloom.from_name("bloom-560m", **SIZES),
    "bert": lambda: Bert.from_name("bert-base-uncased", task="masked-lm", d_ff=64, max_positions=64, **SIZES),
}
ROWS = [
    {"input_ids": [1, 2, 3, 4, 5], "targets": [-100, 3, 4, 5, 6]},
    {"input_ids": [1, 2, 3], "targets": [-100, 3, 4]},
]


def on_gpu(attention_mask: Tensor | None) -> bool:
    """`hides_nothing`, as for a mask on a GPU."""
    return attention_mask is None


def step(family: str, layout: str) -> None:
    """A forward and backward pass with an adapter on everything, of two rows of different length."""
    collate, loss_of = Collate(layout), causal_lm_loss
    if family == "bert":
        collate, loss_of = MaskedCollate(mask_id=5, vocab_size=64), masked_lm_loss
    batch = collate(ROWS)
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorded(90))
        stack.enter_context(mock.patch.object(inputs, "hides_nothing", on_gpu))
        stack.enter_context(mock.patch.object(linear, "seed_for", return_value=7))  # drawn on the host, as it should
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = MODELS[family]().train()
        finally:
            torch.set_default_dtype(torch.float32)
        add_lora(model, LoRAConfig(4, dropout=0.1))
        loss, _ = loss_of(model, tree_map_only(Tensor, mode.from_tensor, batch))
        loss.backward()


# Masked-LM batches are packed; whether Bloom's mask has holes is asked on a CPU alone, which fake tensors are on.
@pytest.mark.parametrize(
    ("family", "layout"), [*((family, "packed") for family in MODELS), ("gpt2", "padded"), ("llama", "padded")]
)
def test_a_step_waits_for_nothing(family: str, layout: str) -> None:
    step(family, layout)


def test_a_planted_wait_is_found(monkeypatch) -> None:
    original = GPT2.hidden

    def waiting(self, *args, **kwargs):
        states = original(self, *args, **kwargs)
        assert states.sum().item() is not None
        return states

    monkeypatch.setattr(GPT2, "hidden", waiting)
    with pytest.raises(DataDependentOutputException):
        step("gpt2", "packed")


def test_a_mask_on_a_gpu_is_not_looked_into() -> None:
    with FakeTensorMode():
        mask = torch.ones(2, 3, dtype=torch.long, device="cuda")
        assert not inputs.hides_nothing(mask)
    assert inputs.hides_nothing(torch.ones(2, 3)) and inputs.hides_nothing(None)
    assert not inputs.hides_nothing(torch.tensor([[1, 0]]))
    assert bloom.key_bias is inputs.key_bias


def test_a_batch_goes_to_a_gpu_from_pinned_memory() -> None:
    """From any other the host would wait until the copy is made."""
    calls = []
    with (
        mock.patch.object(Tensor, "pin_memory", lambda x: calls.append("pinned") or x),
        mock.patch.object(Tensor, "to", lambda x, device, non_blocking: calls.append((device.type, non_blocking))),
    ):
        to_device({"ids": torch.ones(2), "rows": [1, 2]}, torch.device("cuda"))
        to_device(torch.ones(2), torch.device("cpu"))
    assert calls == ["pinned", ("cuda", True), ("cpu", True)]

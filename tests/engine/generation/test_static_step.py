"""Static steps: the operations of one, replayed, write what the model itself writes step by step.

A CUDA graph needs a GPU (tests/kernels/test_cuda.py). Here its part is played by a list of the operations that torch
made in one step, run again on the same tensors: like a graph it knows nothing of the host's numbers.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_adapters import small_gpt2
from small_models import (
    both,
    padded,
    tiny_bloom,
    tiny_gemma2,
    tiny_gemma3,
    tiny_gpt2,
    tiny_llama,
    tiny_olmo,
    tiny_phi3,
    tiny_smollm3,
    token_rows,
)
from small_tokenizers import byte_level
from static_steps import assert_static_is_plain
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from handtune.engine import LoRAConfig, add_lora, freeze, generate, quantize, use_adapter
from handtune.engine.generation import decoding, static_step
from handtune.engine.generation.streaming import Streamer
from handtune.kernels.backend import INTERPRETED
from handtune.models.bloom import model as bloom
from handtune.models.layers import inputs
from handtune.models.layers.kv_cache import KVCache

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a launch of Triton's interpreter is no operation of torch")

ROWS = token_rows((5, 1, 9, 3))
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 10,
        "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0],
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip
FAMILIES = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "bloom": tiny_bloom,
    **{name: partial(tiny_llama, rope_parameters={"rope_theta": 100.0, **rope}) for name, rope in ROPES.items()},
    "gemma2": partial(tiny_gemma2, sliding_window=40),
    "gemma3": partial(tiny_gemma3, sliding_window=40),
    "smollm3": tiny_smollm3,
    "phi3": tiny_phi3,
    "olmo2": tiny_olmo,
    "DoRA": tiny_llama,
    "4 bits": tiny_llama,
}


class Recording(TorchDispatchMode):
    """The operations of a step; refused is what asks for a value, has a size that depends on one, or brings one."""

    aten = torch.ops.aten
    refused = (
        aten._local_scalar_dense.default, aten.lift_fresh.default, aten.nonzero.default, aten.masked_select.default,
        aten._unique2.default, aten.repeat_interleave.Tensor,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is self.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert func not in self.refused and not by_mask, func
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def run(self, result: Tensor) -> None:
        """All of them again; what was `result` then is overwritten."""
        new: dict[int, Tensor] = {}

        def current(x: Tensor) -> Tensor:
            return new.get(id(x), x)

        for func, args, kwargs, out in self.calls:
            args, kwargs = tree_map_only(Tensor, current, (args, kwargs))
            again = func(*args, **kwargs)
            new |= {id(old): x for old, x in zip(tree_leaves(out), tree_leaves(again), strict=True)}
        result.copy_(new[id(result)])


def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Make generation go by static steps, as on a GPU; gives the recordings that it makes."""
    recordings: list[Recording] = []

    def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        owner: static_step.StaticStep = step.__self__
        state = (owner.visible, owner.column, owner.position_ids, owner.cache.buffer)
        before = [x.clone() for x in state]
        with Recording() as recording:
            step()
        for x, value in zip(state, before, strict=True):
            x.copy_(value)  # recording runs nothing on a GPU
        recordings.append(recording)
        return lambda: recording.run(owner.logits)

    # Choices as on a GPU, which isn't asked whether a mask hides anything, nor whether it has holes.
    monkeypatch.setattr(inputs, "hides_nothing", lambda mask: mask is None)
    monkeypatch.setattr(bloom, "may_have_holes", lambda real: True)
    monkeypatch.setattr(static_step, "record", record)
    monkeypatch.setattr(static_step, "GRAPHS", ("cpu",))
    monkeypatch.setattr(static_step, "MIN_REPLAYS", 1)
    monkeypatch.setattr(decoding, "BLOCK", 5)
    return recordings


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 3}, {"seed": 4, "samples": 2}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_texts_by_replayed_steps_are_the_same(monkeypatch, tmp_path, family: str, settings: dict) -> None:
    """Padded prompts, a cache that grows three times, rows that leave."""
    model = both(tmp_path, FAMILIES[family](), "causal-lm")[1]
    batch = padded(ROWS, "left")
    ends = tuple(range(1, 61, 12))
    expected = generate(model, batch["input_ids"], batch["attention_mask"], 20, eos_id=ends, **settings)
    recordings = replayed(monkeypatch)
    found = generate(model, batch["input_ids"], batch["attention_mask"], 20, eos_id=ends, **settings)
    assert len(recordings) >= 2
    assert found.tolist() == expected.tolist()


def test_adapters_row_by_row_are_replayed(monkeypatch) -> None:
    model = small_gpt2(tied=False)
    for name in ("a", "b"):
        add_lora(model, LoRAConfig(rank=2, targets=("attention", "mlp", "embed.tokens")), name)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    ids = torch.randint(1, 50, (6, 3), generator=torch.Generator().manual_seed(0))
    ends = tuple(range(1, 61, 6))
    found = []
    recordings: list[Recording] = []
    for replays in (False, True):
        if replays:
            recordings = replayed(monkeypatch)
        with use_adapter(model, ["a", None, "b", "b", "a", None]):
            found.append(generate(model, ids, None, 20, seed=2, eos_id=ends))
    assert len(recordings) >= 2
    assert found[0].tolist() == found[1].tolist()


def test_a_planted_number_of_the_host_is_found(monkeypatch, tmp_path) -> None:
    """Keys that go where the host counts to would all go to one column."""
    model = both(tmp_path, tiny_llama(), "causal-lm")[1]
    ids = padded(ROWS, "left")["input_ids"]
    expected = generate(model, ids, None, 9, temperature=0)
    replayed(monkeypatch)
    assert torch.equal(generate(model, ids, None, 9, temperature=0), expected)

    append = KVCache.append

    def by_length(self: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self._static is None:
            return append(self, layer, k, v)
        keys, values = self.buffer[layer].transpose(2, 3)
        keys[:, self.length] = k[:, 0]
        values[:, self.length] = v[:, 0]
        return keys[:, : self._static[1]], values[:, : self._static[1]]

    monkeypatch.setattr(KVCache, "append", by_length)
    assert not torch.equal(generate(model, ids, None, 9, temperature=0), expected)


def of_family(family: str, folder: Path) -> Any:
    model = both(folder, FAMILIES[family](), "causal-lm")[1]
    if family.startswith("4 bits"):
        freeze(model, "*")
        quantize(model)
    if family.endswith("DoRA"):
        add_lora(model, LoRAConfig(rank=2, dora=True))
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_replayed_steps_are_those_of_plain_ones(monkeypatch, tmp_path, family, dtype) -> None:
    """Of texts as long as the model's positions allow."""
    model = of_family(family, tmp_path).to(dtype)
    recordings = replayed(monkeypatch)
    text = torch.randint(1, 61, (1, 40), generator=torch.Generator().manual_seed(3))
    assert_static_is_plain(model, text, 2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert len(recordings) > 10


def test_whose_steps_are_static(monkeypatch) -> None:
    assert not static_step.serves(small_gpt2(), 20)  # a CPU has no graphs
    ids = torch.tensor([[3, 4, 5]])
    windowed = small_gpt2(window=12)
    expected = generate(windowed, ids, None, 10, temperature=0)
    recordings = replayed(monkeypatch)
    assert generate(windowed, ids, None, 10, temperature=0).tolist() == expected.tolist()
    assert not recordings
    assert generate(windowed, ids, None, 9, temperature=0).tolist() == expected[:, :12].tolist()
    assert len(recordings) == 2  # the second reaches as far as the window, and no further

    recordings.clear()
    generate(small_gpt2(), ids, None, 9, temperature=0, beams=2)
    assert not recordings
    monkeypatch.setattr(static_step, "MIN_REPLAYS", 4)
    generate(small_gpt2(), ids, None, 4, temperature=0)
    assert not recordings
    generate(small_gpt2(), ids, None, 5, temperature=0)
    assert recordings


@pytest.mark.parametrize("after", range(1, 7))
def test_a_step_that_breaks_off_leaves_the_next_text_right(monkeypatch, after: int) -> None:
    """As by Ctrl-C in a conversation: in some layer of the prompt, of the first step, while it is recorded."""
    model, words = small_gpt2(vocab_size=500), byte_level()
    prompts = [words.encode(text).ids for text in ("a b", "a b c")]
    expected = list(Streamer(model, words, temperature=0).pieces(prompts[1], 12))
    recordings = replayed(monkeypatch)
    streamer = Streamer(model, words, temperature=0)
    append = KVCache.append
    calls = []

    def interrupted(self: KVCache, *args: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return append(self, *args)

    monkeypatch.setattr(KVCache, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(streamer.pieces(prompts[0], 12))
    assert list(streamer.pieces(prompts[1], 12)) == expected
    assert recordings


def test_static_steps_under_autocast(monkeypatch) -> None:
    model = small_gpt2()
    ids = torch.tensor([[3, 4, 5]])
    texts = []
    for replays in (False, True):
        if replays:
            assert replayed(monkeypatch) == []
        with torch.autocast("cpu", torch.bfloat16):
            texts.append(generate(model, ids, None, 12, temperature=0).tolist())
    assert texts[0] == texts[1]


@torch.no_grad()
def test_what_is_not_filled_spoils_nothing(monkeypatch) -> None:
    """Memory that was never written, and what a text left behind that broke off, may hold NaN."""
    model = small_gpt2()
    text = torch.randint(1, 61, (1, 40), generator=torch.Generator().manual_seed(3))
    recordings = replayed(monkeypatch)
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *size: x.new_full(size if len(size) > 1 else size[0], torch.nan)
    )
    assert_static_is_plain(model, text, 1e-5)
    assert recordings

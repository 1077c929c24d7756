"""Loading in 4 bits: bitwise what loading and quantising gives, and never the whole model in full."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import both, tiny_bert, tiny_gpt2, tiny_llama, token_rows
from small_t5 import both_t5
from small_xlnet import both_xlnets

from handtune.engine import LoRAConfig, add_lora, freeze, projections, quantize
from handtune.kernels.quant.nf4 import NF4Weight
from handtune.models import load

FAMILIES: dict[str, Callable[[Path], Any]] = {
    "gpt2": lambda f: both(f, tiny_gpt2(n_embd=32, n_head=4), "causal-lm"),
    "bert": lambda f: both(f, tiny_bert(hidden_size=32, num_attention_heads=4), "sequence-classification"),
    "llama": lambda f: both(f, tiny_llama(hidden_size=32, num_attention_heads=4), "causal-lm"),
    "t5": both_t5,
    "xlnet": both_xlnets,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bitwise_what_quantising_a_loaded_model_gives(family: str, dtype: str, tmp_path: Path) -> None:
    FAMILIES[family](tmp_path)
    slow, _ = load(tmp_path, dtype=dtype, device="cpu")
    freeze(slow, "*")
    paths = quantize(slow)
    model, _ = load(tmp_path, dtype=dtype, device="cpu", quantize=projections)
    assert {n for n, m in model.named_modules() if isinstance(m, NF4Weight)} == {f"{path}.weight" for path in paths}
    own, expected = model.state_dict(), slow.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[key], value) for key, value in expected.items())
    packed = [m for m in model.modules() if isinstance(m, NF4Weight)]
    assert len({id(m.workspace) for m in packed}) == 1
    assert not any(p.requires_grad for m in packed for p in m.parameters())
    ids = torch.tensor(token_rows((7, 7)))
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if family == "t5" else {"input_ids": ids}
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        assert torch.equal(model(**inputs), slow(**inputs))


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    reference, _ = both(tmp_path, tiny_llama(), "causal-lm")
    with torch.no_grad():
        reference.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    reference.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight holds NaN or infinity"):
        load(tmp_path, device="cpu", quantize=projections)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux, whose kernel tells a process's peak")
def test_the_whole_model_is_never_there_in_full(tmp_path: Path) -> None:
    """96 MB of projections in bf16: 4 bits of them, and what packing one takes, beyond a tiny model's."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_key_value_heads": 8}
    code = (
        "import sys; from handtune.engine import projections; from handtune.models import load\n"
        "load(sys.argv[1], device='cpu', quantize=projections)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for name, sizes in (("tiny", {}), ("wide", {**wide, "num_attention_heads": 8})):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(tiny_llama(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path / name)
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        tight = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # without the holes that glibc's heap keeps
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=tight)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    size = (tmp_path / "wide/model.safetensors").stat().st_size / 2**20
    assert size > 95
    assert peaks[1] - peaks[0] < 0.28 * size + 30, (size, peaks)

"""What `load` and `save` take in memory: the model, and a few megabytes.

Measured as the kernel counts it (VmHWM), in a process of its own: memory-mapped pages that were touched count.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from project import HELPERS, ROOT
from safetensors.torch import load_file, save_file

from handtune.models import GPT2, Llama, load, save
from handtune.models.gpt2.config import GPT2Config
from handtune.models.llama.model import LlamaConfig

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.is_file(), reason="needs Linux, whose kernel tells a process's peak")


def resident(field: str) -> int:
    """A field of this process's status in bytes: VmRSS (now) or VmHWM (its peak)."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


def peak_of(call: Any) -> tuple[Any, int]:
    """What `call` gives, and by how much its peak stood over the memory before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident("VmRSS")
    return call(), resident("VmHWM") - before


def measure(folder: str) -> None:
    """Print, as JSON, a model's size and the peaks of load and save as multiples of it: what the tests run aside.

    Of two loads the smaller peak: under pressure from elsewhere the system takes pages of code away, and their coming
    back counts too.
    """
    found = {}
    for name, dtype in (("tiny", "auto"), ("gpt2", "auto"), ("llama", "auto"), ("llama", "float32")):
        peaks = []
        for _ in range(2):
            model = None
            (model, _), peak = peak_of(lambda name=name, dtype=dtype: load(f"{folder}/{name}", None, dtype, "cpu"))
            peaks.append(peak)
        size = sum(parameter.nbytes for parameter in model.parameters())
        _, saving = peak_of(lambda model=model: save(model, None, f"{folder}/again"))
        found[f"{name} {dtype}"] = size, min(peaks) / size, saving / size
    print(json.dumps(found))


def sharded(folder: Path) -> None:
    """Lay the tensors of model.safetensors in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    table = {name: f"model-0000{1 + (2 * i >= len(names))}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(table.values()):
        save_file({name: tensors[name] for name in names if table[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "model.safetensors").unlink()


def store(model: type, config: Any, dtype: torch.dtype, folder: Path) -> None:
    """Save a model of this size, of zeros: its weights are measured, not used."""
    with torch.device("meta"):
        empty = model(config)
    empty = empty.to(dtype).to_empty(device="cpu")
    empty.tie()
    for parameter in empty.parameters():
        parameter.data.zero_()
    save(empty, None, folder)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    small = GPT2Config(n_layer=1, d_model=32, n_head=4, vocab_size=50)  # its load pays for the imports
    store(GPT2, small, torch.float32, folder / "tiny")
    gpt2 = GPT2Config(n_layer=3, d_model=1024, n_head=16, vocab_size=8000)
    store(GPT2, gpt2, torch.float32, folder / "gpt2")
    llama = LlamaConfig(n_layer=4, d_model=1024, n_head=16, n_kv_head=4, d_ff=2816, vocab_size=8000)
    store(Llama, llama, torch.bfloat16, folder / "llama")
    sharded(folder / "llama")
    # A fixed threshold: what is freed goes back to the system at once, and is not measured as free memory later.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(HELPERS))),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    line = f"import test_load_memory as t; t.measure({str(folder)!r})"
    command = [sys.executable, "-c", line]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["gpt2 auto", "llama auto", "llama float32"])
def test_loading_takes_the_memory_of_the_model(peaks, case):
    """Transposed, fused out of two shards, and converted on the way."""
    size, loading, _ = peaks[case]
    assert size > 110e6
    assert 0.9 < loading < 1.05


@pytest.mark.parametrize("case", ["gpt2 auto", "llama auto", "llama float32"])
def test_saving_takes_a_buffer(peaks, case):
    assert peaks[case][2] < 0.05

"""What a process reads of a model in shards: its share, in the memory of that; in four bits also a layer."""

import re
from pathlib import Path

import pytest
import torch
from many_ranks import fork_server, on_ranks
from small_tokenizers import byte_level

from handtune.engine import projections
from handtune.engine.parallel.sharding import Sharding, is_shard
from handtune.models import Llama, load, save

MB = 2**20


@pytest.fixture(scope="module", autouse=True)
def processes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system
        with fork_server():
            yield


def peak(reset: bool = False) -> int:
    """The most bytes of memory that this process had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def loaded_in_shards(folder: str, quantize: bool) -> tuple[int, int, int]:
    """Bytes that loading takes at its peak, those of this process's share, and of the largest layer."""
    sharding = Sharding("full", 0, torch.device("cpu"))
    warm = torch.nn.Linear(8, 8)
    sharding.put(warm)  # what is imported and made at the first call
    before = peak(reset=True)
    model, _ = load(folder, quantize=projections if quantize else None, shard=lambda part, named: sharding.put(part))
    taken = peak() - before
    assert any(map(is_shard, model.layers[0].parameters()))
    tensors = [p.to_local() if is_shard(p) else p for p in model.parameters()]
    layer = sum(tensor.nbytes for tensor in Llama.from_name(*SIZES, **SHAPE, n_layer=1).layers[0].parameters())
    return taken, sum(tensor.nbytes for tensor in tensors), layer


SIZES = ("Llama-2-7B",)
SHAPE = {"vocab_size": 384, "d_model": 512, "n_head": 8, "d_ff": 2048, "max_positions": 64}


@pytest.mark.deep
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_loading_takes_a_share(n, quantize, tmp_path) -> None:
    torch.manual_seed(0)
    model = Llama.from_name(*SIZES, **SHAPE, n_layer=16)
    save(model, byte_level(), tmp_path / "model")
    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert size > 250 * MB
    for taken, share, layer in on_ranks(n, tmp_path / "ranks", loaded_in_shards, str(tmp_path / "model"), quantize):
        assert share < 1.05 * size / n
        if quantize:  # a layer and its shards, and, while it is packed, a projection in fp32 more than once
            assert taken < 1.15 * share + 4.5 * layer + 8 * MB
        else:
            limit = 1.15 * share + largest
            assert taken < limit
            assert n < 4 or size > 3 * limit

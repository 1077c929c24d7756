"""Loaded in shards, every family has the very weights that it has whole, of which each process has read its rows."""

from pathlib import Path

import pytest
import torch
from many_ranks import fork_server, on_ranks
from safetensors.torch import load_file, save_file
from small_methods import base_folder
from small_quantized import quantize_checkpoint, write_plain
from small_tokenizers import byte_level, sentence_piece

from handtune.engine import projections
from handtune.engine.parallel.sharding import Sharding, is_shard
from handtune.models import Bloom, Dinov2, Llama, XLNet, load, save
from handtune.models.tensors import safetensors_io

FAMILIES = ["gpt2", "bert", "t5", "resnet", "llama", "bloom", "xlnet", "dinov2"]


@pytest.fixture(scope="module", autouse=True)
def processes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with fork_server("small_methods"):
            yield


def checkpoint(family: str, folder: Path) -> Path:
    """A tiny random checkpoint, of sizes that several processes can't halve."""
    torch.manual_seed(0)
    small = {"vocab_size": 385, "n_layer": 2, "d_model": 24, "n_head": 3}
    if family == "llama":
        save(Llama.from_name("Llama-2-7B", **small, d_ff=40, max_positions=64), byte_level(), folder / family)
    elif family == "fp8":
        write_plain(folder / "plain")
        return quantize_checkpoint(folder / "plain", folder / family, family)
    elif family == "bloom":
        save(Bloom.from_name("bloom-560m", **small), byte_level(), folder / family)
    elif family == "dinov2":  # with gates that are fused in the file
        sizes = {"n_layer": 2, "d_model": 24, "n_head": 3, "image_size": 28}
        save(Dinov2.from_name("dinov2-giant", **sizes), None, folder / family)
    elif family == "xlnet":
        words = sentence_piece()
        sizes = {**small, "vocab_size": words.get_vocab_size(), "d_ff": 40}
        save(XLNet.from_name("xlnet-base-cased", **sizes), words, folder / family)
    else:
        folder.mkdir()
        return base_folder(family, folder)
    return folder / family


def weights(folder: str, dtype: str, quantize: bool, in_shards: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    """A model's weights, put together; how many are in shards; and the bytes that this process has read."""
    read = 0
    read_bytes = safetensors_io._read

    def counted(file, stored, target):
        nonlocal read
        read += target.nbytes
        read_bytes(file, stored, target)

    sharding = Sharding("full" if in_shards else "none", 0, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "_read", counted)
        model, _ = load(
            folder, dtype=dtype, quantize=projections if quantize else None,
            shard=(lambda part, named: sharding.put(part)) if in_shards else None,
        )  # fmt: skip
    table = dict(model.named_parameters()) | dict(model.named_buffers())
    n_shards = sum(map(is_shard, table.values()))
    return {name: (t.full_tensor() if is_shard(t) else t).detach() for name, t in table.items()}, n_shards, read


QUICK = [("llama", "auto", False)]
CASES = [
    *((family, "auto", False) for family in FAMILIES if family != "llama"),
    ("gpt2", "bfloat16", False), ("llama", "bfloat16", False), ("llama", "auto", True),
    ("fp8", "auto", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "dtype", "quantize"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.deep) for case in CASES)]
)
def test_the_weights_are_the_same(family, dtype, quantize, tmp_path) -> None:
    folder = str(checkpoint(family, tmp_path / "base"))
    whole, n_shards, bytes_read = weights(folder, dtype, quantize, in_shards=False)
    assert n_shards == 0
    share = []
    for ours, n_shards, read in on_ranks(3, tmp_path / "ranks", weights, folder, dtype, quantize, True):
        assert n_shards > 5
        assert ours.keys() == whole.keys()
        assert all(ours[name].dtype == whole[name].dtype for name in whole)
        assert all(torch.equal(ours[name], whole[name]) for name in whole)
        share.append(read / bytes_read)
    # Rows that don't lie together, and what is coded or packed into four bits, are read by all.
    if family in ("llama", "bert", "t5") and not quantize:
        assert max(share) < 0.5


def loads(folder: str) -> str:
    sharding = Sharding("full", 0, torch.device("cpu"))
    try:
        load(folder, shard=lambda part, named: sharding.put(part))
    except ValueError as error:
        return str(error)
    return "as it should"


@pytest.mark.deep
def test_a_copy_of_the_tied_matrix_is_compared(tmp_path) -> None:
    """Each process compares its rows; where one differs, the process that has it says so."""
    folder = checkpoint("gpt2", tmp_path / "base")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = next(name for name in tensors if name.endswith("wte.weight"))
    tensors["lm_head.weight"] = tensors[embedding].clone()
    save_file(tensors, file)
    assert on_ranks(3, tmp_path / "same", loads, str(folder)) == ["as it should"] * 3

    tensors["lm_head.weight"][-1, 0] += 1
    save_file(tensors, file)
    said = on_ranks(3, tmp_path / "other", loads, str(folder))
    assert said[:2] == ["as it should"] * 2
    assert "lm_head.weight is not the token embedding" in said[2]

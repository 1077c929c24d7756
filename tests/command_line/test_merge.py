"""`handtune merge` writes, tensor by tensor, what loading, merging and saving writes; in little memory; in shards."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_adapters import shaken
from small_kills import killed_everywhere
from small_models import both, tiny_bert, tiny_bloom, tiny_gpt2, tiny_llama
from small_resnets import both_resnets
from small_t5 import both_t5
from small_tokenizers import byte_level
from small_vits import both_vits
from small_xlnet import both_xlnets

from handtune._folders import stored_files
from handtune.adapted.run_models import merge_model as merge
from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter, train_rows, unfreeze
from handtune.models import add_tokens, load, save
from handtune.models.tensors.safetensors_io import read_header

FAMILIES: dict[str, tuple[Callable[[Path], Any], str | None, dict[str, Any], tuple[str, ...]]] = {
    "gpt2": (lambda f: both(f, tiny_gpt2(), "causal-lm"), None, {"targets": ["c_attn", "c_fc", "wpe"]}, ("*norm1*",)),
    "gpt2 with a new head": (
        lambda f: both(f, tiny_gpt2(), "causal-lm"), "sequence-classification", {}, ("head.*",),
    ),
    "bert": (lambda f: both(f, tiny_bert(), "masked-lm"), None, {"targets": ["query", "output.dense"]}, ()),
    "bloom, DoRA": (lambda f: both(f, tiny_bloom(), "causal-lm"), None, {"dora": True}, ()),
    "llama that trained under its adapter": (lambda f: both(f, tiny_llama(), "causal-lm"), None, {}, ("layers.0.*",)),
    "bloom that trained under its adapter": (
        lambda f: both(f, tiny_bloom(), "causal-lm"), None, {"targets": ["query_key_value"]}, ("layers.0.qkv.weight",),
    ),
    "xlnet that trained under its adapter": (both_xlnets, None, {}, ("layers.0.o.weight",)),
    "llama": (lambda f: both(f, tiny_llama(), "causal-lm"), None, {"targets": ["q_proj", "v_proj", "up_proj"]}, ()),
    "t5": (both_t5, None, {}, ()),
    "xlnet": (both_xlnets, None, {}, ()),
    "resnet": (both_resnets, None, {"targets": ["convolution"]}, ("*norm*",)),
    "vit": (both_vits, None, {"targets": ["q_proj", "mlp"]}, ("*norm1*",)),
    "dinov2": (
        lambda f: both_vits(f, "dinov2", use_swiglu_ffn=True), None, {"targets": ["up_proj", "o"]}, ("*.scale1",),
    ),
}  # fmt: skip


def adapted(folder: Path, family: str) -> Any:
    """A base and an adapter in `folder`; gives what load, merge and save make of them."""
    make, task, settings, unfrozen = FAMILIES[family]
    make(folder / "base")
    labels = ["x", "y", "z"] if task else None
    model = load(folder / "base", task, labels=labels, device="cpu")[0]
    add_lora(model, LoRAConfig(rank=2, **settings))
    if unfrozen:
        unfreeze(model, *unfrozen)
    save_adapter(shaken(model), folder / "adapter")
    whole, words = load(folder / "base", task, labels=3 if task else None, device="cpu")
    load_adapter(whole, folder / "adapter")
    merge_lora(whole, keep_base=False)
    save(whole, words, folder / "expected")
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_are_those_of_loading_merging_and_saving(family: str, tmp_path: Path) -> None:
    adapted(tmp_path, family)
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        if name.endswith(".safetensors"):
            ours, expected = load_file(tmp_path / "out" / name), load_file(tmp_path / "expected" / name)
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                assert ours[key].dtype == value.dtype
                assert torch.equal(ours[key], value), key
        else:
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_shards_stay_shards(tmp_path: Path) -> None:
    whole = adapted(tmp_path, "llama")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert main(["merge", str(tmp_path / "sharded"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 2
    assert set(index["weight_map"].values()) == files
    headers = {file: read_header(tmp_path / "out" / file) for file in files}
    assert index["metadata"]["total_size"] == sum(one.nbytes for header in headers.values() for one in header.values())
    assert all(name in headers[file] for name, file in index["weight_map"].items())
    again = load(tmp_path / "out", device="cpu")[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(again(ids), whole(ids))
    torch.testing.assert_close(theirs(ids).logits, whole(ids), rtol=0, atol=1e-4)


def test_what_survives_is_the_same_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms and a head are counted with the factors, be the adapter merged file to file or in memory."""
    reference, _ = both(tmp_path / "wide", tiny_llama(vocab_size=300, tie_word_embeddings=False), "causal-lm")
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_level().save(str(tmp_path / "base/tokenizer.json"))
    model = load(tmp_path / "wide", device="cpu")[0]
    add_lora(model, LoRAConfig(rank=2, targets=["down_proj"]))
    unfreeze(model, "head.*", "*norm*")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.001 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "adapter")
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter")]
    reports = []
    for name in ("streamed", "in memory"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("handtune.adapted.merging.added_tokens", lambda *_, name=name: name == "in memory")
            assert main([*command, str(tmp_path / name)]) == 0
        reports.append(capsys.readouterr().err)
    assert "survives in bfloat16" in reports[0]
    assert reports[0] == reports[1]


def test_the_dtype_of_the_base_stays(tmp_path: Path) -> None:
    """fp16 is not widened on its way through the CPU; the correction is added in fp32 and rounded once."""
    reference, _ = both(tmp_path / "wide", tiny_llama(), "causal-lm")
    reference.to(torch.float16).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "wide", device="cpu")[0]
    add_lora(model, LoRAConfig(rank=2, targets=["down_proj"]))
    save_adapter(shaken(model), tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    base, out = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"
    for key, value in out.items():
        assert value.dtype == torch.float16
        if "down_proj" in key:
            a, b = (factors[f"base_model.model.{key.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
            scale = 32.0 / 2
            torch.testing.assert_close(value, (base[key].float() + scale * (b @ a)).half(), rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(value, base[key])


def test_it_takes_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    """A base of 120 MB, whose largest adapted tensor has 4 MB: at most 30 MB beyond a merge of a tiny one."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_key_value_heads": 8}
    peaks = []
    for name, sizes in (("tiny", {"num_hidden_layers": 1}), ("wide", {**wide, "num_attention_heads": 8})):
        folder = tmp_path / name
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(tiny_llama(**sizes)).save_pretrained(folder / "base")
        model = load(folder / "base", device="cpu")[0]
        add_lora(model, LoRAConfig(rank=16))
        save_adapter(model, folder / "adapter")
        code = (
            "import sys; from handtune.cli import main; assert main(sys.argv[1:]) == 0\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        command = [sys.executable, "-c", code, "merge", *(str(folder / part) for part in ("base", "adapter", "out"))]
        tight = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # without the holes that glibc's heap keeps
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=tight)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert (tmp_path / "wide/base/model.safetensors").stat().st_size > 120e6
    assert peaks[1] - peaks[0] < 30, peaks


def test_what_is_refused_leaves_nothing(tmp_path: Path, capsys) -> None:
    adapted(tmp_path, "gpt2")
    other = tmp_path / "other"
    both(other, tiny_gpt2(n_embd=36), "causal-lm")
    assert main(["merge", str(other), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert "it is for another base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_merge_that_is_broken_off_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    """A full disk, Ctrl-C; what a killed one left is no obstacle to the next."""
    adapted(tmp_path, "llama")
    left = tmp_path / "out/.new.4000000-12345678.tmp/new"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("handtune.adapted.merging.save_around", full)
        assert main(command) == 2
    assert not any((tmp_path / "out").iterdir())
    assert main(command) == 0
    assert load(tmp_path / "out", device="cpu")


def test_a_matrix_stored_beside_its_factors(tmp_path: Path) -> None:
    """PEFT stores an adapted head or embedding whole, as base_layer: it is what the factors are added to."""
    reference, _ = both(tmp_path / "base", tiny_llama(tie_word_embeddings=False), "causal-lm")
    targets = ["lm_head", "embed_tokens", "q_proj"]
    reference = shaken(peft.get_peft_model(reference, peft.LoraConfig(r=3, target_modules=targets)))
    reference.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    ids = torch.arange(1, 9)[None]
    expected = reference(ids).logits
    torch.testing.assert_close(load(tmp_path / "out", device="cpu")[0](ids), expected, rtol=0, atol=1e-4)


def test_a_copy_of_the_tokenizer_changes_nothing(tmp_path: Path) -> None:
    """Trainers store it with adapters; only one with more tokens takes the model in memory, and no dtype widens."""
    reference, _ = both(tmp_path / "wide", tiny_gpt2(vocab_size=300), "causal-lm")
    reference.to(torch.float16).save_pretrained(tmp_path / "base", max_shard_size="10KB")
    byte_level().save(str(tmp_path / "base/tokenizer.json"))
    model, words = load(tmp_path / "base", device="cpu")
    add_lora(model, LoRAConfig(rank=2))
    save_adapter(shaken(model), tmp_path / "adapter")
    byte_level().save(str(tmp_path / "adapter/tokenizer.json"))
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model, words = load(tmp_path / "base", device="cpu")
    add_tokens(model, words, ["<new>"])
    add_lora(model, LoRAConfig(rank=2))
    train_rows(model, [words.token_to_id("<new>")])
    save_adapter(shaken(model), tmp_path / "grown")
    words.save(str(tmp_path / "grown/tokenizer.json"))
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "grown"), str(tmp_path / "more")]) == 0
    stored = load_file(tmp_path / "more/model.safetensors")
    assert len(stored["transformer.wte.weight"]) > words.token_to_id("<new>")
    assert {value.dtype for value in stored.values()} == {torch.float16}


def test_out_may_be_there_and_what_lies_beside_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(tmp_path, "gpt2")
    for name in ("mine.tmp", "mounted", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.tmp/precious").write_text("x")
    (tmp_path / "mounted/.new.4000000-12345678.tmp").mkdir()
    (tmp_path / "mounted/.new.4000000-12345678.tmp/half").write_text("of a merge that was killed")
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "mounted")
    for out in (tmp_path / "mine", ".", tmp_path / "link"):
        assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(out)]) == 0
        assert {path.name for path in Path(out).iterdir()} >= {"config.json", "model.safetensors"}
        assert not list(Path(out).glob(".*"))
    assert (tmp_path / "mine.tmp/precious").read_text() == "x"
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "link")]) == 2


@pytest.mark.deep
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_merge_that_is_killed_anywhere_can_be_started_again(family: str, tmp_path: Path) -> None:
    """Also between the files that move up; one that was whole already is refused, and stays."""
    adapted(tmp_path, family)
    again, out = tmp_path / "again", tmp_path / "out"
    base, adapter = str(tmp_path / "base"), tmp_path / "adapter"
    merge(base, adapter, again)
    whole = {path.name: path.read_bytes() for path in again.iterdir()}
    refusals = []

    def check(n: int) -> None:
        try:
            merge(base, adapter, out)
        except ValueError as error:
            refusals.append(str(error))
        assert {path.name: path.read_bytes() for path in stored_files(out)} == whole
        shutil.rmtree(out)

    assert killed_everywhere(lambda: merge(base, adapter, out), check) > 20
    assert len(refusals) < 5
    assert all("holds something already" in says for says in refusals)


def test_a_merge_that_was_killed_while_files_moved_is_started_again(tmp_path: Path) -> None:
    """Of what it has left under names of its own nothing stays; a file that it did not put there is never touched."""
    adapted(tmp_path, "gpt2")
    out, base, adapter = tmp_path / "out", str(tmp_path / "base"), tmp_path / "adapter"
    left = out / ".new.4000000-12345678.tmp"
    left.mkdir(parents=True)
    (left / "files.json").write_text('["model-00001-of-00002.safetensors", "config.json"]')
    (out / "model-00001-of-00002.safetensors").write_bytes(b"moved up")
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="out holds something already"):
        merge(base, adapter, out)
    assert {path.name for path in out.iterdir()} == {left.name, "model-00001-of-00002.safetensors", "thesis.tex"}
    (out / "thesis.tex").unlink()
    merge(base, adapter, out)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "generation_config.json"}

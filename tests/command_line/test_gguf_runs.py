"""A GGUF file as the base of a run: trained on, recognised, asked, merged into a plain checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_commands import run_command
from small_gguf import write_gguf
from small_models import theirs, tiny_llama
from small_runs import CHAT, write_config, write_rows
from small_tokenizers import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer

from handtune.cli import main
from handtune.models import load
from handtune.saved_runs import put_adapter


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A quantised base in a folder of its own, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "base").mkdir()
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128}
    model = theirs(tiny_llama(vocab_size=byte_level().get_vocab_size(), **sizes), "causal-lm")
    base = write_gguf(folder / "base" / "model.gguf", model, byte_level(), "Q8_0")
    rows = str(write_rows(folder / "rows.jsonl", CHAT))
    write_config(
        folder / "run.toml", method="sft", out=str(folder / "run"), model={"path": str(base), "dtype": "float32"},
        data={"train": rows, "max_length": 96}, lora={"rank": 2}, train={"epochs": 2, "batch_size": 2, "lr": 0.01},
    )  # fmt: skip
    assert main(["train", str(folder / "run.toml")]) == 0
    return folder


def test_the_same_command_finds_the_run_finished_and_refuses_a_changed_base(workshop, tmp_path, capsys):
    folder = shutil.copytree(workshop, tmp_path / "moved")
    config = (folder / "run.toml").read_text().replace(str(workshop), str(folder))
    (folder / "run.toml").write_text(config)
    run_command("train", folder / "run.toml")
    entry = json.loads((folder / "run" / "run.json").read_text())["inputs"]["model.path"][0]
    assert entry["path"].endswith("base/model.gguf") and list(entry["files"]) == [""]

    # The folder that holds the file leads to the same contents; one other byte is another base.
    run_command("train", folder / "run.toml", f"model.path={folder / 'base'}")
    base = folder / "base" / "model.gguf"
    base.write_bytes(base.read_bytes()[:-1] + b"\x01")
    capsys.readouterr()
    assert main(["train", str(folder / "run.toml")]) == 2
    assert "model.path" in capsys.readouterr().err


def test_the_adapter_and_what_is_merged_write_the_same_text(workshop, tmp_path, capsys):
    run_command("merge", workshop / "base" / "model.gguf", workshop / "run" / "adapter", tmp_path / "merged")
    texts = []
    for model in ([workshop / "run"], [tmp_path / "merged", "--dtype", "float32"]):
        capsys.readouterr()
        run_command("generate", *model, "--prompt", CHAT[0]["prompt"], "--temperature", 0, "--max-new-tokens", 12)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()

    # What is merged is a plain checkpoint: transformers computes what the base computes with the adapter.
    model, tokenizer = load(workshop / "base" / "model.gguf", dtype="float32", device="cpu")
    put_adapter(model, tokenizer, workshop / "run" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([tokenizer.encode(CHAT[0]["prompt"]).ids])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(CHAT[0]["prompt"])["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}


def test_check_data_and_other_tasks_work_on_it(workshop, tmp_path, capsys):
    run_command("check-data", workshop / "run.toml")
    model, _ = load(workshop / "base", "sequence-classification", labels=3, device="cpu")
    assert model.head_is_new and model(torch.tensor([[5, 6]])).shape == (1, 3)

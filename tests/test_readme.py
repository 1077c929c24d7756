"""The example of three calls in README.md, as it stands there, on checkpoints whose tokenizers have no pad token."""

import json
import re
from pathlib import Path

import pytest
import torch
from project import ROOT
from small_models import CLASSES, tiny_gpt2, tiny_llama
from small_tokenizers import byte_level, sentence_piece
from transformers import PreTrainedTokenizerFast

README = ROOT / "README.md"
TEXTS = ["the cat sat on the mat", "good morning", "who wrote the book?"] * 4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_three_calls(family, tmp_path, monkeypatch) -> None:
    """GPT-2's byte-level tokens and projections of its own kind; Llama's tokens, with a beginning of each text."""
    words, end = (byte_level(), "<|end|>") if family == "gpt2" else (sentence_piece(), "</s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=end, eos_token=end, model_input_names=["input_ids", "attention_mask"]
    )
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(tmp_path / "base")
    config = (tiny_gpt2 if family == "gpt2" else tiny_llama)(vocab_size=words.get_vocab_size(), pad_token_id=None)
    torch.manual_seed(0)
    CLASSES[family, "causal-lm"](config).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)

    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    scope = {"path": str(tmp_path / "base"), "texts": TEXTS}
    exec(compile(code, str(README), "exec"), scope)

    assert scope["result"].steps == 2
    targets = [json.loads(line)["targets"] for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert sum(targets) == sum(len(scope["tokenizer"](text)["input_ids"]) - 1 for text in TEXTS)
    assert json.loads(Path("my-adapter/adapter_config.json").read_text())["r"] == 16

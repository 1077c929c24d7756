"""A model whose vocabulary is its tokenizer's, both of which may be added to."""

from pathlib import Path
from typing import Any

from small_models import theirs, tiny_bert, tiny_gpt2, tiny_llama
from small_tokenizers import byte_level, word_piece
from tokenizers import Tokenizer

from handtune.models import load

SIZE = len(byte_level().get_vocab())
NEW = ["<|tool|>", "<|end_of_tool|>"]


def words(kind: str = "gpt2") -> Tokenizer:
    """A tokenizer that may be added to."""
    return Tokenizer.from_str((word_piece() if kind == "bert" else byte_level()).to_str())


def model_of(folder: Path, kind: str = "gpt2", task: str | None = None, dtype: str = "auto", **sizes: Any) -> Any:
    configs: dict[str, Any] = {"gpt2": tiny_gpt2, "llama": tiny_llama, "bert": tiny_bert}
    vocabulary = len(words(kind).get_vocab())
    task = task or ("masked-lm" if kind == "bert" else "causal-lm")
    theirs(configs[kind](**{"vocab_size": vocabulary, **sizes}), task).save_pretrained(folder)
    return load(folder, task, dtype, "cpu")[0]

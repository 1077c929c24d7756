"""What special tokens are called: the files of a tokenizer name the text that ends a sequence, pads it, masks a word.

tokenizer_config.json names them. Where it doesn't list the added tokens (`added_tokens_decoder`), as old ones don't,
special_tokens_map.json goes before it. What neither of them mentions is called as the tokenizer's class in transformers
calls it, and null means that there is no such token.
"""

from pathlib import Path
from typing import Any

from ..._files import json_if_there

SETTINGS = "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What transformers' classes call their special tokens, and the class of an architecture whose folder names none.
CLASS_NAMES = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "BertTokenizer": {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "XLNetTokenizer": {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "<sep>", "pad_token": "<pad>",
        "cls_token": "<cls>", "mask_token": "<mask>",
    },
}  # fmt: skip
CLASSES = {
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "bert": "BertTokenizer",
    "t5": "T5Tokenizer",
    "xlnet": "XLNetTokenizer",
}


def with_map(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and over it special_tokens_map.json where that counts. ValueError for a damaged file."""
    listed = "added_tokens_decoder" in settings
    return settings if listed else {**settings, **json_if_there(folder / "special_tokens_map.json")}


def tokenizer_class(settings: dict[str, Any], config: dict[str, Any]) -> str:
    """The class of the tokenizer without "Fast": as named, or as usual for the architecture of config.json."""
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    return str(name or CLASSES.get(str(config.get("model_type")), "nameless tokenizer")).removesuffix("Fast")


def special_names(settings: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name, `{"eos_token": "</s>", ...}`, as chat templates may use them.

    `settings` as from `with_map`, `config`: config.json, where there is one.
    """
    more = settings.get("extra_special_tokens")
    named = {
        **CLASS_NAMES.get(tokenizer_class(settings, config), {}),
        **settings,
        **(more if isinstance(more, dict) else {}),
    }
    return {
        name: token_text(entry)
        for name, entry in named.items()
        if name.endswith("_token") and isinstance(entry, str | dict) and entry
    }


def token_text(entry: Any) -> str:
    """The text of a token, which these files write as such or in a table of its properties."""
    return str(entry["content"]) if isinstance(entry, dict) else str(entry)

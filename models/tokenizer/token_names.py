"""The names of special tokens: the files of a tokenizer say which text ends a sequence, pads it, or masks a word.

tokenizer_config.json names them. Where it doesn't list the added tokens (`added_tokens_decoder`), as old ones don't,
special_tokens_map.json takes precedence. A token that neither of them mentions has the name that the tokenizer's class
in transformers gives it, and null means that there is no such token.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ..._files import json_if_there
from ..._outside import located
from ..._shapes import shown, with_fields

SETTINGS = "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FAIRSEQ = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
    "cls_token": "<s>", "mask_token": "<mask>",
}  # fmt: skip
# What transformers' classes call their special tokens.
CLASS_NAMES = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "BertTokenizer": {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")},
    "MPNetTokenizer": _FAIRSEQ | {"unk_token": "[UNK]"},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "RobertaTokenizer": _FAIRSEQ,
    "XLMRobertaTokenizer": _FAIRSEQ,
    "CamembertTokenizer": _FAIRSEQ,
    "XLNetTokenizer": {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "<sep>", "pad_token": "<pad>",
        "cls_token": "<cls>", "mask_token": "<mask>",
    },
}  # fmt: skip
# The class of an architecture's tokenizer, where the folder names none.
CLASSES = {
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "t5": "T5Tokenizer",
    "xlnet": "XLNetTokenizer",
}


class TokenizerSettings(NamedTuple):
    """How the files of a tokenizer describe it."""

    stored: dict[str, Any]  # tokenizer_config.json
    merged: dict[str, Any]  # the same with special_tokens_map.json over it, where that takes precedence
    class_name: str  # without "Fast": as named in the files, or as usual for the architecture
    special: dict[str, Any]  # special tokens by name, the usual ones first, each as `token_text` takes it
    names: dict[str, str]  # their texts, {"eos_token": "</s>", ...}, as chat templates may use them


def read_settings(folder: Path, config: dict[str, Any]) -> TokenizerSettings:
    """The settings in `folder`, whose config.json holds `config`. ValueError for a damaged file."""
    path = folder / SETTINGS
    lists = {"additional_special_tokens": list | None, "extra_special_tokens": list | dict | None}
    stored = with_fields(
        json_if_there(path),
        path,
        added_tokens_decoder=dict | None,
        chat_template=str | list | None,
        strip_accents=bool | None,
        **lists,
    )
    merged = stored
    if "added_tokens_decoder" not in stored:
        map_path = folder / "special_tokens_map.json"
        merged = {**stored, **with_fields(json_if_there(map_path), map_path, **lists)}

    usual = CLASSES.get(str(config.get("model_type")), "nameless tokenizer")
    class_name = str(merged.get("tokenizer_class") or config.get("tokenizer_class") or usual).removesuffix("Fast")

    entries = {**dict.fromkeys(NAMES), **CLASS_NAMES.get(class_name, {}), **merged}
    extra = merged.get("extra_special_tokens")
    if isinstance(extra, dict):  # in old files it is a list of texts without names
        entries |= extra
    named = {name: entry for name, entry in entries.items() if name.endswith("_token")}
    # Others that end so may be switches, as add_bos_token is.
    special = {name: entry for name, entry in named.items() if entry and (name in NAMES or type(entry) in (str, dict))}
    with located(path):
        names = {name: token_text(entry) for name, entry in special.items()}
    return TokenizerSettings(stored, merged, class_name, special, names)


def token_text(entry: Any) -> str:
    """The text of a token, which these files hold as it is or in a table of the token's properties."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ValueError(f"{shown(entry)} is no token, which is a text or has one as content; restore the file")
    return text

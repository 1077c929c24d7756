"""Special tokens and chat template of a checkpoint, and its tokenizer."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .shards import read_json
from .vocabulary import build_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class SpecialTokens:
    """What a checkpoint says of its special tokens: ids where they are known, the chat template, the raw settings."""

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> "SpecialTokens":
        """From config.json's ids and tokenizer_config.json; a separate chat_template.jinja goes first."""
        path, settings = folder / "tokenizer_config.json", {}
        if path.is_file():
            settings = read_json(path)
        template = settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        eos = config.get("eos_token_id")
        return cls(
            config.get("bos_token_id"),
            next(iter(eos), None) if isinstance(eos, list) else eos,
            config.get("pad_token_id"),
            template,
            {key: value for key, value in settings.items() if key != "chat_template"},
        )

    def to_config(self) -> dict[str, Any]:
        """The ids as config.json names them."""
        ids = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id, "pad_token_id": self.pad_id}
        return {key: value for key, value in ids.items() if value is not None}


def load_tokenizer(folder: Path) -> "Tokenizer | None":
    """The folder's tokenizer, its tokenizer.json or what its vocabulary files describe; None where there is neither."""
    path = folder / "tokenizer.json"
    return load_tokenizer_file(path) if path.is_file() else build_tokenizer(folder)


def load_tokenizer_file(path: Path) -> "Tokenizer":
    """A tokenizer.json without its stored padding and truncation. FileNotFoundError or ValueError if it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise ValueError(f"{path}: not a tokenizer file ({error}); restore it") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer | None", tokens: SpecialTokens, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, each where there is something to write."""
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    if tokens.settings:
        text = json.dumps(tokens.settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if tokens.chat_template:
        (folder / "chat_template.jinja").write_text(tokens.chat_template, encoding="utf-8")

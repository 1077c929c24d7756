"""Special tokens and chat templates of a checkpoint, its tokenizer, and the files beside it.

Which token ends a text is said twice, in config.json and in generation_config.json, and may be several: of Llama 3's
chat models, <|end_of_text|>, <|eom_id|> and <|eot_id|>. The first one of config.json ends texts in training, and each
of all ends what the model writes. Some old configurations say -1 where they mean that there is no such token.

What else lies there for a tokenizer is kept as it is and written again, so that transformers makes of the saved folder
the tokenizer that it makes of the first: special_tokens_map.json and added_tokens.json, which it reads where
tokenizer_config.json doesn't list the added tokens, further chat templates, and the vocabulary files that its slow
tokenizers want.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .shards import read_json, write_json, write_text
from .vocabulary import build_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GENERATION = "generation_config.json"
SENTENCES = ("sentence_bert_config.json", "config_sentence_transformers.json")  # longest text, prompts
KEPT = ("special_tokens_map.json", "added_tokens.json", GENERATION, *SENTENCES)
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "*.model")
TEMPLATES = "additional_chat_templates"  # where transformers puts all but the default one


@dataclass(frozen=True)
class SpecialTokens:
    """What a checkpoint says of its special tokens: ids where they are known, the chat template, the raw settings.

    `eos_id` ends a text, `more_ends` are further tokens that do. `files`: what is kept as it is, by name. `skipped_id`
    is the pad id in front of which transformers' classifiers look for the last token of a text: config.json's.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    more_ends: tuple[int, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    skipped_id: int | None = None

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> "SpecialTokens":
        """From config.json and generation_config.json, tokenizer_config.json and what lies beside them.

        A separate chat_template.jinja goes before the one in tokenizer_config.json. Raises ValueError for a damaged
        file, and for ids that are none.
        """
        generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
        found = {
            name: dict.fromkeys(
                [*_ids(config, name, folder / "config.json"), *_ids(generation, name, folder / GENERATION)]
            )
            for name in ("bos", "eos", "pad")
        }
        bos, eos, pad = (next(iter(ids), None) for ids in found.values())
        path, settings = folder / "tokenizer_config.json", {}
        if path.is_file():
            settings = read_json(path)
        templates = _templates(folder, settings.get("chat_template"))
        settings = {key: value for key, value in settings.items() if key != "chat_template"}
        template = templates.pop("default", None)
        named = {f"{TEMPLATES}/{name}.jinja": text.encode() for name, text in templates.items()}
        skipped = next(iter(_ids(config, "pad", folder / "config.json")), None)
        return cls(bos, eos, pad, template, settings, tuple(found["eos"])[1:], {**_kept(folder), **named}, skipped)

    @property
    def ends(self) -> tuple[int, ...]:
        """Every token that ends what the model writes."""
        return self.more_ends if self.eos_id is None else (self.eos_id, *self.more_ends)

    def to_config(self) -> dict[str, Any]:
        """The ids as config.json names them; several end tokens are a list."""
        eos = list(self.ends) if self.more_ends else self.eos_id
        ids = {"bos_token_id": self.bos_id, "eos_token_id": eos, "pad_token_id": self.pad_id}
        return {key: value for key, value in ids.items() if value is not None}


def _ids(config: dict[str, Any], name: str, path: Path) -> list[int]:
    """The ids of a special token, one or several; below zero there is none. ValueError for what is no id."""
    value = config.get(f"{name}_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(number) is not int for number in ids):
        raise ValueError(f"{path}: {name}_token_id = {value!r}: expected a token's id, or a list of ids")
    return [number for number in ids if number >= 0]


def _templates(folder: Path, stored: Any) -> dict[str, str]:
    """Chat templates by name; `stored` is what tokenizer_config.json has: one, or a list of several."""
    found = {} if stored is None else {"default": stored}
    if isinstance(stored, list):
        found = {str(entry["name"]): str(entry["template"]) for entry in stored}
    if unfit := [name for name in found if Path(name).name != name]:
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template {unfit[0]!r} can't be a file's name")
    paths = [*folder.glob("chat_template.jinja"), *sorted((folder / TEMPLATES).glob("*.jinja"))]
    for path in paths:
        name = "default" if path.parent == folder else path.stem
        found[name] = path.read_text(encoding="utf-8")
    return found


def _kept(folder: Path) -> dict[str, bytes]:
    """The files that are written again as they are."""
    paths = [path for name in (*KEPT, *VOCABULARIES) for path in sorted(folder.glob(name))]
    return {path.name: path.read_bytes() for path in paths}


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
    """Write tokenizer.json, tokenizer_config.json, chat templates and what was kept, where there is something to write.

    Vocabulary files go with a tokenizer: without its tokenizer.json they would be taken for one to be built from them.
    """
    if tokenizer is not None:
        write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    if tokens.settings:
        write_json(folder / "tokenizer_config.json", tokens.settings)
    if tokens.chat_template:
        write_text(folder / "chat_template.jinja", tokens.chat_template)
    for name, contents in tokens.files.items():
        if tokenizer is not None or not any(fnmatchcase(name, pattern) for pattern in VOCABULARIES):
            (folder / name).parent.mkdir(exist_ok=True)
            write_text(folder / name, contents)

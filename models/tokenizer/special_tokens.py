"""Special tokens and chat templates of a checkpoint, its tokenizer, and the files beside it.

Here, and nowhere else, it is decided which tokens begin, end and pad a text. The files may disagree, and then it is as
in transformers, whose Trainer aligns a model with its tokenizer:

    end     the tokenizer's `eos_token` ends texts in training. What the model writes ends with it and with each
            `eos_token_id` of generation_config.json and config.json (of Llama 3's chat models there are three)
    begin   the tokenizer's `bos_token`, else config.json's id. Whether a text gets one is up to the tokenizer
    pad     the tokenizer's `pad_token`, else config.json's id

A tokenizer whose token the model doesn't know of is said in one line. Some old configurations say -1 where they mean
that there is no such token. How tokenizers name their tokens: token_names.py.

What else lies there for a tokenizer is kept as it is and written again, so that transformers makes of the saved folder
the tokenizer that it makes of the first: special_tokens_map.json and added_tokens.json, which it reads where
tokenizer_config.json doesn't list the added tokens, further chat templates, and the vocabulary files that its slow
tokenizers want.
"""

import logging
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._files import json_if_there, read_bytes, read_text, require_file, write_file, write_json
from ..._outside import others_code
from ..._shapes import shown, with_fields
from .build import build_tokenizer
from .token_names import SETTINGS, TokenizerSettings, read_settings, special_names

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("handtune")

GENERATION = "generation_config.json"
SENTENCES = ("sentence_bert_config.json", "config_sentence_transformers.json")  # longest text, prompts
KEPT = ("special_tokens_map.json", "added_tokens.json", *SENTENCES)
ASKS_AS_CHAT = "handtune_asks_as_chat"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "*.model")
TEMPLATES = "additional_chat_templates"  # where transformers puts all but the default one


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a checkpoint: ids where they are known, names, the chat template, the raw settings.

    `eos_id` ends a text, `more_ends` are further tokens that end what the model writes. `names` are the texts of
    special tokens as chat templates know them, `{"eos_token": "</s>", ...}`. `settings` is tokenizer_config.json
    without the template, `generation` generation_config.json without the ids, `files` what is
    kept as it is, by name. `skipped_id` is the pad id in front of which transformers' classifiers look for the last
    token of a text: config.json's.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    more_ends: tuple[int, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    names: dict[str, str] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    skipped_id: int | None = None

    @classmethod
    def read(
        cls, folder: Path, settings: TokenizerSettings, config: dict[str, Any], tokenizer: "Tokenizer | None"
    ) -> "SpecialTokens":
        """From the files in `folder` (`config`: config.json) and the tokenizer, as the module's docstring says.

        A separate chat_template.jinja goes before the one in tokenizer_config.json. Raises ValueError for a damaged
        file, and for ids that are none.
        """
        generation = json_if_there(folder / GENERATION)
        names = special_names(settings)

        # Of each kind the tokenizer's token goes first, and then what the model's files list.
        ids: dict[str, tuple[int, ...]] = {}
        for kind in ("bos", "eos", "pad"):
            listed = [*_ids(config, kind, folder / "config.json"), *_ids(generation, kind, folder / GENERATION)]
            text = names.get(f"{kind}_token")
            named = tokenizer.token_to_id(text) if tokenizer is not None and text is not None else None
            if named is not None and listed and named not in listed:
                other = ", ".join(map(str, dict.fromkeys(listed)))
                log.warning("%s: its %s_token is %r (%d), but its model says %s; %r is taken",
                            folder, kind, text, named, other, text)  # fmt: skip
            ids[kind] = tuple(dict.fromkeys([*([] if named is None else [named]), *listed]))

        # An end that the tokenizer's files don't mention (null would say that there is none) a template may write, too.
        if "eos_token" not in {**settings.stored, **names} and tokenizer is not None and ids["eos"]:
            text = tokenizer.id_to_token(ids["eos"][0])
            names |= {} if text is None else {"eos_token": text}
        generation = {key: value for key, value in generation.items() if key not in IDS}

        kept = dict(settings.stored)
        templates = _templates(folder, kept.pop("chat_template", None))
        template = templates.pop("default", None)
        more_templates = {f"{TEMPLATES}/{name}.jinja": text.encode() for name, text in templates.items()}
        return cls(
            bos_id=next(iter(ids["bos"]), None), eos_id=next(iter(ids["eos"]), None),
            pad_id=next(iter(ids["pad"]), None), chat_template=template, settings=kept, more_ends=ids["eos"][1:],
            files={**_kept(folder), **more_templates}, names=names, generation=generation,
            skipped_id=next(iter(_ids(config, "pad", folder / "config.json")), None),
        )  # fmt: skip

    @classmethod
    def of_tokenizer(cls, tokenizer: "Tokenizer") -> "SpecialTokens":
        """For a model without a folder: "<|endoftext|>" or "</s>" ends texts, if there is one, "<pad>" pads."""
        known = {
            "eos_token": next(
                (text for text in ("<|endoftext|>", "</s>") if tokenizer.token_to_id(text) is not None), ""
            ),
            "pad_token": "<pad>" if tokenizer.token_to_id("<pad>") is not None else "",
        }
        names = {name: text for name, text in known.items() if text}
        eos, pad = (tokenizer.token_to_id(text) for text in known.values())
        # The class by which transformers takes the tokenizer.json as it is.
        return cls(
            eos_id=eos, pad_id=pad, names=names, settings={"tokenizer_class": "PreTrainedTokenizerFast", **names}
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """Every token that ends what the model writes."""
        return self.more_ends if self.eos_id is None else (self.eos_id, *self.more_ends)

    def ending_with(self, token: int) -> "SpecialTokens":
        """The same with one more token that ends what the model writes: a chat template's end of a turn."""
        if token in self.ends:
            return self
        return replace(self, eos_id=token) if self.eos_id is None else replace(self, more_ends=(*self.more_ends, token))

    def with_adapter(self, adapter: Path, tokenizer: "Tokenizer | None") -> "SpecialTokens":
        """The same with what lies beside an adapter, which trained with the tokenizer, template and ends there."""
        if not (adapter / SETTINGS).is_file() and not (adapter / GENERATION).is_file():
            return self
        own = SpecialTokens.read(adapter, read_settings(adapter, {}), {}, tokenizer)
        ends = tuple(dict.fromkeys([*own.ends, *self.ends]))
        return replace(
            self, eos_id=next(iter(ends), None), more_ends=ends[1:], pad_id=_first(own.pad_id, self.pad_id),
            bos_id=_first(own.bos_id, self.bos_id), chat_template=own.chat_template or self.chat_template,
            settings=own.settings or self.settings, names={**self.names, **own.names},
            files={**self.files, **own.files}, generation={**self.generation, **own.generation},
        )  # fmt: skip

    @property
    def asks_as_chat(self) -> bool:
        """Whether the model was trained to be asked through its chat template, also for a plain prompt."""
        return self.generation.get(ASKS_AS_CHAT) is True

    def asking_as_chat(self, chat: bool) -> "SpecialTokens":
        """The same, remembering how the model was trained to be asked, in generation_config.json."""
        return replace(self, generation={**self.generation, ASKS_AS_CHAT: chat})

    def padding_with(self, token: int, text: str | None) -> "SpecialTokens":
        """The same with a token that pads, also for the tokenizer, where its text is known."""
        named = {} if text is None else {"pad_token": text}
        return replace(self, pad_id=token, names=self.names | named, settings=self.settings | named)

    def to_config(self, classifies: bool = False) -> dict[str, Any]:
        """The ids as config.json and generation_config.json name them; several end tokens are a list.

        The pad id of what `classifies` is the one in front of which it looks for a text's last token.
        """
        eos = list(self.ends) if self.more_ends else self.eos_id
        pad = self.skipped_id if classifies else self.pad_id
        ids = dict(zip(IDS, (self.bos_id, eos, pad), strict=True))
        return {key: value for key, value in ids.items() if value is not None}


def _first(*ids: int | None) -> int | None:
    return next((number for number in ids if number is not None), None)


def _ids(config: dict[str, Any], name: str, path: Path) -> list[int]:
    """The ids of a special token, one or several; below zero there is none. ValueError for what is no id."""
    value = config.get(f"{name}_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(number) is not int or number >= 2**31 for number in ids):
        raise ValueError(f"{path}: {name}_token_id = {shown(value)}: expected a token's id, or a list of ids")
    return [number for number in ids if number >= 0]


def _templates(folder: Path, stored: Any) -> dict[str, str]:
    """Chat templates by name; `stored` is what tokenizer_config.json has: one, or a list of several."""
    where = f"{folder / SETTINGS}: chat_template"
    with_fields({"chat_template": stored}, str(folder / SETTINGS), chat_template=str | list | None)
    found = {} if stored is None else {"default": stored}
    if isinstance(stored, list):
        entries = [with_fields(entry, where, name=str, template=str) for entry in stored]
        found = {entry["name"]: entry["template"] for entry in entries}
    if unfit := [name for name in found if Path(name).name != name]:
        raise ValueError(f"{folder / SETTINGS}: chat_template {shown(unfit[0])} can't be a file's name")
    paths = [*folder.glob("chat_template.jinja"), *sorted((folder / TEMPLATES).glob("*.jinja"))]
    for path in paths:
        name = "default" if path.parent == folder else path.stem
        found[name] = read_text(path, "chat template")
    return found


def _kept(folder: Path) -> dict[str, bytes]:
    """The files that are written again as they are."""
    paths = [path for name in (*KEPT, *VOCABULARIES) for path in sorted(folder.glob(name))]
    return {path.name: read_bytes(path) for path in paths}


def load_tokenizer(folder: Path, settings: TokenizerSettings) -> "Tokenizer | None":
    """The folder's tokenizer, its tokenizer.json or what its vocabulary files describe; None where there is neither."""
    path = folder / "tokenizer.json"
    return load_tokenizer_file(path) if path.exists() else build_tokenizer(folder, settings)


def load_tokenizer_file(path: Path) -> "Tokenizer":
    """A tokenizer.json without its stored padding and truncation. FileNotFoundError or ValueError if it is none."""
    require_file(path, "tokenizer file")
    from tokenizers import Tokenizer

    with others_code(lambda error: ValueError(f"{path}: not a tokenizer file ({error}); restore it")):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer | None", tokens: SpecialTokens, folder: Path, task: str) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat templates and what was kept, where there is something to write.

    Vocabulary files go with a tokenizer: without its tokenizer.json they would be taken for one to be built from them.
    For a `task` that writes, generation_config.json names every token that ends what the model writes.
    """
    if tokenizer is not None:
        write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    if tokens.settings:
        write_json(folder / SETTINGS, tokens.settings)
    if tokens.chat_template:
        write_file(folder / "chat_template.jinja", tokens.chat_template)
    if task in ("causal-lm", "seq2seq-lm"):
        write_json(folder / GENERATION, {**tokens.generation, **tokens.to_config()})
    for name, contents in tokens.files.items():
        if tokenizer is not None or not any(fnmatchcase(name, pattern) for pattern in VOCABULARIES):
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, contents)

"""Special tokens and chat templates of a checkpoint, its tokenizer, and the files next to it.

This is the only place that decides which tokens begin, end and pad a text (for a GGUF file, `gguf_vocabulary.py` does).
Where the files disagree, it decides as transformers does, whose Trainer aligns a model with its tokenizer:

    end     the tokenizer's `eos_token` ends texts in training. What the model writes ends with it and with each
            `eos_token_id` of generation_config.json and config.json (of Llama 3's chat models there are three)
    begin   the tokenizer's `bos_token`, else config.json's id. Whether a text gets one is up to the tokenizer
    pad     the tokenizer's `pad_token`, else config.json's id

A token of the tokenizer that the model's files don't list is reported in one line. Some old configurations have -1
where they mean that there is no such token. How tokenizers name their tokens is in token_names.py.

Other files for a tokenizer are copied as they are, so that transformers makes the same tokenizer from the saved folder
as from the first one: special_tokens_map.json and added_tokens.json, which it reads where tokenizer_config.json doesn't
list the added tokens, further chat templates, and the vocabulary files that its slow tokenizers need.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._files import json_if_there, read_bytes, read_text, require_file, write_file, write_json
from ..._outside import located, others_code
from ..._shapes import shown, with_fields
from .build import build_tokenizer
from .token_names import SETTINGS, TokenizerSettings, read_settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("handtune")

CONFIG = "config.json"
GENERATION = "generation_config.json"
# Copied to a saved checkpoint. The last two are of sentence-transformers: its longest text and its prompts.
COPIED_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
VOCABULARY_FILES = ("vocab.json", "merges.txt", "vocab.txt", "*.model")
ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Our own fields of generation_config.json.
ASKS_AS_CHAT = "handtune_asks_as_chat"
PROMPT = "handtune_prompt"
TEMPLATES = "additional_chat_templates"  # the folder where transformers puts all but the default one


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a checkpoint, its chat template, and the settings of its tokenizer."""

    bos_id: int | None = None
    ends: tuple[int, ...] = ()  # each ends what the model writes; the first of them ends texts in training
    pad_id: int | None = None
    chat_template: str | None = None
    # tokenizer_config.json without the template
    settings: dict[str, Any] = field(default_factory=dict)
    # contents of the files that are copied as they are, by name
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    # texts of special tokens as chat templates know them, {"eos_token": "</s>", ...}
    names: dict[str, str] = field(default_factory=dict)
    # generation_config.json without the ids
    generation: dict[str, Any] = field(default_factory=dict)
    # config.json's pad id, in front of which transformers' classifiers look for the last token of a text
    config_pad_id: int | None = None

    @classmethod
    def read(
        cls, folder: Path, settings: TokenizerSettings, config: dict[str, Any], tokenizer: "Tokenizer | None"
    ) -> "SpecialTokens":
        """From the files in `folder` (`config`: config.json) and the tokenizer, as the module's docstring says.

        A separate chat_template.jinja goes before the one in tokenizer_config.json. Raises ValueError for a damaged
        file, and for ids that are none.
        """
        generation = json_if_there(folder / GENERATION)
        names = dict(settings.names)

        # The tokenizer's token goes first, and then what the model's files list.
        ids: dict[str, list[int]] = {}
        for field_name in ID_FIELDS:
            listed = _ids(config, field_name, folder / CONFIG) + _ids(generation, field_name, folder / GENERATION)
            name = field_name.removesuffix("_id")
            text = names.get(name)
            if tokenizer is not None and text is not None and (token_id := tokenizer.token_to_id(text)) is not None:
                if listed and token_id not in listed:
                    log.warning("%s: its %s is %r (%d), but its model says %s; %r is taken", folder, name, text,
                                token_id, ", ".join(map(str, dict.fromkeys(listed))), text)  # fmt: skip
                listed.insert(0, token_id)
            ids[name] = list(dict.fromkeys(listed))

        # A chat template may also write an end that the tokenizer's files don't mention. Null would say there is none.
        ends = ids["eos_token"]
        if "eos_token" not in {**settings.stored, **names} and tokenizer is not None and ends:
            text = tokenizer.id_to_token(ends[0])
            if text is not None:
                names["eos_token"] = text

        stored = dict(settings.stored)
        templates = _templates(folder, stored.pop("chat_template", None))
        default_template = templates.pop("default", None)
        template_files = {f"{TEMPLATES}/{name}.jinja": text.encode() for name, text in templates.items()}
        return cls(
            bos_id=_first(ids["bos_token"]),
            ends=tuple(ends),
            pad_id=_first(ids["pad_token"]),
            chat_template=default_template,
            settings=stored,
            files={**_copied_files(folder), **template_files},
            names=names,
            generation={key: value for key, value in generation.items() if key not in ID_FIELDS},
            config_pad_id=_first(_ids(config, "pad_token_id", folder / CONFIG)),
        )

    @classmethod
    def of_tokenizer(cls, tokenizer: "Tokenizer") -> "SpecialTokens":
        """For a model without a folder: "<|endoftext|>" or "</s>" ends texts, if there is one, "<pad>" pads."""
        vocabulary = tokenizer.get_vocab()
        names: dict[str, str] = {}
        ends: tuple[int, ...] = ()
        for text in ("</s>", "<|endoftext|>"):  # the second goes first
            if text in vocabulary:
                names["eos_token"] = text
                ends = (vocabulary[text],)
        if "<pad>" in vocabulary:
            names["pad_token"] = "<pad>"
        # The class by which transformers takes the tokenizer.json as it is.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        return cls(ends=ends, pad_id=vocabulary.get("<pad>"), names=names, settings=settings)

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, in training and in what the model writes."""
        return _first(self.ends)

    def ending_with(self, token: int) -> "SpecialTokens":
        """The same with one more token that ends what the model writes: a chat template's end of a turn."""
        return replace(self, ends=tuple(dict.fromkeys([*self.ends, token])))

    def with_adapter(self, adapter: Path, tokenizer: "Tokenizer | None") -> "SpecialTokens":
        """The same with what an adapter's folder holds: it was trained with the tokenizer, template and ends there."""
        if not (adapter / SETTINGS).is_file() and not (adapter / GENERATION).is_file():
            return self
        trained = SpecialTokens.read(adapter, read_settings(adapter, {}), {}, tokenizer)
        return replace(
            self,
            bos_id=self.bos_id if trained.bos_id is None else trained.bos_id,
            ends=tuple(dict.fromkeys([*trained.ends, *self.ends])),
            pad_id=self.pad_id if trained.pad_id is None else trained.pad_id,
            chat_template=trained.chat_template or self.chat_template,
            settings=trained.settings or self.settings,
            files={**self.files, **trained.files},
            names={**self.names, **trained.names},
            generation={**self.generation, **trained.generation},
        )

    @property
    def asks_as_chat(self) -> bool:
        """Whether the model was trained to be asked through its chat template, also for a plain prompt."""
        return self.generation.get(ASKS_AS_CHAT) is True

    @property
    def answers_chats(self) -> bool:
        """Whether the model was trained on dialogues, as far as can be told: a published one has a template if so."""
        return self.generation.get(ASKS_AS_CHAT, self.chat_template is not None) is True

    def asking_as_chat(self, chat: bool) -> "SpecialTokens":
        """The same, remembering how the model was trained to be asked, in generation_config.json."""
        return replace(self, generation={**self.generation, ASKS_AS_CHAT: chat})

    @property
    def prompt(self) -> str | None:
        """The template of the prompts that the model was trained on, over the columns of rows; or None."""
        value = self.generation.get(PROMPT)
        return value if isinstance(value, str) else None

    def asking_by(self, prompt: str | None) -> "SpecialTokens":
        """The same, remembering the template of its prompts in generation_config.json, in place of any earlier one."""
        others = {name: value for name, value in self.generation.items() if name != PROMPT}
        return replace(self, generation=others if prompt is None else {**others, PROMPT: prompt})

    def to_config(self, classifies: bool = False) -> dict[str, Any]:
        """The ids as config.json and generation_config.json name them; several end tokens are a list, none is null.

        The pad id of a model that `classifies` is the one in front of which it looks for a text's last token.
        """
        eos = list(self.ends) if len(self.ends) > 1 else self.eos_id
        pad = self.config_pad_id if classifies else self.pad_id
        # Null, too: what is left out has a default in many of transformers' configurations.
        return dict(zip(ID_FIELDS, (self.bos_id, eos, pad), strict=True))


def _first(ids: Sequence[int]) -> int | None:
    return ids[0] if ids else None


def _ids(config: dict[str, Any], field_name: str, path: Path) -> list[int]:
    """The ids of a special token, one or several; below zero there is none. ValueError for what is no id."""
    value = config.get(field_name)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if any(type(token_id) is not int or token_id >= 2**31 for token_id in ids):
        raise ValueError(f"{path}: {field_name} = {shown(value)}: expected a token's id, or a list of ids")
    return [token_id for token_id in ids if token_id >= 0]


def _templates(folder: Path, stored: Any) -> dict[str, str]:
    """Chat templates by name; `stored` is what tokenizer_config.json has: one, or a list of several."""
    templates = {}
    if isinstance(stored, str):
        stored = [{"name": "default", "template": stored}]
    with located(folder / SETTINGS):
        for entry in stored or []:
            with_fields(entry, "chat_template", name=str, template=str)
            if Path(entry["name"]).name != entry["name"]:  # it is saved as a file of this name
                raise ValueError(f"chat_template {shown(entry['name'])} can't be a file's name")
            templates[entry["name"]] = entry["template"]

    # Templates in files of their own go before those in the settings.
    for path in folder.glob("chat_template.jinja"):
        templates["default"] = read_text(path, "chat template")
    for path in sorted((folder / TEMPLATES).glob("*.jinja")):
        templates[path.stem] = read_text(path, "chat template")
    return templates


def _copied_files(folder: Path) -> dict[str, bytes]:
    """The contents of the files that are written again as they are."""
    paths = [path for pattern in (*COPIED_FILES, *VOCABULARY_FILES) for path in sorted(folder.glob(pattern))]
    return {path.name: read_bytes(path) for path in paths}


def read_tokenizer(folder: Path, config: dict[str, Any]) -> tuple["Tokenizer | None", SpecialTokens]:
    """The tokenizer of a folder and its special tokens; `config` is config.json."""
    settings = read_settings(folder, config)
    tokenizer = load_tokenizer(folder, settings)
    return tokenizer, SpecialTokens.read(folder, settings, config, tokenizer)


def load_tokenizer(folder: Path, settings: TokenizerSettings) -> "Tokenizer | None":
    """The folder's tokenizer, its tokenizer.json or what its vocabulary files describe; None where there is neither."""
    path = folder / "tokenizer.json"
    if path.exists():
        return load_tokenizer_file(path)
    return build_tokenizer(folder, settings)


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
    """Write tokenizer.json, tokenizer_config.json, chat templates and the copied files, as far as there are any.

    Vocabulary files are copied with a tokenizer only: without its tokenizer.json one would be built from them. For a
    `task` that generates text, generation_config.json names every token that ends what the model writes.
    """
    if tokenizer is not None:
        write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    if tokens.settings:
        write_json(folder / SETTINGS, tokens.settings)
    if tokens.chat_template:
        write_file(folder / "chat_template.jinja", tokens.chat_template)
    if task in ("causal-lm", "seq2seq-lm"):
        ids = {name: value for name, value in tokens.to_config().items() if value is not None}
        write_json(folder / GENERATION, {**tokens.generation, **ids})
    for name, contents in tokens.files.items():
        if tokenizer is not None or not any(fnmatchcase(name, pattern) for pattern in VOCABULARY_FILES):
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, contents)

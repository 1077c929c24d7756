"""Tokenizers built from vocabulary files give the ids that transformers' give."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_models import theirs, tiny_bert, tiny_gpt2
from small_tokenizers import byte_level, word_piece
from tokenizers import Tokenizer
from transformers import BertTokenizer, GPT2Tokenizer

from handtune.models import load, save
from handtune.models.tokenizer.special_tokens import load_tokenizer
from handtune.models.tokenizer.token_names import read_settings

TEXTS = [
    "The cat sat on the mat, and the dog looked at the cat.",
    "",
    " ",
    "   leading, and  two  spaces\ttab\nline\r\n",
    "can't won't I'LL they've 1920 12,345.67 ½ x² №",
    "Café naïve ÉCOLE Straße ǅ İstanbul ﬁne cafe\u0301",
    "中文 的 text 日本語テキスト 한국어",
    "🦙👩‍👩‍👧 emoji \u200b\u00a0\ufeff\x00\x07 controls \ufffd",
    "<|endoftext|> a<|endoftext|>b <|end|> [MASK] [CLS]x[SEP] [unk] [UNK]",
    "under_score #hash ##ing @x ¿qué? — … «quotes»",
    "x" * 120,
    "The\u2028separator\x85next",
    "<tool> and <TOOL>, <extra>",
]


def lay_byte_level(folder: Path, settings: dict[str, Any] | None = None, end: str | None = None) -> Path:
    """vocab.json and merges.txt; `end` takes the place of `<|end|>`."""
    folder.mkdir()
    byte_level().model.save(str(folder))
    path = folder / "vocab.json"
    if end:
        path.write_text(path.read_text().replace("<|end|>", end))
    write(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **(settings or {})})
    return folder


def lay_word_piece(folder: Path, settings: dict[str, Any] | None = None) -> Path:
    """vocab.txt: the small vocabulary, and words that lower case, accents and Chinese characters tell apart."""
    folder.mkdir()
    table = word_piece().get_vocab()
    words = [
        "cafe",
        "café",
        "Caf",
        "##é",
        "##e",
        "É",
        "Straße",
        "strasse",
        "中",
        "中文",
        "##文",
        "文",
        "的",
        "The",
        "—",
        "½",
    ]
    words = [*sorted(table, key=table.__getitem__), *dict.fromkeys(word for word in words if word not in table)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **(settings or {})})
    return folder


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def assert_same_ids(ours: Tokenizer, reference: Any, segments: bool = False) -> None:
    for text in TEXTS:
        assert ours.encode(text).ids == reference(text)["input_ids"], text
        assert ours.encode(text, add_special_tokens=False).ids == reference(text, add_special_tokens=False)["input_ids"]
        ids = ours.encode(text).ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
        pair = reference(text, TEXTS[0])
        assert ours.encode(text, TEXTS[0]).ids == pair["input_ids"]
        if segments:
            assert ours.encode(text, TEXTS[0]).type_ids == pair["token_type_ids"]
            offsets = reference(text, return_offsets_mapping=True)["offset_mapping"]
            assert ours.encode(text).offsets == offsets
    assert ours.get_vocab() == reference.get_vocab()
    assert special_ids(ours) == special_ids(reference.backend_tokenizer)


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("end", [None, "<|endoftext|>"])
def test_byte_level(tmp_path, prefix, end):
    settings: dict[str, Any] = {"add_prefix_space": prefix}
    if end is None:
        settings |= {"eos_token": "<|end|>", "unk_token": "<|end|>", "pad_token": None}
        bos = {"__type": "AddedToken", "content": "<|im_start|>", "lstrip": True, "rstrip": False, "normalized": False}
        settings["bos_token"] = bos
    folder = lay_byte_level(tmp_path / "x", settings, end)
    ours = load_tokenizer(folder, read_settings(folder, {}))
    assert_same_ids(ours, GPT2Tokenizer.from_pretrained(folder))
    assert ours.encode("The cat").ids == byte_level().encode(" The cat" if prefix else "The cat").ids


@pytest.mark.parametrize("lower", [None, True, False])
@pytest.mark.parametrize("accents", [None, True, False])
@pytest.mark.parametrize("chinese", [None, False])
def test_word_piece(tmp_path, lower, accents, chinese):
    settings = {"do_lower_case": lower, "strip_accents": accents, "tokenize_chinese_chars": chinese}
    folder = lay_word_piece(tmp_path / "x", {key: value for key, value in settings.items() if value is not None})
    ours = load_tokenizer(folder, read_settings(folder, {}))
    assert_same_ids(ours, BertTokenizer.from_pretrained(folder), segments=True)
    if lower is accents is chinese is None:
        assert ours.encode(TEXTS[0], TEXTS[2]).ids == word_piece().encode(TEXTS[0], TEXTS[2]).ids


ADDED = [
    {"tokenizer_config.json": {"pad_token": "<pad>", "additional_special_tokens": ["<tool>", "<extra>"]}},
    {
        "tokenizer_config.json": {
            "pad_token": "<pad>",
            "image_token": "<image>",
            "extra_special_tokens": {"x_token": "<x>"},
        }
    },
    {"special_tokens_map.json": {"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]}},
    {
        "special_tokens_map.json": {"pad_token": {"content": "<pad>", "lstrip": True, "rstrip": True}},
        "added_tokens.json": {"<tool>": "+1", "<pad>": "+0", "<extra>": "+2"},
    },
    {
        "tokenizer_config.json": {
            "pad_token": "<pad>",
            "added_tokens_decoder": {
                "+1": {"content": "<tool>", "lstrip": True, "normalized": True, "special": False},
                "+0": {"content": "<pad>", "special": True, "rstrip": True},
                "+2": {"content": "<extra>", "single_word": True, "special": True},
            },
        },
        "special_tokens_map.json": {"mask_token": "never read"},
    },
]


@pytest.mark.parametrize("files", ADDED)
@pytest.mark.parametrize("kind", ["byte-level", "word piece"])
def test_added_tokens(tmp_path, files, kind):
    folder = tmp_path / "x"
    if kind == "byte-level":
        lay_byte_level(folder, end="<|endoftext|>")
    else:
        lay_word_piece(folder)
    size = load_tokenizer(folder, read_settings(folder, {})).get_vocab_size()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name, value in files.items():
        text = json.dumps({**(settings if name == "tokenizer_config.json" else {}), **value})
        for i in range(3):
            text = text.replace(f'"+{i}":', f'"{size + i}":').replace(f'"+{i}"', str(size + i))
        (folder / name).write_text(text)
    ours = load_tokenizer(folder, read_settings(folder, {}))
    reference = (GPT2Tokenizer if kind == "byte-level" else BertTokenizer).from_pretrained(folder)
    assert_same_ids(ours, reference)
    assert ours.token_to_id("<pad>") is not None


def test_a_checkpoint_with_vocabulary_files_only(tmp_path):
    """The model comes with its tokenizer, and is saved with a tokenizer.json."""
    for config, lay, place in ((tiny_gpt2, lay_byte_level, "gpt2"), (tiny_bert, lay_word_piece, "bert")):
        task = "causal-lm" if place == "gpt2" else "masked-lm"
        lay(tmp_path / place)
        write(tmp_path / place, "tokenizer_config.json", {})  # no class: the architecture tells
        theirs(config(vocab_size=600), task).save_pretrained(tmp_path / place)
        model, words = load(tmp_path / place, device="cpu")
        save(model, words, tmp_path / "ours")
        again = Tokenizer.from_file(str(tmp_path / "ours" / "tokenizer.json"))
        assert [again.encode(text).ids for text in TEXTS] == [words.encode(text).ids for text in TEXTS]
        shutil.rmtree(tmp_path / "ours")


def test_no_vocabulary_is_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path, read_settings(tmp_path, {})) is None
    write(tmp_path, "vocab.json", {})  # without merges it is none of ours
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
    assert load_tokenizer(tmp_path, read_settings(tmp_path, {})) is None


DAMAGES = {
    "sentencepiece": ({"spiece.model": "x"}, "spiece.model: a sentencepiece model is not read, .* write it once with"),
    "merges": ({"merges.txt": "#version: 0.2\nno such\n"}, "vocab.json, merges.txt: damaged .*; restore them"),
    "vocabulary": ({"vocab.json": "{"}, "vocab.json, merges.txt: damaged"),
    "not text": ({"vocab.txt": b"\xff\xfe\n"}, "vocab.txt: damaged"),
    "no unknown": ({"vocab.txt": "a\nb\n"}, r"vocab.txt: the unknown token '\[UNK\]' is not in it"),
    "class": (
        {"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}},
        "vocab.(txt|json): of a Qwen2Tokenizer",
    ),
    "no class": ({"tokenizer_config.json": {}}, "vocab.(txt|json): of a nameless tokenizer, which is not built from"),
    "bos": ({"tokenizer_config.json": {"add_bos_token": True}}, "add_bos_token = True is not implemented; write it"),
    "basic": ({"tokenizer_config.json": {"do_basic_tokenize": False}}, "do_basic_tokenize = False is not implemented"),
    "never": ({"tokenizer_config.json": {"never_split": ["x"]}}, r"never_split = \['x'\] is not implemented"),
    "no token": (
        {"tokenizer_config.json": {"eos_token": {"id": 3}}},
        r"config.json: \{'id': 3\} is no token, which is",
    ),
    "no token among more": (
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": [3]}},
        "config.json: 3 is no token, which is",
    ),
    "no list": (
        {"tokenizer_config.json": {"additional_special_tokens": 3}},
        "config.json: additional_special_tokens: expected a list, got 3",
    ),
    "id": ({"added_tokens.json": {"<new>": 5000}}, "the added token '<new>' has id 5000, but [0-9]+ is its place"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_not_read_is_one_line(tmp_path, case):
    files, message = DAMAGES[case]
    folder = (lay_word_piece if "vocab.txt" in files else lay_byte_level)(tmp_path / "x")
    for name, value in files.items():
        raw = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
        (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(folder, read_settings(folder, {}))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

"""Token caches: the right tokens, made once, made again when anything changes, never read half-written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import byte_level

from handtune.engine.data import corpus as corpus_module
from handtune.engine.data.corpus import TokenCorpus, token_corpus
from handtune.inputs.rows import is_corpus

END = 0
STORY = "The cat sat on the mat,\nand the dog looked at the cat.\n\nhello good morning\n"


def ids(text: str) -> list[int]:
    return byte_level().encode(text).ids


def build(folder: Path, *sources: str | Path, max_length: int = 10, eos: int | None = END) -> TokenCorpus:
    return token_corpus(sources, byte_level(), folder / "cache", max_length, eos)


def test_documents_are_joined_by_the_end_token(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + STORY.encode())
    rows = [{"text": "The dog"}, {"text": "", "id": 1}, {"text": "\u00e9t\u00e9\u2028cat"}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    corpus = build(tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl", "hello cat")
    expected = [*ids(STORY), END, *ids("The dog"), END, *ids("\u00e9t\u00e9\u2028cat"), END, *ids("hello cat"), END]
    assert corpus.tokens.tolist() == expected
    assert corpus.tokens.dtype == np.uint16
    assert isinstance(corpus.tokens, np.memmap)
    assert build(tmp_path, "hello cat", eos=None).tokens.tolist() == ids("hello cat")


@pytest.mark.parametrize("count", [2, 10, 11, 12, 21, 35])
def test_windows_lose_no_token(count):
    tokens = np.arange(count, dtype=np.uint16)
    corpus = TokenCorpus(tokens, 10)
    examples = list(corpus)
    assert len(examples) == len(corpus) == -(-(count - 1) // 10)
    assert np.concatenate([example["input_ids"] for example in examples]).tolist() == list(range(count - 1))
    assert np.concatenate([example["targets"] for example in examples]).tolist() == list(range(1, count))
    assert all(example["input_ids"].dtype == np.int64 for example in examples)
    assert all(len(example["targets"]) == 10 for example in examples[:-1])
    assert corpus[-1]["targets"].tolist() == examples[-1]["targets"].tolist()
    for index in (len(corpus), -len(corpus) - 1):
        with pytest.raises(IndexError):
            corpus[index]


def test_pieces_give_the_tokens_of_the_whole_text(tmp_path, monkeypatch):
    text = "".join(f"line {i} of the cat\n" + "\n" * (i % 3) + "  the dog\n" * (i % 2) for i in range(300))
    monkeypatch.setattr(corpus_module, "_PIECE", 100)
    pieces = list(corpus_module._pieces(text))
    assert len(pieces) > 50
    assert max(len(piece.text) for piece in pieces) < 250
    assert not any(piece.text[0].isspace() for piece in pieces)
    assert [piece.begins_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert build(tmp_path, text).tokens.tolist() == [*ids(text), END]


def test_lines_without_a_good_place_to_cut_are_cut_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_PIECE", 100)
    text = " indented\n" * 500
    assert max(len(piece.text) for piece in corpus_module._pieces(text)) <= 410
    assert byte_level().decode(build(tmp_path, text, eos=None).tokens.tolist()) == text


def test_cache_is_reused(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(STORY)
    first = build(tmp_path, path).tokens.tolist()
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert sorted(Path(name).suffix for name in files) == [".bin", ".json"]
    monkeypatch.setattr(corpus_module, "_tokens", None)  # would fail if it were called
    os.utime(path, (1, 1))
    assert build(tmp_path, path, max_length=3).tokens.tolist() == first
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == files


def test_cache_is_made_again_when_something_changed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(STORY)
    build(tmp_path, path)
    path.write_text(STORY.replace("cat", "dog"))  # of the same size
    assert build(tmp_path, path).tokens.tolist() == [*ids(STORY.replace("cat", "dog")), END]
    assert build(tmp_path, path, eos=1).tokens[-1] == 1
    other = type(byte_level()).from_str(byte_level().to_str())
    other.add_tokens(["the dog"])
    assert token_corpus([path], other, tmp_path / "cache", 10, END).tokens.max() == other.get_vocab_size() - 1


def test_a_damaged_cache_is_made_again(tmp_path):
    expected = build(tmp_path, STORY).tokens.tolist()
    (binary,) = (tmp_path / "cache").glob("*.bin")
    for damage in (lambda: os.truncate(binary, 10), lambda: binary.with_suffix(".json").write_text('{"cou')):
        damage()
        assert build(tmp_path, STORY).tokens.tolist() == expected


def test_a_failure_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cat"}\n' * 20 + '{"text": 3}\n')
    with pytest.raises(ValueError, match="a.jsonl line 21: no text in a field 'text'"):
        build(tmp_path, path)
    assert not (tmp_path / "cache").exists()


def test_large_vocabularies_take_four_bytes(tmp_path):
    assert token_corpus([STORY], byte_level(), tmp_path, 10, None).tokens.dtype == np.uint16
    wide = type(byte_level()).from_str(byte_level().to_str())
    wide.add_tokens([f"<{i}>" for i in range(65_536 - wide.get_vocab_size())])
    corpus = token_corpus(["cat <65000>"], wide, tmp_path, 10, 65_535)
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens[-1] == 65_535


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntw\xff\n", "a.txt line 2: byte 6 is not UTF-8"),
        ("a.txt", b"one\ntw\0\n", "a.txt line 2: byte 6 is zero, as in UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl line 2: not JSON"),
        ("a.csv", b"text,label\na,b\nc\n", "a.csv line 3: 1 fields where the header has 2"),
        ("a.doc", b"text\na\n", "a.doc: unknown kind of file"),
        ("a.txt", b"", "a.txt: 0 tokens; give text with at least two"),
    ],
)
def test_bad_sources_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, path)
    with pytest.raises(ValueError, match="a file's name given as a document"):
        build(tmp_path, str(path))


def test_missing_and_no_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt: no such file"):
        build(tmp_path, tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="no sources"):
        build(tmp_path)


def test_a_corpus_is_known_by_its_first_row(tmp_path):
    """Whatever follows is not read for that: it may be many gigabytes."""
    for first, known in (
        ('{"text": "a"}', True),
        ('{"text": "a", "label": "b"}', False),
        ('{"prompt": "a", "completion": "text"}', False),
        ('{"text": 1}', False),
        ('["text"]', False),
        ("text", False),
    ):
        (tmp_path / "a.jsonl").write_text(f"{first}\n{{broken", encoding="utf-8")
        assert is_corpus(tmp_path / "a.jsonl") == known, first

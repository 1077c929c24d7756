"""Rows out of files: every format, every shape, and a one-line refusal for every kind of damage."""

import csv
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

from handtune.engine.data.labels import label_ids, label_name
from handtune.engine.data.readers import label_names, read_prompts, read_rows, row_shape, split_rows
from handtune.engine.formats.tables import csv_records

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CONTEXT = "Ada wrote the first program in 1843."
SQUAD = {"question": "Who?", "context": CONTEXT, "answers": {"text": ["Ada"], "answer_start": [0]}}


def write(folder: Path, name: str, content: str | bytes | list | dict) -> Path:
    path = folder / name
    if isinstance(content, list) and name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in content)
    if isinstance(content, (list, dict)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("raw", "shape", "row"),
    [
        ({"text": "a", "url": "x"}, "text", {"text": "a"}),
        ({"prompt": "a", "completion": "b", "id": 1}, "prompt/completion", {"prompt": "a", "completion": "b"}),
        ({"messages": CHAT}, "messages", {"messages": CHAT}),
        ({"conversations": SHAREGPT}, "messages", {"messages": CHAT}),
        (
            {"conversations": SHAREGPT, "system": "Be kind"},
            "messages",
            {"messages": [{"role": "system", "content": "Be kind"}, *CHAT]},
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "text": "all of it"},
            "prompt/completion",
            {"prompt": "Add\n\n1 2\n\n", "completion": "3"},
        ),
        (
            {"instruction": "Sing", "input": "", "output": "La"},
            "prompt/completion",
            {"prompt": "Sing\n\n", "completion": "La"},
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "prompt/chosen/rejected",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
        ),
        (
            {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "Go"}},
            "prompt/chosen/rejected",
            {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "Go"}]},
        ),
        (
            {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "Go"}]},
            "prompt/chosen/rejected",
            {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "Go"}]},
        ),
        (
            {"prompt": "Hi", "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "Go"}]},
            "prompt/chosen/rejected",
            {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "Go"}]},
        ),
        ({"sentence": "a", "label": 1, "idx": 3}, "text/label", {"text": "a", "label": "1"}),
        ({"text": "a", "label": True}, "text/label", {"text": "a", "label": "true"}),
        (
            {"premise": "a", "hypothesis": "b", "label": "no"},
            "text/text_pair/label",
            {"text": "a", "text_pair": "b", "label": "no"},
        ),
        ({"tokens": ["a", "b"], "ner_tags": [0, 3]}, "tokens/tags", {"tokens": ["a", "b"], "tags": ["0", "3"]}),
        (SQUAD, "question/context/answers", SQUAD),
        ({**SQUAD, "answers": [{"text": "Ada", "answer_start": 0}]}, "question/context/answers", SQUAD),
        (
            {**SQUAD, "answers": []},
            "question/context/answers",
            {**SQUAD, "answers": {"text": [], "answer_start": []}},
        ),
        ({"anchor": "a", "positive": "b"}, "anchor/positive", {"anchor": "a", "positive": "b"}),
        (
            {"anchor": "a", "positive": "b", "negative": "c"},
            "anchor/positive/negative",
            {"anchor": "a", "positive": "b", "negative": "c"},
        ),
    ],
)
def test_every_shape_is_recognised_and_normalised(tmp_path, raw, shape, row):
    for name, content in [("rows.jsonl", [raw, raw]), ("rows.json", [raw, raw]), ("rows.json", {"data": [raw, raw]})]:
        rows = read_rows(write(tmp_path, name, content))
        assert rows == [row, row]
        assert row_shape(rows[0]) == shape


def test_message_keys_are_kept_and_roles_translated(tmp_path):
    raw = {"messages": [{"from": "observation", "value": "42", "name": "calculator"}]}
    assert read_rows(write(tmp_path, "a.jsonl", [raw])) == [
        {"messages": [{"role": "tool", "content": "42", "name": "calculator"}]}
    ]


def test_jsonl_splits_at_line_ends_only(tmp_path):
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "one\xe2\x80\xa8two"}\r\n\n{"text": "three"}')
    assert read_rows(path) == [{"text": "one\u2028two"}, {"text": "three"}]


def test_csv_and_tsv(tmp_path):
    csv = 'text,label,id\n"one, ""two""\nthree",yes,1\n\nfour,no,2\n'
    assert read_rows(write(tmp_path, "a.csv", csv)) == [
        {"text": 'one, "two"\nthree', "label": "yes"},
        {"text": "four", "label": "no"},
    ]
    assert read_rows(write(tmp_path, "a.tsv", 'sentence\tlabel\n"one\t1\n')) == [{"text": '"one', "label": "1"}]
    assert read_rows(write(tmp_path, "b.tsv", "good film\t1\nbad film\t0\n")) == [
        {"text": "good film", "label": "1"},
        {"text": "bad film", "label": "0"},
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_fields_of_any_length(tmp_path, name):
    """Also beyond the limit of Python's csv module, which stays what it was."""
    limit, sign = csv.field_size_limit(), "," if name == "a.csv" else "\t"
    long = "the river runs. " * 10_000
    assert read_rows(write(tmp_path, name, f"text{sign}label\n{long}{sign}1\nshort{sign}0\n"))[0]["text"] == long
    assert csv.field_size_limit() == limit


def test_csv_is_read_as_by_the_csv_module(tmp_path):
    """Random tables of quotes, separators and all line ends: the same rows, or refused by both."""
    draw = random.Random(0)
    refused = 0
    for _ in range(3000):
        text = "".join(draw.choice('ab\u2028 ",,\n\r""') for _ in range(draw.randrange(1, 25)))
        try:
            expected = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if any(row)]
        except csv.Error:
            refused += 1
            with pytest.raises(ValueError, match="quote"):
                list(csv_records(text, tmp_path))
        else:
            assert [fields for _, fields in csv_records(text, tmp_path)] == expected
    assert 300 < refused < 2700


def test_empty_columns_and_other_signs_of_spreadsheets(tmp_path):
    table = '\ufefftext,label,,\r\n5" disk,x,,\r\n,,,\r\na\u2028b\x85c,y,,\r\n'
    assert read_rows(write(tmp_path, "a.csv", table)) == [
        {"text": '5" disk', "label": "x"},
        {"text": "a\u2028b\x85c", "label": "y"},
    ]
    assert read_rows(write(tmp_path, "a.tsv", table.replace(",", "\t")))[1]["text"] == "a\u2028b\x85c"


def test_conll_tokens_hold_any_space_but_plain_ones(tmp_path):
    tokens = ["10\u00a0000", "10\u2009000", "\u6771\u3000\u4eac", "a\u2028b", "a\x85b", "\u00a0", "a\x0bb"]
    for sign in (" ", "   ", "\t"):
        text = "".join(f"{token}{sign}B-x\r\n" for token in tokens) + "\r\nOk" + sign + "O\r\n"
        rows = read_rows(write(tmp_path, "a.conll", text))
        assert [row["tokens"] for row in rows] == [tokens, ["Ok"]]


def test_txt_is_one_document(tmp_path):
    assert read_rows(write(tmp_path, "a.txt", "one\n\ntwo\n")) == [{"text": "one\n\ntwo\n"}]


def test_conll(tmp_path):
    text = "-DOCSTART- -X- O\n\nAda NNP B-person\nwrote VBD O\n\n\nGo VB O\n"
    assert read_rows(write(tmp_path, "a.conll", text)) == [
        {"tokens": ["Ada", "wrote"], "tags": ["B-person", "O"]},
        {"tokens": ["Go"], "tags": ["O"]},
    ]
    assert read_rows(write(tmp_path, "a.iob2", "New York \tB-loc\r\n#\tO\r\n")) == [
        {"tokens": ["New York", "#"], "tags": ["B-loc", "O"]}
    ]


def test_squad_layout_is_flattened(tmp_path):
    questions = [
        {"id": "q1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]},
        {"id": "q2", "question": "Where?", "answers": [], "is_impossible": True},
    ]
    squad = {"version": "x", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": questions}]}]}
    rows = read_rows(write(tmp_path, "a.json", squad))
    assert rows[0] == SQUAD
    assert rows[1]["answers"] == {"text": [], "answer_start": []}
    questions[0]["answers"][0]["answer_start"] = 0.0  # as pandas leaves it beside missing values
    assert read_rows(write(tmp_path, "a.json", squad))[0] == SQUAD
    questions[0]["answers"][0]["answer_start"] = 2
    with pytest.raises(ValueError, match=r"a.json question 1 \(id q1\): answer 'Ada' is not at answer_start 2"):
        read_rows(write(tmp_path, "a.json", squad))
    del questions[1]["question"]
    questions[0]["answers"][0]["answer_start"] = 0
    with pytest.raises(ValueError, match=r"not SQuAD's layout after question 2 \(KeyError 'question'\)"):
        read_rows(write(tmp_path, "a.json", squad))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", " \n\n", "a.jsonl: the file is empty"),
        ("a.json", "[]", "a.json: no rows in it"),
        ("a.csv", "text,label\n", "a.csv: no rows in it"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl line 2: byte 24 is not UTF-8"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "\xff"}\n', "a.jsonl line 1: byte 13 is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "a.jsonl line 3: not JSON .*column"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', "a.json: not JSON .*line 2, column 9"),
        ("a.jsonl", '[{"text": "a"}]', "a.jsonl line 1: an array, not an object"),
        ("a.jsonl", '{"text": "a"}\n3', "a.jsonl line 2: expected an object, found int"),
        ("a.json", '{"text": "a"}', "a.json: expected an array"),
        ("a.json", "[" * 100_000, "a.json: JSON that is nested too deeply"),
        (
            "a.jsonl",
            '{"question": "a", "reply": "b"}',
            "line 1: the fields question, reply make no known shape.*text/label",
        ),
        ("a.jsonl", "{}", r"line 1: the fields \(none\) make no known shape"),
        ("a.jsonl", '{"text": "a"}\n{"text": "a", "label": "b"}', "line 2: a text/label row, but line 1 is text;"),
        ("a.json", '[{"prompt": "a", "completion": null}]', "row 1: field 'completion' must be text, not null"),
        ("a.jsonl", '{"text": 3}', "line 1: field 'text' must be text, not a number"),
        ("a.jsonl", '{"text": "\\ud83d"}', "line 1: field 'text' holds half of a surrogate pair at character 0"),
        ("a.jsonl", '{"text": "a", "label": null}', "line 1: field 'label' must be text or a number, not null"),
        ("a.jsonl", '{"text": "a", "label": ""}', "line 1: field 'label' .* not empty"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}', "line 1: 1 tokens but 2 tags"),
        ("a.jsonl", '{"tokens": "a", "tags": ["O"]}', "line 1: field 'tokens' must be a list"),
        ("a.jsonl", '{"messages": []}', "line 1: field 'messages' must be a list of messages, not empty"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"line 1: messages\[0\] has no 'content'"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": null}]}',
            r"messages\[0\]: field 'content' must be text",
        ),
        ("a.jsonl", '{"messages": [{"role": "poet", "content": ""}]}', r"messages\[0\]: role 'poet' is unknown"),
        ("a.jsonl", '{"chosen": "a", "rejected": "b"}', "line 1: no 'prompt'"),
        ("a.csv", "text,label\na,1\nb,c,2\n", r"a.csv line 3: 3 fields where the header has 2 \(text, label\)"),
        ("a.csv", 'text,label\n"a,1\n', "a.csv line 2: a quote that opens a field here is never closed"),
        ("a.csv", 'text,label\n"a\n\nb",1\n"c\n\nd"e,1\n', "a.csv line 7: 'e,1.*, which opened in line 5"),
        ("a.csv", 'text,label\n"a\nb,1\nc",2,3\n', "a.csv line 2: 3 fields where the header has 2"),
        ("a.csv", "text;label\na;1\n", "line 1: no known column among text;label; separate columns by commas"),
        ("a.csv", "text,label\na,\n", "a.csv line 2: field 'label' .* not empty"),
        ("a.csv", 'text,label\n"a\n\nb",1\nc,nan\n', "a.csv line 5: field 'label' is 'nan'"),
        ("a.csv", "text,label\na,nan\n", "a.csv line 2: field 'label' is 'nan'"),
        ("a.csv", b"text,label\na\0,1\n", "a.csv line 2: byte 12 is zero, as in UTF-16"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "line 1: byte 0 is not UTF-8; the file is UTF-16"),
        ("a.tsv", "text\tlabel\na\tb\t1\n", "line 2: 3 fields .*holds no tab and no line end"),
        ("a.jsonl", '{"text": "a", "label": 1, "label": 2}', "line 1: .*the field 'label' stands twice in one object"),
        ("a.jsonl", '{"text": NaN, "label": 1}', "line 1: field 'text' must be text, not NaN"),
        ("a.jsonl", '{"tokens": [], "tags": []}', "line 1: field 'tokens' must be a list .* not empty"),
        ("a.conll", "a O\n\u00a0\n", "a.conll line 2: expected a token and its tag"),
        ("a.csv", "review,stars\na,1\n", "a.csv line 1: no known column among review, stars"),
        ("a.csv", "text,text\na,1\n", "a.csv line 1: the column 'text' stands there twice"),
        ("a.tsv", "good\t1\nbad\tfilm\t0\n", "a.tsv line 2: 3 fields where line 1 has 2"),
        ("a.tsv", "review\tstars\na\t1\nb\t1\n", "a.tsv line 1: 'stars' occurs nowhere else as a label"),
        (
            "a.conll",
            "Ada\tB-person\nwrote\n",
            "a.conll line 2: expected a token and its tag in 2 columns, as on line 1, found 'wrote'",
        ),
        ("a.conll", "\nAda B\n# id 7 x\n", "a.conll line 3: expected a token and its tag in 2 columns, as on line 2"),
        ("a.xlsx", "x", "a.xlsx: unknown kind of file '.xlsx'; use one of .jsonl"),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_rows(write(tmp_path, name, content))
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jsonl: no such file"):
        read_rows(tmp_path / "gone.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="folder.jsonl: a folder, where a file of rows"):
        read_rows(str(tmp_path / "folder.jsonl"))


def test_split_is_repeatable_complete_and_stratified():
    rows = [{"text": str(i), "label": "rare" if i % 10 == 0 else "common"} for i in range(200)]
    train, held = split_rows(rows, 0.1, seed=3)
    assert (train, held) == split_rows(rows, 0.1, seed=3)
    assert held != split_rows(rows, 0.1, seed=4)[1]
    assert sorted(train + held, key=lambda row: int(row["text"])) == rows
    assert [row["label"] for row in held].count("rare") == 2
    assert len(held) == 20
    assert held == sorted(held, key=lambda row: int(row["text"]))


def test_split_keeps_a_row_of_every_label_in_train():
    rows = [{"text": "x", "label": label} for label in "aab"]
    train, held = split_rows(rows, 0.5, seed=0)
    assert {row["label"] for row in train} == {"a", "b"}
    assert len(held) == 1


def test_split_of_many_small_labels_holds_out_the_share():
    rows = [{"text": "x", "label": str(i // 3)} for i in range(30)]
    assert len(split_rows(rows, 0.1, seed=0)[1]) == 3
    assert len(split_rows([{"text": str(i)} for i in range(7)], 0.3, seed=0)[1]) == 2
    # 0.9 and 3.0 of them: the one more goes where rounding down lost most.
    _, held = split_rows([{"text": "x", "label": label} for label in "aaabbbbbbbbbb"], 0.3, seed=0)
    assert [row["label"] for row in held] == list("abbb")


@pytest.mark.parametrize(
    ("rows", "share"), [([{"text": "a"}] * 5, 0.0), ([{"text": "a"}] * 5, 1.0), ([{"text": "a"}], 0.5)]
)
def test_split_refuses(rows, share):
    with pytest.raises(ValueError, match="hold out|held out"):
        split_rows(rows, share, seed=0)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([1, 1.0, 1e0, np.int64(1), np.float64(1), "1", "1.0", "+1", " 1 ", "1.", "1.000e+00"], "1"),
        ([0, -0.0, "-0", "0.0", "-0.00"], "0"),
        ([-3, -3.0, "-3.0"], "-3"),
        ([True, "True", "TRUE", "true"], "true"),
        ([0.5, "0.5"], "0.5"),
        (["01"], "01"),
        (["3.10"], "3.10"),
        (["1e400"], "1e400"),
        ([12345678901234567890, "12345678901234567890"], "12345678901234567890"),
        (["None", "None "], "None"),
    ],
)
def test_a_class_has_one_name_however_it_is_written(values, name):
    assert {label_name(value) for value in values} == {name}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("nan"), "not NaN, a missing value"),
        (float("inf"), "not infinite"),
        ("nan", "is 'nan', which is what a missing value becomes"),
        (" NaN", "is 'NaN'"),
        ("<NA>", "is '<NA>'"),
        ("  ", "not empty"),
        (None, "not null"),
        (["a"], "not a list"),
        ("\ud83d", "half of a surrogate pair"),
    ],
)
def test_a_missing_label_is_no_class(value, says, tmp_path):
    with pytest.raises(ValueError, match=f"^field 'label' .*{says}"):
        label_name(value)
    rows = [{"tokens": ["a", "b"], "tags": ["O", value]}]
    with pytest.raises(ValueError, match=rf"a.jsonl line 1: tags\[1\] .*{says}"):
        read_rows(write(tmp_path, "a.jsonl", rows))
    with pytest.raises(ValueError, match="row 1: field 'label' "):
        label_names(rows)


def test_texts_to_be_continued_or_labelled_need_no_label(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\na,\nb,nan\nc,x\n")
    assert read_prompts(path) == [{"text": text} for text in "abc"]


def test_labels_that_name_one_class_are_refused():
    assert label_ids(["no", "1.0", "True"]) == {"no": 0, "1": 1, "true": 2}
    with pytest.raises(ValueError, match="labels '1' and '1.0' name one class, '1'"):
        label_ids(["1", "0", "1.0"])


def test_label_names():
    assert label_names([{"text": "", "label": label} for label in ["b", "a", "b"]]) == ["a", "b"]
    assert label_names([{"text": "", "label": label} for label in ["10", "9", "-1"]]) == ["-1", "9", "10"]
    assert label_names([{"tokens": ["x"] * 3, "tags": ["I-x", "O", "B-x"]}]) == ["O", "B-x", "I-x"]
    with pytest.raises(ValueError, match="row 2: a text row has neither label nor tags"):
        label_names([{"text": "", "label": "a"}, {"text": ""}])

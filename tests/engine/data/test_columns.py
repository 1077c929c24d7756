"""Columns by name, and prompts made of them: in training, and in what is asked later."""

import json
from pathlib import Path

import pytest
from small_runs import write_rows

from handtune.engine.data.columns import Columns, PromptTemplate
from handtune.engine.data.readers import read_prompts, read_rows

QA = [{"question": "who?", "answer": "the cat", "id": 1}, {"question": "where?", "answer": "here", "id": 2}]
TEMPLATE = "Question: {question}\nAnswer:"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_renamed(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", [{"review": "good", "stars": 5, "text": "not this"}])
    columns = Columns({"text": "review", "label": "stars"})
    assert read_rows(rows, columns) == [{"text": "good", "label": "5"}]
    assert read_rows(write(tmp_path / "a.csv", "stars,review\n5,good\n"), columns) == [{"text": "good", "label": "5"}]
    assert read_rows(write(tmp_path / "b.csv", "text,stars\ngood,5\n"), Columns({"label": "stars"})) == [
        {"text": "good", "label": "5"}
    ]
    # Two columns with unknown names are a header here, and rows where nothing is said of columns.
    table = write(tmp_path / "a.tsv", "stars\treview\n5\tgood\n")
    assert read_rows(table, columns) == [{"text": "good", "label": "5"}]
    assert len(read_rows(table)) == 2
    chats = [{"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    messages = read_rows(write_rows(tmp_path / "b.jsonl", chats), Columns({"messages": "conversation"}))
    assert messages == [{"messages": chats[0]["conversation"]}]
    swapped = write_rows(tmp_path / "c.jsonl", [{"prompt": "b", "completion": "a"}])
    assert read_rows(swapped, Columns({"prompt": "completion", "completion": "prompt"})) == [
        {"prompt": "a", "completion": "b"}
    ]


@pytest.mark.parametrize(
    ("name", "content", "names", "message"),
    [
        (
            "a.csv",
            "review,stars\na,1\n",
            {"text": "reviews", "label": "stars"},
            "a.csv line 2: no column 'reviews', which data.columns.text names; there are review, stars "
            r"\(the first line of a table names its columns\)",
        ),
        ("a.jsonl", '{"a": "x"}\n{"b": "x"}\n', {"text": "a"}, "a.jsonl line 2: no column 'a', .* there are b"),
        ("a.jsonl", "3\n", {"text": "a"}, "a.jsonl line 1: expected an object, found int"),
        (
            "a.jsonl",
            '{"a": "x", "text": "y", "label": 1}',
            {"completion": "a"},
            "line 1: data.columns.completion: a row of text, label has no such field",
        ),
        ("a.jsonl", '{"a": "x"}', {"label": "a"}, "line 1: the fields label make no known shape"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, content, names, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_rows(write(tmp_path / name, content), Columns(names))
    assert "\n" not in str(error.value)


def test_a_column_that_another_one_hides_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where `generate` has written its answers beside those that were there before."""
    rows = [{"question": "a", "reply": "old", "prompt": "a", "completion": " new"}] * 2
    path = write_rows(tmp_path / "rows.jsonl", rows)
    read = read_rows(path, Columns({"completion": "reply"}, "{question}"))
    assert [(row["prompt"], row["completion"]) for row in read] == [("a", "old")] * 2
    told = capsys.readouterr().err
    assert told.endswith(
        "rows.jsonl: completion is the column 'reply', as data.columns says; the column 'completion', which is there, "
        "too, is not read\n"
    )
    assert told.count("\n") == 1
    read_rows(path, Columns({"completion": "prompt", "prompt": "completion"}))
    assert capsys.readouterr().err == ""


def test_prompts_are_made_of_columns(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", QA)
    columns = Columns({"completion": "answer"}, TEMPLATE)
    assert read_rows(rows, columns) == [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": row["answer"]} for row in QA
    ]
    # What the template asks with makes no other shape of the row; what goes with a prompt stays.
    squad = {"question": "q", "context": "c", "answers": {}, "prompt": "not this", "chosen": "x", "rejected": "y"}
    rows = write_rows(tmp_path / "b.jsonl", [squad])
    assert read_rows(rows, Columns(prompt="{context} {question}")) == [
        {"prompt": "c q", "chosen": "x", "rejected": "y"}
    ]
    assert PromptTemplate("{{{a}}} {a} {b.c} {d[0]}").render({"a": 1, "b.c": 2.5, "d[0]": "x"}) == "{1} 1 2.5 x"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": ""}, "line 1: column 'question' is empty, and the prompt is made of it"),
        ({"question": " \n"}, "column 'question' is empty"),
        ({"question": None}, "column 'question' is null"),
        ({"question": ["a"]}, "column 'question' is a list"),
        ({"question": True}, "column 'question' is true/false"),
        ({"question": float("nan")}, "column 'question' is NaN, a missing value"),
        ({"ask": "x"}, r"line 1: no column 'question', which the prompt 'Question: .*' is made of; there are ask, com"),
        ({"question": "q", "system": "s"}, "field 'system' has no place in a row whose prompt is text"),
    ],
)
def test_empty_and_unknown_columns_are_refused(tmp_path, row, message) -> None:
    rows = write(tmp_path / "a.jsonl", json.dumps({**row, "completion": "x"}) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_rows(rows, Columns(prompt=TEMPLATE))
    assert "\n" not in str(error.value)


def test_templates_reach_nothing_but_columns() -> None:
    """One may come with somebody else's adapter."""
    row = {"a": "x"}
    for text in ("{a.__class__}", "{a[0]}", "{0}"):
        with pytest.raises(ValueError, match="no column"):
            PromptTemplate(text).render(row)
    for text in ("{a!r}", "{a:>9}", "{a:{b}}", "{}", "{!r}", "{a", "a}", "none", "{{a}}"):
        with pytest.raises(ValueError, match=r"braces hold the name|double a brace|names no column"):
            PromptTemplate(text)


def test_what_is_asked_later_is_asked_in_the_same_way(tmp_path: Path) -> None:
    """Rows with the columns, prompts that the template has made, single questions, dialogues."""
    template = PromptTemplate(TEMPLATE)
    rendered = "Question: who?\nAnswer:"
    for raw in (QA[0], {"prompt": "who?"}, {"text": "who?"}, {"prompt": rendered}, {**QA[0], "prompt": "other"}):
        rows = read_prompts(write_rows(tmp_path / "a.jsonl", [raw]), lambda _: template)
        assert [row.get("prompt", row.get("text")) for row in rows] == [rendered], raw
    dialogue = {"messages": [{"role": "user", "content": "who?"}]}
    assert read_prompts(write_rows(tmp_path / "a.jsonl", [dialogue]), lambda _: template) == [dialogue]
    adapters = read_prompts(write_rows(tmp_path / "a.jsonl", [{**QA[0], "adapter": "b"}]), lambda _: template)
    assert adapters == [{"prompt": rendered, "adapter": "b"}]

    two = PromptTemplate("{context} {question}!")
    assert two.asked({"prompt": "a b!"}) == {"prompt": "a b!"}
    with pytest.raises(ValueError, match=r"no column 'context', which the prompt .* there are prompt$"):
        two.asked({"prompt": "who?"})
    # A single column that is called otherwise is a template, too.
    assert Columns({"prompt": "a {b"}).remembered == "{a {{b}"
    assert Columns({"completion": "x"}, "{a}").remembered == "{a}"


def test_what_a_template_has_made_is_known_again() -> None:
    template = PromptTemplate("<{a}> and <{b}>{{}}")
    made = template.render({"a": "x> and <", "b": "y"})
    assert template.has_made(made)
    for other in ("", made[1:], made[:-1], "<> and{}", "<x> und <y>{}"):
        assert not template.has_made(other), other

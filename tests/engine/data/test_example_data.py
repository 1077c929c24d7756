"""The example data sets written for this project: offsets right, lengths as promised, nothing empty or repeated."""

import json

import pytest
from project import EXAMPLES

from handtune.engine.data.readers import read_rows

DIABETES = EXAMPLES / "diabetes-qa"


@pytest.mark.parametrize(
    ("name", "passages", "questions"), [("passages.json", 41, 174), ("passages-eval.json", 24, 102)]
)
def test_passages(name, passages, questions):
    articles = json.loads((DIABETES / name).read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    assert len(paragraphs) == passages
    assert all(60 <= len(paragraph["context"].split()) <= 130 for paragraph in paragraphs)
    assert all(4 <= len(paragraph["qas"]) <= 5 for paragraph in paragraphs)
    rows = read_rows(DIABETES / name)  # which checks that each answer is at its offset
    assert len(rows) == questions
    assert len({question["id"] for paragraph in paragraphs for question in paragraph["qas"]}) == questions
    assert all(row["question"].endswith("?") and len(row["answers"]["text"]) == 1 for row in rows)
    for row in rows:
        text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        before, after = row["context"][start - 1 : start], row["context"][start + len(text) :][:1]
        assert text == text.strip() and not before.isalnum() and not after.isalnum(), text


def test_held_out_passages_are_not_trained_on():
    parts = [read_rows(DIABETES / name) for name in ("passages.json", "passages-eval.json")]
    contexts, held_out = ({row["context"] for row in part} for part in parts)
    assert not contexts & held_out
    questions = [(row["question"], row["context"]) for part in parts for row in part]
    assert len(questions) == len(set(questions))


def test_questions_with_free_answers():
    parts = [read_lines(DIABETES / name) for name in ("questions.jsonl", "questions-test.jsonl")]
    assert [len(part) for part in parts] == [200, 100]
    rows = [row for part in parts for row in part]
    assert len({row["question"].lower() for row in rows}) == len({row["answer"].lower() for row in rows}) == 300
    assert all(row["question"].endswith("?") and 30 <= len(row["answer"].split()) <= 70 for row in rows)


def test_clauses_that_are_judged():
    """No clause comes twice or nearly so, in one file or in both, and both kinds of fairness are in each."""
    parts = [read_lines(EXAMPLES / "clauses" / name) for name in ("clauses.jsonl", "clauses-test.jsonl")]
    assert [len(part) for part in parts] == [402, 100]
    for part in parts:
        kinds = [row["fairness"] for row in part]
        assert set(kinds) == {"balanced", "one-sided"} and min(map(kinds.count, set(kinds))) >= 0.3 * len(part)
    rows = [row for part in parts for row in part]
    assert_distinct(rows, "clause", "summary")
    assert all(40 <= len(row["clause"].split()) <= 110 for row in rows)
    assert all(5 <= len(row["summary"].split()) <= 40 for row in rows)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_distinct(rows, text, summary) -> None:
    for field in (text, summary):
        texts = [" ".join(row[field].lower().split()) for row in rows]
        assert len(texts) == len(set(texts))
        assert all(row[field] == row[field].strip() and "\n" not in row[field] for row in rows)
    words = [set(row[text].lower().split()) for row in rows]
    pairs = ((a, b) for i, a in enumerate(words) for b in words[:i])
    assert max(len(a & b) / len(a | b) for a, b in pairs) < 0.6

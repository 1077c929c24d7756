"""The rows, the questions and the rule of examples/chat."""

import json
import re
import runpy
from types import SimpleNamespace

import pytest
from project import EXAMPLES

demo = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "chat/demo.py")))
ROWS = demo.read(EXAMPLES / "chat/rows.jsonl")
QUESTIONS = demo.read(EXAMPLES / "chat/questions.jsonl")


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_every_answer_is_made_of_its_request():
    assert len(ROWS) >= 300 and len(QUESTIONS) == 50
    for row in [*ROWS, *QUESTIONS]:
        answer = json.loads(row["completion"])
        assert list(answer) == list(demo.KEYS) and answer["do"] in demo.TOLD
        for value in (answer["what"], answer["when"]):
            assert value is None or words(value) <= words(row["prompt"]), row


def test_no_question_is_among_the_rows_nor_nearly():
    rows = [words(row["prompt"]) for row in ROWS]
    for index, request in enumerate(rows):
        assert request not in rows[:index]
    for question in QUESTIONS:
        request = words(question["prompt"])
        assert max(len(request & row) / len(request | row) for row in rows) <= 0.6, question


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"do": "call", "what": "Ingrid", "when": null}', {"valid", "do", "what", "when"}),
        (' {"when": null, "what": "INGRID", "do": "call"}\n', {"valid", "do", "what", "when"}),
        ('{"do": "call", "what": "Ingrid", "when": "null"}', {"valid", "do", "what"}),
        ('{"do": "call", "what": "Ingrid"}', set()),
        ('{"do": "call", "what": "Ingrid", "when": null, "who": 1}', set()),
        ('{"do": "call",\n"what": "Ingrid", "when": null}', set()),
        ('Sure! {"do": "call", "what": "Ingrid", "when": null}', set()),
        ("[1]", set()),
    ],
)
def test_the_rule_takes_one_line_of_json_with_the_three_keys(answer, right):
    assert demo.right_keys(answer, '{"do": "call", "what": "Ingrid", "when": null}') == right


def test_the_table_counts_what_is_right():
    rows = [{"prompt": "", "completion": '{"do": "call", "what": "Ingrid", "when": null}'}] * 2
    texts = [rows[0]["completion"], '{"do": "call", "what": null, "when": null}']
    assert demo.table(rows, {"after": texts}).splitlines()[1].split() == ["after", "2", "2", "1", "2", "1"]

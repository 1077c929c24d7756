"""Labels by a causal model: the calibrated likelihoods by hand, what it finds, and what is done with it."""

import json
from pathlib import Path

import pytest
import torch
from small_commands import talker_folder
from small_runs import gpt2_folder, write_rows
from small_templates import CHATML
from tokenizers import Tokenizer

from handtune.cli import main
from handtune.commands.label import label_and_words
from handtune.engine.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from handtune.engine.data.readers import read_rows
from handtune.engine.data.schema import as_dialogue
from handtune.engine.prediction.zero_shot import WITHOUT_CONTENT, label_texts
from handtune.engine.tasks.encode import encode
from handtune.models import GPT2, load

WORDS = {"good": "the cat sat", "bad": "dog", "none": "x"}


@pytest.fixture
def model(tmp_path: Path) -> tuple[GPT2, Tokenizer]:
    model, words = load(gpt2_folder(tmp_path / "base"), device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.embed.tokens.weight.normal_(0, 0.3)
    assert words is not None
    return model, words


def test_likelihoods_by_hand(model: tuple[GPT2, Tokenizer]) -> None:
    gpt, words = model
    texts = ["the mat", "a dog ran", "on the mat the cat sat"]

    def logp(text: str, word: str) -> float:
        prompt = words.encode(f"{text} is ", add_special_tokens=False).ids
        ids = prompt + words.encode(word, add_special_tokens=False).ids
        with torch.no_grad():
            logits = gpt(torch.tensor([ids]))[0].log_softmax(-1)
        return sum(float(logits[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))

    found = label_texts(gpt, words, texts, WORDS, "{text} is {label}", batch_size=2)
    for text, one in zip(texts, found, strict=True):
        scores = {
            name: logp(text, word) - sum(logp(empty, word) for empty in WITHOUT_CONTENT) / 3
            for name, word in WORDS.items()
        }
        belief = torch.tensor(list(scores.values())).softmax(0)
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)
        assert (one.label, one.second) == (ranked[0], ranked[1])
        assert one.confidence == pytest.approx(float(belief.max()), rel=1e-4)


@pytest.mark.parametrize("template", [CHATML, DEFAULT_TEMPLATE], ids=["ChatML", "plain"])
def test_through_a_chat_template(template: str, model: tuple[GPT2, Tokenizer]) -> None:
    """The labels' words as training would have them behind the rendered question, with the space that is theirs."""
    gpt, words = model
    chat = ChatTemplate(template, eos_token="<|end|>")
    texts = ["the mat", "a dog ran"]

    def logp(text: str, word: str) -> float:
        row = as_dialogue({"prompt": f"is {text} good?", "completion": f" {word}"})
        (example,), _ = encode([row], words, "sft", max_length=64, eos=0, template=chat)
        n = [t >= 0 for t in example["targets"]].index(True)
        answer = words.encode((" " if template is DEFAULT_TEMPLATE else "") + word, add_special_tokens=False).ids
        assert example["targets"][n : n + len(answer)] == answer
        with torch.no_grad():
            logps = gpt(torch.tensor([example["input_ids"]]))[0].log_softmax(-1)
        return sum(float(logps[n + i, token]) for i, token in enumerate(answer))

    found = label_texts(gpt, words, texts, WORDS, "is {text} good? {label}", chat=chat)
    for text, one in zip(texts, found, strict=True):
        scores = {
            name: logp(text, word) - sum(logp(empty, word) for empty in WITHOUT_CONTENT) / 3
            for name, word in WORDS.items()
        }
        belief = torch.tensor(list(scores.values())).softmax(0)
        assert one.label == max(scores, key=scores.__getitem__)
        assert one.confidence == pytest.approx(float(belief.max()), rel=1e-4)


def test_refusals(model: tuple[GPT2, Tokenizer]) -> None:
    gpt, words = model
    for labels, template, says in (
        ({"a": "a"}, "{text}{label}", "give at least two"),
        (WORDS, "{text}", "it needs a {text}"),
        (WORDS, "{label} {text}", "it needs a {text}"),
        (WORDS, "{text} {label} so", "it needs a {text}"),
    ):
        with pytest.raises(ValueError, match=says):
            label_texts(gpt, words, ["x"], labels, template)
    with pytest.raises(ValueError, match="--labels 'nan=not a number' is 'nan', which is what a missing value becomes"):
        label_and_words("nan=not a number")
    with pytest.raises(ValueError, match="text 2: with template and label"):
        label_texts(gpt, words, ["x", "x" * 5000], WORDS)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Rows that `train` reads, the least certain first, and that `compare` shows."""
    model = str(Path("tests/kjv-gpt").resolve())
    rows = [{"text": text} for text in ("And God said unto Moses", "And the woman bare a", "The LORD is my")]
    data = str(write_rows(tmp_path / "texts.jsonl", rows))
    monkeypatch.chdir(tmp_path)
    labels = ["child=son", "law=commandment", "shepherd"]
    command = ["label", model, data, "--labels", *labels, "--out", "labelled.jsonl", "--template", "{text} {label}"]
    assert main([*command, "--sort"]) == 0
    assert "3 rows written to labelled.jsonl: child" in capsys.readouterr().out
    found = [json.loads(line) for line in Path("labelled.jsonl").read_text().splitlines()]
    assert [row["confidence"] for row in found] == sorted(row["confidence"] for row in found)
    assert {row["text"]: row["label"] for row in found}["And the woman bare a"] == "child"
    assert {frozenset(row) for row in read_rows("labelled.jsonl")} == {frozenset({"text", "label"})}

    # A text a line, of a file that would be one document to learn from.
    Path("texts.txt").write_text("".join(f"{row['text']}\n" for row in rows))
    command[command.index(data)] = "texts.txt"
    assert main([*command, "--sort", "--force"]) == 0
    assert [json.loads(line) for line in Path("labelled.jsonl").read_text().splitlines()] == found
    Path("agree.py").write_text("def agree(prompt, left, right):\n    return 'left'\n")
    assert main(["compare", "--pairs", "labelled.jsonl", "--out", "seen.jsonl", "--labeler", "agree:agree"]) == 0
    assert len(read_rows("seen.jsonl")) == 3
    assert main(["label", model, data, "--labels", "one", "--out", "x.jsonl"]) == 2
    assert "give at least two" in capsys.readouterr().err


def test_a_model_with_a_template_is_asked_through_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Unless it was trained without, or --raw is given."""
    data = write_rows(tmp_path / "texts.jsonl", [{"text": "the mat"}])
    folder = talker_folder(tmp_path / "talker")
    confidences = []
    for number, options in enumerate(([], ["--raw"], [])):
        if number == 2:
            settings = json.loads((folder / "generation_config.json").read_text())
            (folder / "generation_config.json").write_text(json.dumps({**settings, "handtune_asks_as_chat": False}))
        out = tmp_path / f"{number}.jsonl"
        command = ["label", str(folder), str(data), "--labels", "good", "bad", "--out", str(out), *options]
        assert main(command) == 0
        assert ("asked through the chat template" in capsys.readouterr().err) == (number == 0)
        confidences.append(json.loads(out.read_text())["confidence"])
    assert confidences[0] != confidences[1] == confidences[2]

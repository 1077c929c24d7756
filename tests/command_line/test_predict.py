"""`handtune predict` and `handtune.predict` on runs that the command line trained, beside what others make of them."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_images import picture
from small_methods import RUNS, base_folder, method_config
from small_runs import QUESTIONS, SENTIMENT, TAGGED, gpt2, write_rows
from small_tokenizers import byte_level

import handtune
from handtune.cli import main
from handtune.engine.data.batches import IGNORE
from handtune.engine.data.placed_rows import PlacedRow
from handtune.engine.rlhf.reward_model import Reward
from handtune.engine.tasks.question_answering import predicted_answer
from handtune.engine.tasks.tagging import predicted_tags, word_spans
from handtune.models import load
from handtune.models.tokenizer.special_tokens import SpecialTokens

# What trains in each run; predictions of an adapter are compared with those of the merged model.
TRAINED: dict[str, dict[str, Any]] = {
    "classify": {"train": {"epochs": 3}},
    "tag": {"lora": {"rank": 4, "alpha": 16}, "train": {"epochs": 20, "lr": 1e-2}},
    "qa": {"data_max_length": 24, "train": {"epochs": 5}},
    "embed": {},
    "reward": {},
    "images": {"lora": {"rank": 2}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished run of each method whose model predicts."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for name, tables in TRAINED.items():
        (folder / name).mkdir()
        base = base_folder(RUNS[name][0], folder / "bases")
        length = tables.pop("data_max_length", 48)
        config = method_config(name, folder / name, base, **tables)
        config.write_text(config.read_text().replace("max_length = 48", f"max_length = {length}"))
        assert main(["train", str(config)]) == 0
        runs[name] = folder / name / "run"
    return runs


def predicted(*arguments: object, out: Path) -> list[dict[str, Any]]:
    """The rows that the command writes."""
    assert main(["predict", *map(str, arguments), "--out", str(out), "--force"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def merged(run: Path) -> Path:
    """The run's adapter merged into its base."""
    base = json.loads((run / "run.json").read_text())["config"]["model"]["path"]
    out = run.parent / "merged"
    if not out.exists():
        assert main(["merge", base, str(run / "adapter"), str(out)]) == 0
    return out


def test_classes_are_those_of_transformers(runs, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [{**row, "id": i} for i, row in enumerate(SENTIMENT)]
    found = predicted(runs["classify"], write_rows(tmp_path / "rows.jsonl", rows), out=tmp_path / "out.jsonl")
    assert [{name: row[name] for name in ("text", "label", "id")} for row in found] == rows

    model = AutoModelForSequenceClassification.from_pretrained(runs["classify"] / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(runs["classify"] / "model")
    for row in found:
        with torch.no_grad():
            probabilities = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        names = model.config.id2label
        assert row["probabilities"] == pytest.approx(
            {names[i]: value for i, value in enumerate(probabilities.tolist())}, abs=1e-5
        )
        assert row["predicted"] == names[int(probabilities.argmax())]
        assert row["probability"] == max(row["probabilities"].values())


@pytest.mark.parametrize(
    ("problem", "says"), [("regression", "a number"), ("multi_label_classification", "several labels at once")]
)
def test_a_published_head_that_chooses_no_class(problem: str, says: str, runs, tmp_path, capsys) -> None:
    folder = shutil.copytree(runs["classify"] / "model", tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": problem}))
    assert main(["predict", str(folder), "--text", "the dog"]) == 2
    assert f"its head says {says}, and one class of several is predicted here" in capsys.readouterr().err


def test_entities_are_those_of_transformers(runs, tmp_path) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    model = merged(runs["tag"])
    theirs = pipeline(
        "token-classification", AutoModelForTokenClassification.from_pretrained(model),
        tokenizer=AutoTokenizer.from_pretrained(model), aggregation_strategy="first",
    )  # fmt: skip
    texts = ["the cat looked at Paris", "what a dog!", "Paris is good, the cat (the dog) sat on France ."]
    found = handtune.predict(runs["tag"], texts)
    assert sum(len(row["entities"]) for row in found) > 3
    for text, row in zip(texts, found, strict=True):
        entities = [
            (e["type"], e["start"], e["end"], pytest.approx(e["probability"], abs=1e-5)) for e in row["entities"]
        ]
        assert [(e["entity_group"], e["start"], e["end"], float(e["score"])) for e in theirs(text)] == entities
        assert all(text[e["start"] : e["end"]] == e["text"] for e in row["entities"])

    # Rows of tokens also get a tag for each, the merged model says the same, and gold may be there.
    tagged = predicted(runs["tag"], write_rows(tmp_path / "rows.jsonl", TAGGED), out=tmp_path / "out.jsonl")
    assert [row["tags"] for row in tagged] == [row["tags"] for row in TAGGED]
    assert [row["predicted"] for row in tagged] == [row["tags"] for row in TAGGED]
    assert tagged[0]["entities"][1]["text"] == "Paris" and tagged[0]["entities"][1]["start"] == 18
    again = predicted(model, tmp_path / "rows.jsonl", out=tmp_path / "out.jsonl")
    assert [row["predicted"] for row in again] == [row["predicted"] for row in tagged]


def test_entities_of_several_words() -> None:
    """Their characters go from the first word to the last, and how sure they are is the mean over their words."""
    row = PlacedRow({"text": "In New York City, Maria"}, "row", "1")
    example = {"targets": [IGNORE, 0, 1, 2, IGNORE, 3, 4]}  # the last word, Maria, was cut off
    probabilities = np.array([[0.9, 0.1, 0], [0, 0.7, 0.3], [0.2, 0, 0.8], [0, 0.3, 0.7], [1, 0, 0]], dtype=np.float32)
    found = predicted_tags(row, [example], [probabilities], ("O", "B-PLACE", "I-PLACE"))["entities"]
    (place,) = found
    assert place.pop("probability") == pytest.approx((0.7 + 0.8 + 0.7) / 3)
    assert place == {"type": "PLACE", "start": 3, "end": 16, "text": "New York City"}


def test_words_of_plain_text() -> None:
    text = "(“Maria's U.S. trip”, 3.5% up…) 東京 isn't it? ''"
    assert [text[start:end] for start, end in word_spans(text)] == [
        "(", "“", "Maria", "'s", "U.S", ".", "trip", "”", ",", "3.5%", "up", "…", ")", "東", "京", "isn't", "it", "?",
        "'", "'",
    ]  # fmt: skip
    assert word_spans(" \n") == []


def spans(tokenizer: Any, model: Any, row: dict[str, Any], max_length: int) -> Iterator[tuple[float, int, int, float]]:
    """Every span of every window, with its start + end logit less that of no answer in any window, by transformers."""
    question = len(tokenizer(row["question"], add_special_tokens=False)["input_ids"])
    room = max_length - 3 - question
    windows = tokenizer(
        row["question"], row["context"], truncation="only_second", max_length=max_length, stride=min(128, room // 2),
        return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt", padding=True,
    )  # fmt: skip
    inputs = {name: windows[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        out = model(**inputs)
    none = (out.start_logits[:, 0] + out.end_logits[:, 0]).min()
    for i in range(len(inputs["input_ids"])):
        of = windows.sequence_ids(i)
        for a in range(len(of)):
            for b in range(a, min(len(of), a + 30)):
                if of[a] == of[b] == 1:
                    offsets = windows["offset_mapping"][i]
                    score = out.start_logits[i, a] + out.end_logits[i, b]
                    yield float(score - none), int(offsets[a][0]), int(offsets[b][1]), i


def test_answers_are_the_best_spans_of_all_windows(runs) -> None:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    folder = runs["qa"] / "model"
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    long = (
        "the cat sat on the mat, the woman wrote the book. Paris is the capital of France? good morning, a dog looked"
    )
    questions = [{"question": row["question"], "context": row["context"]} for row in QUESTIONS]
    questions.append({"question": "where is it?", "context": long})
    windows = 0
    for row, found in zip(questions, handtune.predict(runs["qa"], questions), strict=True):
        every = list(spans(tokenizer, model, row, 24))
        score, start, end, _ = max(every)
        windows = 1 + every[-1][3]
        assert found["score"] == pytest.approx(score, abs=1e-4)
        assert (found["start"], found["end"], found["answer"]) == (start, end, row["context"][start:end])
    assert windows > 2  # of the last
    assert handtune.predict(runs["qa"], [{"question": "where?", "context": ""}]) == [
        {"answer": None, "start": None, "end": None, "score": None}
    ]


def test_embeddings_are_those_of_transformers(runs, tmp_path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["the cat", "good morning, you are welcome", "what is the capital of France?"]
    arguments = [part for text in texts for part in ("--text", text)]
    found = predicted(runs["embed"], *arguments, out=tmp_path / "out.jsonl")
    model, tokenizer = (loads.from_pretrained(runs["embed"] / "model") for loads in (AutoModel, AutoTokenizer))
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state  # (1, T, D)
        assert row == {"text": text, "embedding": pytest.approx(states.mean(1)[0].tolist(), abs=1e-5)}

    # Where sentence-transformers would stop reading, as its file says.
    short = tmp_path / "short"
    shutil.copytree(runs["embed"] / "model", short)
    (short / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    (cut,) = handtune.predict(short, ["the cat and the dog"])
    assert cut["embedding"] == pytest.approx(found[0]["embedding"], abs=1e-6)

    pair = handtune.predict(runs["embed"], [{"anchor": texts[0], "positive": texts[1], "negative": texts[2]}])[0]
    assert pair["anchor_embedding"] == pytest.approx(found[0]["embedding"], abs=1e-6)
    assert pair["negative_embedding"] == pytest.approx(found[2]["embedding"], abs=1e-6)


def test_rewards_are_the_reward_model_s_own(runs) -> None:
    model, tokenizer = load(runs["reward"] / "model", device="cpu")
    rows = RUNS["reward"][2]
    assert rows is not None
    prompts, chosen = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    scores = Reward(model, tokenizer)(prompts, chosen).tolist()
    assert len(set(scores)) == len(scores)
    compared = handtune.predict(runs["reward"], rows)
    assert [row["chosen_score"] for row in compared] == pytest.approx(scores, abs=1e-5)
    assert all(row["rejected_score"] != row["chosen_score"] for row in compared)

    completions = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, chosen, strict=True)]
    given = handtune.predict(model, completions, tokenizer=tokenizer, max_length=48)
    assert [row["score"] for row in given] == pytest.approx(scores, abs=1e-5)
    alone = handtune.predict(model, [prompts[0] + chosen[0]], tokenizer=tokenizer)
    assert alone[0]["score"] == pytest.approx(scores[0], abs=1e-5)


def test_rewards_of_dialogues_are_read_through_the_template() -> None:
    """A dialogue, a plain prompt, and one that was rendered before: the same tokens, and the same score."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer, model = byte_level(), gpt2("reward").eval()
    ends = (tokenizer.token_to_id("<|im_end|>"),)
    model.tokens = SpecialTokens(ends=ends, chat_template=template).asking_as_chat(True)
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    asked = {"role": "user", "content": "hi"}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": "yes"}]},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": rendered, "completion": "yes"},
    ]
    expected = float(Reward(model, tokenizer)([rendered], ["yes"]))
    scores = [row["score"] for row in handtune.predict(model, rows, tokenizer=tokenizer)]
    assert scores == pytest.approx([expected] * 3, abs=1e-6)

    # An answer that is cut off whole has no score; one that is cut short is read as far as it goes.
    long = {"prompt": "hi" * 40, "completion": "yes"}
    assert handtune.predict(model, [long], tokenizer=tokenizer) == [{"score": None}]


def test_answers_are_told_without_the_space_of_their_token() -> None:
    row = PlacedRow({"question": "?", "context": "on the mat"}, "row", "1")
    examples, logits = [{"offsets": [None, (2, 6), (6, 10)]}], [np.array([[0, 0], [1, 1], [2, 3]], dtype=np.float32)]
    assert predicted_answer(row, examples, logits, ()) == {"answer": "mat", "start": 7, "end": 10, "score": 5}


def test_images_of_a_folder_and_a_single_one(runs, tmp_path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        picture("sea" if i % 2 else "sky", seed=70 + i).save(folder / f"{i}.png")
    found = predicted(runs["images"], folder, out=tmp_path / "out.jsonl")
    assert [row["image"] for row in found] == [str(folder / f"{i}.png") for i in range(5)]
    (single,) = predicted(runs["images"], folder / "3.png", "--batch-size", 1, out=tmp_path / "out.jsonl")
    assert single["probabilities"] == pytest.approx(found[3]["probabilities"], abs=1e-5)

    # The pixels as numpy normalises them: 16 × 16 is what the model sees.
    model, _ = load(merged(runs["images"]), device="cpu")
    mean, std = np.array(model.pixels.mean), np.array(model.pixels.std)
    pixels = [((np.asarray(picture("sea" if i % 2 else "sky", 70 + i)) / 255 - mean) / std) for i in range(5)]
    with torch.no_grad():
        logits = model(torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2))
    expected = logits.softmax(-1)[:, list(model.labels).index("sea")].tolist()
    assert [row["probabilities"]["sea"] for row in found] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["classify", "tag", "qa", "embed", "reward"])
def test_twice_is_the_same_and_other_batches_are_nearly(runs, name, tmp_path) -> None:
    rows = RUNS[name][2]
    assert rows is not None
    file = write_rows(tmp_path / "rows.jsonl", rows)
    predicted(runs[name], file, out=tmp_path / "first.jsonl")
    predicted(runs[name], file, out=tmp_path / "second.jsonl")
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "second.jsonl").read_bytes()

    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict | list):
            return [n for entry in (value.values() if isinstance(value, dict) else value) for n in numbers(entry)]
        return [value] if isinstance(value, float) else []

    one_by_one = handtune.predict(runs[name], rows, batch_size=1)
    together = handtune.predict(runs[name], rows[::-1], batch_size=100)[::-1]
    assert numbers(one_by_one) and numbers(one_by_one) == pytest.approx(numbers(together), abs=1e-5)
    assert [row.keys() for row in one_by_one] == [row.keys() for row in together]


def test_rows_without_text_and_rows_that_are_too_long(runs, tmp_path, caplog, capsys) -> None:
    long = "the dog " * 60
    found = predicted(runs["classify"], "--text", "", "--text", long, out=tmp_path / "out.jsonl")
    assert found[0] == {"text": "", "predicted": None, "probability": None, "probabilities": None}
    (cut,) = handtune.predict(runs["classify"], ["the dog " * 23])  # 46 words beside [CLS] and [SEP]
    assert found[1]["probability"] == pytest.approx(cut["probability"], abs=1e-6)
    assert "1 of 2 rows are longer than the 48 tokens that are read, and were cut: --text 2" in caplog.text
    assert "1 of 2 rows have no text that could be read, or no room for it, and no prediction: --text 1" in caplog.text
    assert capsys.readouterr().out.splitlines()[-1] == f"2 rows written to {tmp_path / 'out.jsonl'}"


def test_a_text_a_line(runs, tmp_path, capsys) -> None:
    """Of a .txt file, which is one document where a model learns from it; and a text without its --text."""
    (tmp_path / "texts.txt").write_text("the dog\r\n\nthe cat\n")
    found = predicted(runs["classify"], tmp_path / "texts.txt", out=tmp_path / "out.jsonl")
    assert [row["text"] for row in found] == ["the dog", "the cat"]
    predicted(runs["classify"], "--text", "the dog", out=tmp_path / "one.jsonl")
    assert capsys.readouterr().out.endswith(f"1 row written to {tmp_path / 'one.jsonl'}\n")
    assert main(["predict", str(runs["classify"]), "--text", "the dog", "the cat"]) == 2
    assert "the cat: no such file; of several texts each has a --text in front" in capsys.readouterr().err


def typed(text: str | bytes) -> io.TextIOWrapper:
    """Standard input that holds this."""
    return io.TextIOWrapper(io.BytesIO(text.encode() if isinstance(text, str) else text), encoding="utf-8")


def test_standard_input_that_is_not_utf_8(runs, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", typed(b"the dog\nb\xe9te\n"))
    assert main(["predict", str(runs["classify"]), "-"]) == 2
    assert "standard input line 2: not UTF-8; save it as UTF-8" in capsys.readouterr().err


def test_a_row_keeps_what_it_has(runs, tmp_path, capsys) -> None:
    """A field that the prediction would take the place of is refused; an earlier prediction as a whole is replaced."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "the dog", "probability": 7, "id": 1}) + "\n")
    assert main(["predict", str(runs["classify"]), str(file)]) == 2
    assert (
        "rows.jsonl line 1: the prediction would take the place of the field 'probability'" in capsys.readouterr().err
    )


def test_rows_of_a_table_without_header(runs, tmp_path, capsys) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text("the good dog\tup\nwhat a day\tdown\n")
    assert main(["predict", str(runs["classify"]), str(file)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["text"], row["label"]) for row in rows] == [("the good dog", "up"), ("what a day", "down")]


def test_standard_input_and_what_a_pipe_gets(runs, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", typed("the good dog\n\n what a day \n"))
    assert main(["predict", str(runs["classify"]), "-"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["the good dog", " what a day "]

    # The file may stand behind the options, too.
    monkeypatch.setattr(sys, "stdin", typed("the good dog\n"))
    assert main(["predict", str(runs["classify"]), "--text", "the cat", "-"]) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert texts == ["the cat", "the good dog"]

    # What it prints it reads: the same predictions in the place of those.
    monkeypatch.setattr(sys, "stdin", typed("".join(json.dumps(row) + "\n" for row in rows)))
    assert main(["predict", str(runs["classify"]), "-"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows

    monkeypatch.setattr("handtune.terminal.Stream.isatty", lambda _: True)
    assert main(["predict", str(runs["classify"]), "--text", "the good\tdog"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"{rows[0]['predicted']} (probability {rows[0]['probability']:.3f})\tthe good\\tdog"


def test_numbers_that_are_none_and_a_text_for_rows(runs) -> None:
    for settings in ({"batch_size": 0}, {"max_length": 0}, {"max_length": 65}):
        with pytest.raises(ValueError, match="expected a"):
            handtune.predict(runs["classify"], ["the cat"], **settings)
    with pytest.raises(TypeError, match="give a list of texts"):
        handtune.predict(runs["classify"], "the cat")
    assert handtune.predict(runs["classify"], []) == []


@pytest.mark.parametrize(
    ("run", "arguments", "says"),
    [
        ("classify", [], "nothing to predict: give a file of rows"),
        ("classify", ["gone.csv"], "gone.csv"),
        ("classify", ["questions.jsonl"], "questions.jsonl line 1: the fields question, context are not"),
        ("classify", ["rows.jsonl", "--out", "rows.jsonl"], "is the file of the rows"),
        ("classify", ["rows.jsonl", "--out", "old.jsonl"], "old.jsonl: is there already"),
        ("classify", ["number.jsonl"], "number.jsonl line 2: field 'text' must be text, not a number"),
        ("classify", ["pictures"], "are not what the model reads: text/text_pair or text"),
        ("qa", ["--text", "the cat"], "--text 1: the fields text are not what the model reads: question/context"),
        ("tag", ["empty.jsonl"], "empty.jsonl line 1: field 'tokens' must be a list"),
        ("images", ["rows.jsonl"], "rows.jsonl line 1: the fields text are not what the model reads: image"),
        ("images", ["pictures"], "notes.txt: no image file"),
        ("images", ["broken.png"], "broken.png: the image can't be decoded"),
        ("reward", ["asked.jsonl"], "asked.jsonl line 1: the messages must end with an answer"),
        ("gpt2", ["rows.jsonl"], "gpt2: a model that writes (causal-lm) has no head to predict with; ask it by"),
        ("bert", ["rows.jsonl"], "a model of masked-lm has no head to predict with; train one onto it"),
        ("headless", ["rows.jsonl"], "headless: no weights there for the head of sequence-classification"),
        ("unfinished", ["rows.jsonl"], "the run has not finished"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(runs, run, arguments, says, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"text": "the cat"}])
    write_rows(tmp_path / "questions.jsonl", [{"question": "where?", "context": "there"}])
    write_rows(tmp_path / "number.jsonl", [{"text": "the cat"}, {"text": 3}])
    write_rows(tmp_path / "empty.jsonl", [{"tokens": []}])
    write_rows(tmp_path / "asked.jsonl", [{"messages": [{"role": "user", "content": "the cat?"}]}])
    (tmp_path / "old.jsonl").write_text("precious\n")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "pictures").mkdir()
    picture("sea", 0).save(tmp_path / "pictures" / "0.png")
    if run == "images":
        (tmp_path / "pictures" / "notes.txt").write_text("notes")

    bases = runs["classify"].parents[1] / "bases"
    if run == "headless":
        base_folder("bert", tmp_path)
        config = json.loads((tmp_path / "bert" / "config.json").read_text())
        (tmp_path / "bert" / "config.json").write_text(
            json.dumps({**config, "architectures": ["BertForSequenceClassification"]})
        )
        (tmp_path / "bert").rename(tmp_path / "headless")
    elif run == "unfinished":
        (tmp_path / "unfinished").mkdir()
        (tmp_path / "unfinished" / "run.json").write_bytes((runs["tag"] / "run.json").read_bytes())
    folder = runs.get(run) or (bases / run if (bases / run).exists() else tmp_path / run)
    capsys.readouterr()
    assert main(["predict", str(folder), *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    line = told.err.splitlines()[-1]
    assert line.startswith("handtune: ")
    assert says in line
    assert (tmp_path / "old.jsonl").read_text() == "precious\n"


def test_a_broken_image_loses_nothing_that_was_predicted(runs, tmp_path, monkeypatch, capsys) -> None:
    for i in range(3):
        picture("sea", i).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    write_rows(tmp_path / "rows.jsonl", [{"image": str(tmp_path / f"{i}.png")} for i in range(3)])
    arguments = [str(runs["images"]), str(tmp_path / "rows.jsonl"), "--batch-size", "1", "--out", str(tmp_path / "out")]
    assert main(["predict", *arguments]) == 2
    assert "2.png: the image can't be decoded" in capsys.readouterr().err.splitlines()[-1]
    (part,) = tmp_path.glob("out.*.part")
    assert len(part.read_text().splitlines()) == 2 and not (tmp_path / "out").exists()

"""What a training run keeps for its report, against what transformers and PEFT make of the weights that it stored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_commands import run_command
from small_runs import CHAT, QUESTIONS, SENTIMENT, TAGGED, TEXTS, bert_folder, gpt2_folder, write_config, write_rows
from small_tokenizers import byte_level, word_piece
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from handtune.reporting import general_text, held_out


def trained(folder: Path, rows: list[dict[str, Any]], *overrides: str, **tables: Any) -> Path:
    """A run of a few steps, whose rows are held out, too."""
    data = str(write_rows(folder / "rows.jsonl", rows))
    tables = {"train": {"epochs": 1, "batch_size": 4, "lr": 0.01, "best": "last"}, **tables}
    config = write_config(
        folder / "run.toml", out=str(folder / "run"), data={"train": data, "eval": data, "max_length": 64}, **tables
    )
    run_command("train", config, *overrides)
    return folder / "run"


def kept(run: Path) -> dict[str, Any]:
    examples: dict[str, Any] = json.loads((run / "examples.json").read_text(encoding="utf-8"))
    return examples


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sft with LoRA on a model of 128 positions."""
    folder = tmp_path_factory.mktemp("sft")
    base = gpt2_folder(folder / "base", max_positions=128)
    return trained(folder, CHAT, method="sft", model={"path": str(base)}, lora={"rank": 4, "alpha": 64})


def general_loss(model: Any) -> float:
    """Mean loss of all tokens of the general texts but the first of each, by windows of the model's positions."""
    losses = []
    for text in general_text.TEXTS:
        ids = [*byte_level().encode(text, add_special_tokens=False).ids, 0]
        for start in range(0, len(ids) - 1, 128):
            window = torch.tensor([ids[start : start + 129]])
            logits = model(window[:, :-1]).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


@torch.no_grad()
def test_texts_and_forgetting_are_those_of_the_base_and_of_the_stored_adapter(written: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written.parent / "base").eval()
    examples = kept(written)
    for time in ("before", "after"):
        if time == "after":
            model = PeftModel.from_pretrained(model, written / "adapter").eval()
        for row, text in zip(CHAT[: held_out.N_TEXTS], examples["texts"], strict=True):
            prompt = torch.tensor([byte_level().encode(row["prompt"], add_special_tokens=False).ids])
            ids = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=held_out.NEW_TOKENS,
                do_sample=False, eos_token_id=0, pad_token_id=0,
            )  # fmt: skip
            new = ids[0, prompt.shape[1] :].tolist()
            new = new[: new.index(0)] if 0 in new else new
            assert text[time] == byte_level().decode(new)
            assert (text["prompt"], text["gold"]) == (row["prompt"], row["completion"])
        assert examples["general"][time] == pytest.approx(general_loss(model), rel=1e-4)
    assert examples["general"]["before"] != examples["general"]["after"]
    assert any(text["before"] != text["after"] for text in examples["texts"])


def test_a_run_that_is_killed_at_its_end_keeps_the_same(written: Path) -> None:
    before = (written / "examples.json").read_bytes()
    for name in ("examples.json", "result.json"):
        (written / name).unlink()
    run_command("train", written.parent / "run.toml")
    assert (written / "examples.json").read_bytes() == before


def test_a_text_is_continued_behind_its_beginning(tmp_path: Path) -> None:
    """A preset has nothing to forget, and rows without an answer are continued in their middle."""
    tokenizer = tmp_path / "tokenizer.json"
    byte_level().save(str(tokenizer))
    model = {"preset": "gpt2", "tokenizer": str(tokenizer), "overrides": {"n_layer": 1, "n_head": 2, "d_model": 32}}
    long = [{"text": row["text"] * 3} for row in TEXTS]
    examples = kept(trained(tmp_path, long, method="sft", model=model))
    assert examples["general"] is None
    for row, text in zip(long[: held_out.N_TEXTS], examples["texts"], strict=True):
        ids = byte_level().encode(row["text"], add_special_tokens=False).ids
        assert text["prompt"] == byte_level().decode(ids[: held_out.BEGINNING])
        assert row["text"].startswith(text["prompt"] + text["gold"].removesuffix(" …"))


def test_prompts_without_room_are_passed_over(tmp_path: Path) -> None:
    base = gpt2_folder(tmp_path / "base")  # of 64 positions
    longest = 65 - held_out.NEW_TOKENS  # the last new token needs no position; the first cat is two
    fits, too_long = ({**CHAT[0], "prompt": "cat" + " cat" * (n - 2)} for n in (longest, longest + 1))
    run = trained(tmp_path, [too_long, fits], method="sft", model={"path": str(base)})
    assert [text["prompt"] for text in kept(run)["texts"]] == [fits["prompt"]]


def test_mistakes_of_a_classifier(tmp_path: Path) -> None:
    base = bert_folder(tmp_path / "base")
    rows = [*SENTIMENT, *({**row, "label": "up" if row["label"] == "down" else "down"} for row in SENTIMENT)]
    run = trained(tmp_path, rows, method="classify", model={"path": str(base)})
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    wrong = []
    for i, row in enumerate(rows, 1):
        encoding = word_piece().encode(row["text"])
        p, predicted = model(torch.tensor([encoding.ids])).logits[0].detach().softmax(-1).max(-1)
        label = model.config.id2label[int(predicted)]
        if label != row["label"]:
            wrong.append((float(p), f"{tmp_path / 'rows.jsonl'} line {i}", row["text"], row["label"], label))
    surest = sorted(wrong, reverse=True)[:10]
    mistakes = kept(run)["mistakes"]
    assert len(wrong) == len(SENTIMENT) > len(mistakes) == 10
    assert [mistake["probability"] for mistake in mistakes] == pytest.approx([p for p, *_ in surest], abs=1e-5)
    shown = {tuple(m[key] for key in ("row", "text", "gold", "predicted")) for m in mistakes}
    assert shown <= {tuple(rest) for _, *rest in wrong}


def test_mistakes_of_a_tagger(tmp_path: Path) -> None:
    base = bert_folder(tmp_path / "base")
    run = trained(tmp_path, TAGGED, "train.max_steps=1", method="tag", model={"path": str(base)})
    words = [
        (f"line {i}", word, tag) for i, row in enumerate(TAGGED, 1) for word, tag in zip(*row.values(), strict=True)
    ]
    accuracy = json.loads((run / "result.json").read_text())["metrics"]["token_accuracy"]
    mistakes = kept(run)["mistakes"]
    assert len(mistakes) == min(10, round(len(words) * (1 - accuracy))) > 0
    probabilities = [mistake["probability"] for mistake in mistakes]
    assert probabilities == sorted(probabilities, reverse=True)
    for mistake in mistakes:
        word = mistake["text"].partition("«")[2].partition("»")[0]
        assert (mistake["row"].rpartition("rows.jsonl ")[2], word, mistake["gold"]) in words
        assert mistake["predicted"] != mistake["gold"]


def test_mistakes_of_a_reader(tmp_path: Path) -> None:
    base = bert_folder(tmp_path / "base")
    run = trained(tmp_path, QUESTIONS, "train.lr=1e-6", method="qa", model={"path": str(base)})
    exact = json.loads((run / "result.json").read_text())["metrics"]["exact_match"]
    mistakes = kept(run)["mistakes"]
    assert len(mistakes) == round(len(QUESTIONS) * (1 - exact)) > 0
    model = AutoModelForQuestionAnswering.from_pretrained(run / "model").eval()
    for mistake in mistakes:
        row = QUESTIONS[int(mistake["row"].rpartition(" ")[2]) - 1]
        assert (mistake["text"], mistake["gold"]) == (row["question"], row["answers"]["text"][0])
        encoding = word_piece().encode(row["question"], row["context"])
        scores = model(torch.tensor([encoding.ids]), token_type_ids=torch.tensor([encoding.type_ids]))
        spans = (scores.start_logits[0].softmax(-1)[:, None] * scores.end_logits[0].softmax(-1)).detach()  # (T, T)
        best = max(
            (float(spans[i, j]), row["context"][encoding.offsets[i][0] : encoding.offsets[j][1]])
            for i, sequence in enumerate(encoding.sequence_ids) for j in range(i, len(encoding.ids))
            if sequence == encoding.sequence_ids[j] == 1
        )  # fmt: skip
        assert (mistake["probability"], mistake["predicted"]) == (pytest.approx(best[0], abs=1e-5), best[1])


def test_a_masked_language_model_can_forget_and_writes_nothing(tmp_path: Path) -> None:
    base = bert_folder(tmp_path / "base")
    examples = kept(trained(tmp_path, TEXTS, method="masked-lm", model={"path": str(base)}))
    assert examples["texts"] == examples["mistakes"] == []
    assert 0 < examples["general"]["after"] != examples["general"]["before"]

"""Encoder-decoders in training: spans taken out of texts, batches, runs that resume, the command line, adapters."""

import json
from contextlib import suppress
from pathlib import Path

import peft
import pytest
import torch
from small_adapters import shaken
from small_runs import CHAT, PAIRS, SENTIMENT, TAGGED, TEXTS, assert_same_weights, weights, write_config, write_rows
from small_t5 import SOURCES, TARGETS, both_t5, pairs
from small_tokenizers import sentence_piece

from handtune.cli import main
from handtune.engine import LoRAConfig, TrainConfig, add_lora, load_adapter, save_adapter, train
from handtune.engine.data.placed_rows import locations_of
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.encode import encode
from handtune.engine.tasks.seq2seq import Seq2SeqCollate, SpanCorruption
from handtune.models import T5, load, save
from handtune.models.tokenizer.special_tokens import SpecialTokens
from handtune.reporting.token_display import show

SENTINELS = tuple(range(220, 200, -1))
SIZES = {"n_layer": 2, "d_model": 32, "n_head": 2, "head_width": 16, "d_ff": 64}
GATED = {"feed_forward_proj": "gated-gelu", "tied": False, "scaled": False}


def close(ours, reference) -> None:
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)


def rebuilt(source: list[int], target: list[int]) -> list[int]:
    """The text, with each sentinel of the source replaced by what the target has behind the same one."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    return [token for place in source for token in spans.get(place, [place])]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20, 50, 133])
def test_source_and_target_rebuild_the_text(n):
    torch.manual_seed(n)
    text = torch.randint(2, 200, (n,)).tolist()
    drawn = set()
    for _ in range(20):
        source, target = SpanCorruption(SENTINELS, eos=1)(text)
        assert source.pop() == target.pop() == 1
        assert rebuilt(source, target) == text
        used = [token for token in source if token in SENTINELS]
        assert used == list(SENTINELS[: len(used)]) == [token for token in target if token in SENTINELS]
        taken = len(target) - len(used)
        assert taken == max(1, round(0.15 * n))
        assert len(used) == max(1, round(taken / 3))
        drawn.add(tuple(source))
    assert len(drawn) == 20 or n < 50


def test_spans_are_of_every_length_and_place():
    torch.manual_seed(0)
    corruption = SpanCorruption(SENTINELS, eos=None)
    lengths, gone = [], torch.zeros(100)
    for _ in range(1000):
        _, target = corruption(list(range(100)))
        starts = [i for i, token in enumerate(target) if token in SENTINELS]
        lengths += [stop - start - 1 for start, stop in zip(starts, [*starts[1:], len(target)], strict=True)]
        gone[[token for token in target if token not in SENTINELS]] += 1
    assert sum(lengths) / len(lengths) == 3.0
    assert set(range(1, 9)) <= set(lengths)
    assert gone.sum() == 15_000
    assert gone[0] == 0  # a text begins with what stays
    assert gone[99] == 1000  # and ends with a span
    assert (gone[1:95] > 50).all()


def test_too_few_sentinels_are_named():
    with pytest.raises(ValueError, match="250 tokens has 13 spans, but the tokenizer 10 .* at most 200"):
        SpanCorruption(SENTINELS[:10], 1)(list(range(250)))
    SpanCorruption(SENTINELS[:10], 1)(list(range(200)))
    assert SpanCorruption.of(sentence_piece(), 1).sentinels == tuple(range(103, 83, -1))


def test_a_batch():
    collate = Seq2SeqCollate(pad_id=0, start_id=9)
    batch = collate([{"input_ids": [5, 6, 1], "target_ids": [7, 1]}, {"input_ids": [4, 1], "target_ids": [2, 3, 8, 1]}])
    assert batch["inputs"]["input_ids"].tolist() == [[5, 6, 1], [4, 1, 0]]
    assert batch["inputs"]["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["inputs"]["decoder_input_ids"].tolist() == [[9, 7, 0, 0], [9, 2, 3, 8]]
    assert batch["index"].tolist() == [0, 1, 4, 5, 6, 7]
    assert batch["targets"].tolist() == [7, 1, 2, 3, 8, 1]
    assert (batch["counts"], batch["lengths"]) == ([2, 4], [5, 6])


def test_the_loss_is_that_of_transformers(tmp_path):
    reference, model = both_t5(tmp_path, **GATED)
    rows = [{"input_ids": s, "target_ids": t} for s, t in zip(SOURCES, TARGETS, strict=True)]
    loss, count = causal_lm_loss(model, Seq2SeqCollate(0, 5)(rows))
    inputs = pairs(SOURCES, TARGETS)
    labels = inputs["decoder_input_ids"].masked_fill(inputs["decoder_attention_mask"] == 0, -100)
    out = reference(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
    assert count == sum(map(len, TARGETS))
    torch.testing.assert_close(loss / count, out.loss)


def test_rows_are_encoded_with_their_ends():
    words = sentence_piece()
    rows = [{"prompt": "the cat", "completion": "the dog sat"}, {"prompt": "the cat sat on it", "completion": "mat"}]
    examples, report = encode([*rows, {"prompt": "it", "completion": ""}], words, "seq2seq", max_length=4, eos=1)
    assert [words.decode(example["input_ids"], False) for example in examples] == ["the cat</s>", "the cat sat</s>"]
    assert [words.decode(example["target_ids"], False) for example in examples] == ["the dog sat</s>", "mat</s>"]
    assert (len(report.truncated), locations_of(report.masked), report.targets) == (1, "row 3", 6)
    cut, _ = encode(rows[:1], words, "seq2seq", max_length=3, eos=1)
    assert words.decode(cut[0]["target_ids"], False) == "the dog sat"  # no end where it doesn't end
    shown = show(examples, words, "seq2seq", 1, color=False)
    assert shown == "example 1 of 2: 3 tokens to read, 4 to write\nthe|cat|</s>|writes:|[the]|[dog]|[sat]|[</s>]"


class BrokenOff(Exception):
    """A run ends here."""


def test_a_span_corruption_run_resumes_bitwise(tmp_path):
    """Broken off between two steps: the spans drawn afterwards are those that would have been drawn."""
    rows, _ = encode(TEXTS * 3, sentence_piece(), "span-corruption", max_length=12)
    collate = Seq2SeqCollate(0, 0, SpanCorruption.of(sentence_piece(), 1))
    config = TrainConfig(epochs=3, batch_size=4, lr=1e-2, save_every=1)
    ends = []
    for place, stops in (("through", ()), ("broken", (3, 8))):
        count = 0

        def loss(model, batch, stops=stops):
            nonlocal count
            count += 1
            if count in stops:
                raise BrokenOff
            return causal_lm_loss(model, batch)

        result = None
        while result is None:
            torch.manual_seed(0)
            model = T5.from_name("t5-small", vocab_size=104, **SIZES)
            with suppress(BrokenOff):
                result = train(model, rows, loss, config, collate=collate, run_dir=tmp_path / place)
        ends.append((weights(model), result.train_loss))
    assert_same_weights(*(end for end, _ in ends))
    assert ends[0][1] == ends[1][1]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny T5 with a tokenizer."""
    torch.manual_seed(0)
    model = T5.from_name("flan-t5-small", vocab_size=104, **SIZES)
    model.tokens = SpecialTokens(ends=(1,), pad_id=0)
    folder = tmp_path_factory.mktemp("t5")
    save(model, sentence_piece(), folder)
    return folder


QUESTIONS = [{"prompt": row["prompt"].strip(), "completion": row["completion"].lower()} for row in CHAT]
OTHERS = [{**row, "completion": QUESTIONS[i - 1]["completion"]} for i, row in enumerate(QUESTIONS)]


def configuration(folder: Path, base: Path, method: str, rows: list, **tables) -> Path:
    """Rows to learn by heart, and the file that says so."""
    file = str(write_rows(folder / "rows.jsonl", rows))
    return write_config(
        folder / "run.toml", method=method, out=str(folder / "run"),
        **{
            "model": {"path": str(base), "dtype": "float32", "dropout": 0},
            "data": {"train": file, "eval": file, "max_length": 32},
            "train": {"epochs": 50, "batch_size": 4, "lr": 1e-2},
            **tables,
        },
    )  # fmt: skip


def losses(folder: Path) -> tuple[float, float]:
    """Before and after the run."""
    result = json.loads((folder / "run" / "result.json").read_text())
    return result["before"]["loss"], result["metrics"]["loss"]


@pytest.fixture(scope="module")
def answers(base, tmp_path_factory) -> Path:
    """A run of every weight."""
    folder = tmp_path_factory.mktemp("answers")
    assert main(["train", str(configuration(folder, base, "sft", QUESTIONS))]) == 0
    return folder


def generated(capsys, place: Path, rows: list, *how: str) -> list[str]:
    prompts = [argument for row in rows for argument in ("--prompt", row["prompt"])]
    capsys.readouterr()
    assert main(["generate", str(place), *prompts, *how, "--max-new-tokens", "20"]) == 0
    return capsys.readouterr().out.strip().split("\n\n")


def test_sft_answers_by_heart(answers, capsys):
    before, after = losses(answers)
    assert after < 0.05 < 3 < before
    assert json.loads((answers / "run" / "run.json").read_text())["task"] == "seq2seq-lm"
    assert main(["evaluate", str(answers / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(after)
    assert main(["evaluate", str(answers / "run"), "--rouge"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[kind] for kind in ("rouge1", "rouge2", "rougeL")] == [1, 1, 1]
    for how in (["--temperature", "0"], ["--beams", "3"]):
        assert generated(capsys, answers / "run", QUESTIONS, *how) == [row["completion"] for row in QUESTIONS]


def test_lora_learns_other_answers(answers, tmp_path, capsys):
    """An adapter on the run's model; merged, it says the same."""
    base = answers / "run" / "model"
    config = configuration(tmp_path, base, "sft", OTHERS, lora={"rank": 8, "alpha": 16})
    assert main(["train", str(config)]) == 0
    before, after = losses(tmp_path)
    assert after < 0.05 < 0.5 < before
    assert main(["merge", str(base), str(tmp_path / "run" / "adapter"), str(tmp_path / "merged")]) == 0
    for place in (tmp_path / "run", tmp_path / "merged"):
        found = generated(capsys, place, OTHERS, "--temperature", "0")
        assert found == [row["completion"] for row in OTHERS]


def test_pretraining_is_span_corruption(base, tmp_path, capsys):
    config = configuration(tmp_path, base, "pretrain", TEXTS)
    assert main(["check-data", str(config)]) == 0
    assert "masked anew in each epoch" in capsys.readouterr().out
    assert main(["train", str(config)]) == 0
    before, after = losses(tmp_path)
    assert after < 1.5 < 4 < before


@pytest.mark.parametrize(
    ("method", "rows", "metric"),
    [("classify", SENTIMENT, "accuracy"), ("tag", TAGGED, "token_accuracy"), ("embed", PAIRS, "accuracy@1")],
)
def test_other_methods_train_the_same_checkpoint(base, tmp_path, method, rows, metric):
    """Packed rows, which T5 pads; a new head for each task, the decoder left out where it isn't read."""
    config = configuration(tmp_path, base, method, rows, train={"epochs": 20, "batch_size": 6, "lr": 1e-2})
    assert main(["train", str(config)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"][metric] == 1.0 > result["before"][metric]


def test_a_preset_pretrains_from_scratch(tmp_path):
    sentence_piece().save(str(tmp_path / "tokenizer.json"))
    model = {"preset": "t5-v1_1-small", "tokenizer": str(tmp_path / "tokenizer.json")}
    config = configuration(tmp_path, tmp_path, "pretrain", TEXTS, model=model, train={"max_steps": 2})
    sizes = [f"model.overrides.{name}={value}" for name, value in SIZES.items()]
    assert main(["train", str(config), *sizes]) == 0
    loaded, words = load(tmp_path / "run" / "model", device="cpu")
    assert words is not None
    assert (loaded.task, loaded.tokens.eos_id, loaded.config.d_model) == ("seq2seq-lm", 1, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method=masked-lm"], "task 'masked-lm': T5 can do seq2seq-lm"),
        (["method=sft"], "a text row, but seq2seq needs prompt/completion"),
    ],
)
def test_what_does_not_fit_is_one_line(base, tmp_path, capsys, changes, message):
    config = configuration(tmp_path, base, "pretrain", TEXTS)
    assert main(["train", str(config), *changes]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_max_length_has_to_be_given(base, tmp_path, capsys):
    config = configuration(tmp_path, base, "sft", QUESTIONS)
    config.write_text(config.read_text().replace("max_length = 32\n", ""))
    assert main(["train", str(config)]) == 2
    assert "data.max_length: the model takes rows of any length" in capsys.readouterr().err


ADAPTERS = {
    "all": (LoRAConfig(rank=3, alpha=5), 36),
    "attention": (LoRAConfig(rank=3, alpha=5, targets="attention"), 24),
    "mlp": (LoRAConfig(rank=3, alpha=5, targets="mlp"), 12),
    "q and v, PEFT's own": (LoRAConfig(rank=3, alpha=5, targets=["q", "v"]), 12),
    "keys of the source": (LoRAConfig(rank=3, alpha=5, targets=["decoder.*.EncDecAttention.k"]), 2),
    "embedding of positions": (LoRAConfig(rank=3, alpha=5, targets=["relative_attention_bias", "wo"]), 6),
}


@pytest.mark.parametrize(("config", "count"), ADAPTERS.values(), ids=ADAPTERS)
def test_peft_loads_our_adapter(tmp_path, config, count):
    reference, model = both_t5(tmp_path / "base", **GATED)
    inputs = pairs(SOURCES, TARGETS)
    base = model(**inputs)
    add_lora(model, config)
    shaken(model)
    save_adapter(model, tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["task_type"] == "SEQ_2_SEQ_LM"
    assert len(stored["target_modules"]) == count
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (model(**inputs) - base).abs().max() > 0.1
        close(loaded(**inputs).logits, model(**inputs))


@pytest.mark.parametrize("targets", [["q", "v"], ["k", "o", "wi_0", "wo"]], ids=str)
def test_we_load_the_adapter_of_peft(tmp_path, targets):
    reference, model = both_t5(tmp_path / "base", **GATED)
    wrapped = peft.get_peft_model(
        reference, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    inputs = pairs(SOURCES, TARGETS)
    with torch.no_grad():
        close(wrapped.eval()(**inputs).logits, model(**inputs))


def test_frozen_position_tables_get_no_gradient(tmp_path):
    _, model = both_t5(tmp_path)
    add_lora(model, LoRAConfig(rank=2))
    rows = [{"input_ids": s, "target_ids": t} for s, t in zip(SOURCES, TARGETS, strict=True)]
    causal_lm_loss(model, Seq2SeqCollate(0, 5)(rows))[0].backward()
    assert model.encoder.positions.table.weight.grad is None
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".lora." in name}

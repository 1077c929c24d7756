"""A chat model made from a base model: asked as it was trained, it stops after its turn, here and in transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import gpt2, write_config, write_rows
from small_templates import CHATML
from small_tokenizers import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from handtune.cli import main
from handtune.engine.chat.template import ChatTemplate
from handtune.engine.data.schema import as_dialogue, prompt_row
from handtune.engine.tasks.encode import encode
from handtune.models import save
from handtune.models.tokenizer.special_tokens import SpecialTokens

QUESTION, ANSWER = "capital of France?", "Paris"
NAMES = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
TURN_END = byte_level().token_to_id("<|im_end|>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, whose texts end with `<|end|>`, with a template whose turns end with `<|im_end|>`."""
    model, folder = gpt2(), tmp_path_factory.mktemp("chat") / "base"
    model.tokens = SpecialTokens(ends=(0,), chat_template=CHATML, settings=NAMES)
    save(model, byte_level(), folder)
    return folder


def trained(base: Path, folder: Path, **tables: object) -> Path:
    """A run that has learnt one row of prompt and completion by heart."""
    rows = write_rows(folder / "rows.jsonl", [{"prompt": QUESTION, "completion": ANSWER}] * 8)
    config = {"model": {"path": str(base)}, "data": {"train": str(rows)}, "train": {"epochs": 40, "lr": 1e-2}}
    path = write_config(folder / "run.toml", method="sft", out=str(folder / "run"), **{**config, **tables})
    assert main(["train", str(path)]) == 0
    return folder / "run"


def answer_of(folder: Path, files: Path) -> tuple[str, int]:
    """What transformers' model at `folder` answers, by the tokenizer, template and ends in `files`; the last token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(files)
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    settings = GenerationConfig.from_pretrained(files)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=settings, max_new_tokens=20, do_sample=False
    )
    new = out[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), new[-1]


@pytest.mark.parametrize("lora", [False, True])
def test_it_stops_after_its_turn(lora: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(base, tmp_path, **({"lora": {"rank": 16, "alpha": 32}} if lora else {}))
    assert "trained through the chat template" in capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["chat"] is True

    generate = ["generate", str(run), "--prompt", QUESTION, "--temperature", "0", "--max-new-tokens", "20"]
    assert main(generate) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    assert main([*generate, "--raw"]) == 0
    assert capsys.readouterr().out.startswith(QUESTION)
    assert main([*generate, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"prompt": QUESTION, "completion": ANSWER}

    if not lora:
        assert answer_of(run / "model", run / "model") == (ANSWER, TURN_END)
        assert json.loads((run / "model/config.json").read_text())["eos_token_id"] == [0, TURN_END]
        return
    assert answer_of(run / "adapter", run / "adapter") == (ANSWER, TURN_END)
    assert main(["merge", str(base), str(run / "adapter"), str(tmp_path / "merged")]) == 0
    assert answer_of(tmp_path / "merged", tmp_path / "merged") == (ANSWER, TURN_END)


def test_a_turn_that_ends_in_plain_text_learns_to_stop() -> None:
    """By the end of texts, in rows of prompt and completion and in dialogues."""
    source = (
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    )
    rows = {"prompt": QUESTION, "completion": ANSWER}
    dialogue = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
    tokenizer, template = byte_level(), ChatTemplate(source)
    for row in (as_dialogue(rows), dialogue):
        (example,), _ = encode([row], tokenizer, "sft", max_length=64, eos=0, template=template)
        assert [t for t in example["targets"] if t >= 0] == [*tokenizer.encode(ANSWER + "\n\n").ids, 0]
    asked, answer = dialogue["messages"][:1], dialogue["messages"][1:]
    pair = {"prompt": asked, "chosen": answer, "rejected": [{"role": "assistant", "content": "France"}]}
    (example,), _ = encode([pair], tokenizer, "pairs", max_length=64, eos=0, template=template)
    assert (example["chosen"][-1], example["rejected"][-1]) == (0, 0)


def test_a_run_on_dialogues_is_asked_through_the_template(base: Path, tmp_path: Path, capsys) -> None:
    """Wherever it is reached: the run, its model, what is merged; rows of several adapters each as theirs was."""
    dialogue = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
    rows = write_rows(tmp_path / "dialogues.jsonl", [dialogue] * 8)
    run = trained(base, tmp_path, data={"train": str(rows)}, lora={"rank": 16, "alpha": 32})
    (tmp_path / "other").mkdir()
    raw = trained(
        base, tmp_path / "other", data={"train": str(tmp_path / "rows.jsonl"), "chat": "off"}, lora={"rank": 16}
    )
    assert main(["merge", str(base), str(run / "adapter"), str(tmp_path / "merged")]) == 0
    tail = ["--prompt", QUESTION, "--temperature", "0", "--max-new-tokens", "20"]
    capsys.readouterr()
    for model in ([run], [base, "--adapter", run / "adapter"], [tmp_path / "merged"]):
        assert main(["generate", *map(str, model), *tail]) == 0
        assert capsys.readouterr().out == f"{ANSWER}\n"

    asked = [{"prompt": QUESTION, "adapter": name} for name in (run.name, raw.parent.name, None)]
    asked[1]["adapter"] = "raw"
    shutil.copytree(raw / "adapter", tmp_path / "raw")
    prompts = write_rows(tmp_path / "prompts.jsonl", asked)
    both = ["--adapter", str(run / "adapter"), "--adapter", str(tmp_path / "raw"), "--prompts", str(prompts)]
    assert main(["generate", str(base), *both, *tail[2:]]) == 0
    first, second, third = capsys.readouterr().out.split("\n\n", 2)
    assert first == ANSWER
    assert second.startswith(QUESTION)
    assert third.startswith(QUESTION)


@pytest.mark.parametrize(
    ("chat", "prompt", "asked"),
    [
        ("auto", QUESTION, True),
        ("off", QUESTION, False),
        ("on", QUESTION, True),
        ("auto", f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_which_rows_go_through_the_template(chat, prompt, asked, base, tmp_path, capsys) -> None:
    """By themselves those of a model with a template, and not those that have been through one already."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": ANSWER}])
    data = {"train": str(rows), "chat": chat}
    config = write_config(
        tmp_path / "run.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(base)}, data=data
    )
    assert main(["check-data", str(config)]) == 0
    shown = capsys.readouterr().out
    assert ("<|im_start|>" in shown) == (asked or prompt != QUESTION)
    assert shown.count("<|im_start|>") <= 2
    assert ("[<|im_end|>]" in shown) == (asked or prompt != QUESTION)


def test_a_base_without_a_template_keeps_the_plain_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And transformers asks by it, as it was trained."""
    model = gpt2()
    model.tokens = SpecialTokens(ends=(0,), settings={"tokenizer_class": "PreTrainedTokenizerFast"})
    save(model, byte_level(), tmp_path / "base")
    run = trained(tmp_path / "base", tmp_path, data={"train": str(tmp_path / "rows.jsonl"), "chat": "on"})
    assert main(["generate", str(run), "--prompt", QUESTION, "--temperature", "0", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f" {ANSWER}"
    text, last = answer_of(run / "model", run / "model")
    assert (text, last) == (f" {ANSWER}", 0)


def test_what_a_row_asks_is_what_training_makes_of_it() -> None:
    dialogue = [{"role": "system", "content": "Be."}, {"role": "user", "content": "hi"}]
    answer = [{"role": "assistant", "content": "yes"}]
    assert prompt_row({"prompt": "hi", "messages": dialogue}) == {"messages": dialogue}
    assert prompt_row({"prompt": dialogue, "chosen": answer, "rejected": answer}) == {"messages": dialogue}
    assert prompt_row({"prompt": dialogue}) == {"messages": dialogue}
    assert prompt_row({"prompt": "hi", "label": "x"}) == {"prompt": "hi"}
    code = as_dialogue({"prompt": "def f():\n", "completion": "    return 1"})["messages"]
    assert [message["content"] for message in code] == ["def f():", "    return 1"]
    assert as_dialogue({"prompt": "the cat\n\n", "completion": " sat"})["messages"][1]["content"] == "sat"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"truncate": "drop"}, 'data.truncate = "drop": it is for dialogues'),
        ({"chat": "on"}, 'data.chat = "on": method sft of a causal model asks'),
    ],
    ids=str,
)
def test_what_an_encoder_decoder_has_no_use_for(option: dict, message: str, tmp_path: Path, capsys) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    sizes = {"n_layer": 1, "n_decoder_layer": 1, "d_model": 16, "d_ff": 16, "n_head": 2, "head_width": 8}
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "good", "completion": "morning"}])
    config = write_config(
        tmp_path / "run.toml", method="sft", out=str(tmp_path / "run"),
        model={"preset": "t5-small", "tokenizer": str(tmp_path / "tokenizer.json"), "overrides": sizes},
        data={"train": str(rows), "max_length": 32, **option},
    )  # fmt: skip
    assert main(["train", str(config)]) == 2
    assert message in capsys.readouterr().err

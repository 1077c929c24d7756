"""`handtune generate` and its neighbours: runs from anywhere, files that stay whole, options that are not ignored."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import shaken
from small_commands import run_command, talker_folder
from small_runs import CHAT, SENTIMENT, gpt2, gpt2_folder, write_config, write_rows
from small_tokenizers import byte_level
from tokenizers import Tokenizer

from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, generate, save_adapter
from handtune.engine.generation import completions as completions_module
from handtune.engine.generation.completions import completions
from handtune.engine.generation.sampling import continuations
from handtune.models import load


@pytest.fixture
def refused(capsys):
    def command(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("handtune: ")

    return command


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return gpt2_folder(tmp_path / "base")


def trained(tmp_path: Path, **tables) -> Path:
    """A short LoRA run, made in `tmp_path` with relative paths only."""
    settings = {
        "method": "sft", "out": "runs/a", "model": {"path": "base"}, "lora": {"rank": 2},
        "data": {"train": str(write_rows(tmp_path / "rows.jsonl", CHAT))}, "train": {"epochs": 1, "batch_size": 2},
    }  # fmt: skip
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        run_command("train", write_config(tmp_path / "a.toml", **{**settings, **tables}))
    finally:
        os.chdir(before)
    return tmp_path / "runs/a"


ASK = ("--prompt", "the cat", "--temperature", 0, "--max-new-tokens", 4)


def test_a_run_is_found_from_another_folder(base: Path, tmp_path: Path, capsys) -> None:
    """Its base was named from where it was trained; that is found again by where the run lies."""
    folder = trained(tmp_path)
    capsys.readouterr()
    run_command("generate", folder, *ASK)
    said = capsys.readouterr().out
    run_command("generate", base, "--adapter", folder / "adapter", *ASK)
    assert capsys.readouterr().out == said
    rows = write_rows(tmp_path / "rows.jsonl", CHAT)
    run_command("evaluate", folder, "--data", rows)


def test_a_run_that_began_with_a_preset(tmp_path: Path, capsys) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    sizes = {"n_layer": 1, "n_head": 2, "d_model": 16, "max_positions": 64}
    path = tmp_path / "a.toml"
    path.write_text(
        f'method = "sft"\nout = "{tmp_path / "run"}"\n'
        f'[model]\npreset = "gpt2"\ntokenizer = "{tmp_path / "tokenizer.json"}"\n'
        f'[data]\ntrain = "{write_rows(tmp_path / "rows.jsonl", CHAT)}"\n[lora]\nrank = 2\n[train]\nepochs = 1\n'
    )
    overrides = [f"model.overrides.{key}={value}" for key, value in sizes.items()]
    run_command("train", path, *overrides)
    run_command("generate", tmp_path / "run", *ASK)


@pytest.mark.parametrize("out", ["runs/a", "ABSOLUTE"])
def test_a_base_that_is_no_folder(out: str, base: Path, tmp_path: Path, monkeypatch, refused) -> None:
    """A hub id stays one, whether the run was put in a relative or an absolute place."""
    asked = []

    def fetched(path, weights=True):
        asked.append(str(path))
        return base

    for module in ("handtune.models.checkpoint.info", "handtune.inputs.fingerprints"):
        monkeypatch.setattr(f"{module}.checkpoint_folder", fetched)
    place = str(tmp_path / "runs/a") if out == "ABSOLUTE" else out
    folder = trained(tmp_path, out=place, model={"path": "somebody/model"})
    run_command("generate", folder, *ASK)
    assert set(asked) == {"somebody/model"}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config))  # as a new revision of the repository might
    assert "model.path is not what it was when the run was made (somebody/model/config.json has changed)" in refused(
        "generate", folder, *ASK
    )


def test_rouge_of_prompts_of_all_lengths(base: Path, tmp_path: Path, capsys) -> None:
    """A prompt that leaves little room shortens its own answer and no other."""
    folder = trained(tmp_path)
    rows = [*CHAT, {"prompt": "the cat " * 6 + "sat on", "completion": " the mat"}]
    capsys.readouterr()
    seen = {}
    for name, part in (("all", rows), ("short", CHAT)):
        path = write_rows(tmp_path / f"{name}.jsonl", part)
        before = Path.cwd()
        os.chdir(tmp_path)
        run_command("evaluate", folder, "--data", path, "--rouge")
        os.chdir(before)
        seen[name] = json.loads(capsys.readouterr().out)["rouge1"]
    assert seen["all"] * len(rows) >= seen["short"] * len(CHAT) - 1e-9


def test_an_unfinished_run_does_not_answer_from_its_base(base: Path, tmp_path: Path, refused) -> None:
    folder = trained(tmp_path)
    (folder / "adapter").rename(folder / "gone")
    assert "the run has not finished" in refused("generate", folder, *ASK)
    assert "the run has not finished" in refused("evaluate", folder, "--data", tmp_path / "rows.jsonl")


def test_a_run_stands_for_its_adapter(base: Path, tmp_path: Path, capsys) -> None:
    folder = trained(tmp_path)
    capsys.readouterr()
    answers = []
    for adapter in (folder, folder / "adapter"):
        run_command("generate", base, "--adapter", adapter, *ASK)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_a_model_that_answers_chats_is_said_to_be_asked_without_its_template(tmp_path: Path, capsys) -> None:
    talker = talker_folder(tmp_path / "talker")
    notice = "prompts are continued as they stand, past the model's chat template"
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    run_command("generate", talker, *ASK)
    assert notice in capsys.readouterr().err
    run_command("generate", talker, "--prompt", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", *ASK[2:])
    assert capsys.readouterr().err == "", "it has been through the template"
    run_command("generate", talker, *ASK, "--raw")
    assert capsys.readouterr().err == ""
    run_command("generate", talker, "--prompts", rows, *ASK[2:])
    assert capsys.readouterr().err == ""


def test_a_model_that_writes_nothing(base: Path, tmp_path: Path, refused) -> None:
    rows = write_rows(tmp_path / "labelled.jsonl", SENTIMENT)
    with_adapter = trained(tmp_path, method="classify", data={"train": str(rows)})
    whole = write_config(
        tmp_path / "whole.toml", method="classify", out=str(tmp_path / "whole"), model={"path": str(base)},
        data={"train": str(rows)}, train={"max_steps": 1, "batch_size": 2},
    )  # fmt: skip
    run_command("train", whole)
    for run in (with_adapter, tmp_path / "whole"):
        said = refused("generate", run, *ASK)
        assert said.startswith(f"{run}: it writes no text, being for sequence-classification; `handtune predict` asks")


def test_what_is_there_is_not_written_over(base: Path, tmp_path: Path, refused) -> None:
    adapter = trained(tmp_path) / "adapter"
    before = (base / "model.safetensors").read_bytes()
    assert refused("merge", base, adapter, base).startswith(f"{base} holds something already")
    assert (base / "model.safetensors").read_bytes() == before
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "the"}])
    said = refused("generate", base, "--prompts", prompts, "--out", tmp_path / "base/../prompts.jsonl")
    assert "is the file of the prompts" in said
    assert json.loads(prompts.read_text()) == {"prompt": "the"}


def test_rows_of_a_run_that_is_broken_off_lie_beside(base: Path, tmp_path: Path, monkeypatch) -> None:
    """And are not taken for all; prompts that are too long are found before the first answer."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"the {word}", "more": 1} for word in "abcde"])
    out, calls = tmp_path / "out.jsonl", []

    def breaking(*arguments, **settings):
        calls.append(settings["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return continuations(*arguments, **settings)

    monkeypatch.setattr(completions_module, "continuations", breaking)
    ask = ("generate", base, "--prompts", prompts, "--out", out, "--batch-size", "2", "--max-new-tokens", "4")
    assert main([str(argument) for argument in ask]) == 130
    part = next(tmp_path.glob("out.jsonl.*.part"))
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the a", "the b", "the c", "the d"]
    assert not out.exists()
    assert calls == [0, 2, 4]
    model, words = gpt2(), byte_level()
    with pytest.raises(ValueError, match="prompt 2 has .* would exceed the model's 64 positions"):
        completions(model, words, ["a", "the cat " * 60], 8)
    assert len(calls) == 3


def test_a_refusal_leaves_what_was_written_before(base: Path, tmp_path: Path, refused) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    for wrong in (("--prompt", "the cat " * 60), ("--prompt", "the", "--stop", "<|end|> more")):
        refused("generate", base, "--force", "--out", out, *wrong)
        assert out.read_text() == "old"


def test_prompts_need_no_completion(base: Path, tmp_path: Path, refused, capsys) -> None:
    rows = [{"prompt": "the cat"}, {"text": "a dog"}, {"messages": [{"role": "user", "content": "who?"}]}]
    run_command("generate", base, "--prompts", write_rows(tmp_path / "a.jsonl", rows), *ASK[2:])
    said = capsys.readouterr().out
    assert said.startswith("the cat")
    assert "\n\na dog" in said
    bad = write_rows(tmp_path / "b.jsonl", [{"anchor": "a", "positive": "b"}])
    assert "anchor, positive hold no prompt" in refused("generate", base, "--prompts", bad)


def test_each_row_has_its_adapter(base: Path, tmp_path: Path, refused) -> None:
    """Two adapters on one base, in one batch, each row as with its adapter alone."""
    folders = []
    for number, name in enumerate(("law-1.0", "tone")):
        model = load(base, device="cpu")[0]
        add_lora(model, LoRAConfig(rank=2 + number), name="default")
        save_adapter(shaken(model, number), tmp_path / name)
        folders.append(tmp_path / name)
    prompts = ["the cat", "a dog sat", "who wrote", "the mat"]
    adapters = ["law-1.0", "tone", "tone", "law-1.0"]
    rows = [{"prompt": prompt, "adapter": name} for prompt, name in zip(prompts, adapters, strict=True)]
    file, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    ask = ("--temperature", 0, "--max-new-tokens", 6)
    run_command(
        "generate", base, "--adapter", folders[0], "--adapter", folders[1], "--prompts", file, "--out", out, *ask
    )
    together = [json.loads(line) for line in out.read_text().splitlines()]
    said = set()
    for row, name, prompt in zip(together, adapters, prompts, strict=True):
        run_command("generate", base, "--adapter", tmp_path / name, "--prompt", prompt, "--force", "--out", out, *ask)
        assert {**json.loads(out.read_text()), "adapter": name} == row
        said.add(row["completion"])
    assert len(said) > 1
    both = ("--adapter", folders[0], "--adapter", folders[1])
    assert "--prompt 1: adapter None is not among" in refused("generate", base, *both, "--prompt", "the")
    wrong = write_rows(tmp_path / "wrong.jsonl", [*rows, {"prompt": "the", "adapter": "x"}])
    assert f"{wrong} line 5: adapter 'x' is not among" in refused("generate", base, *both, "--prompts", wrong)
    assert "another called 'tone'" in refused("generate", base, *both, "--adapter", folders[1], "--prompts", file)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--beams", 2, "--top-k", 5), "--beams look for the likeliest text"),
        (("--beams", 2, "--temperature", 0.7), "--beams look for the likeliest text"),
        (("--beams", 2, "--stop", "x"), "--beams look for the likeliest text"),
        (("--temperature", 0, "--top-p", 0.9), "--top-p: at --temperature 0 nothing is sampled"),
        (("--length-penalty", 2), "--length-penalty weighs the texts of a beam search"),
        (("--batch-size", 0), "--batch-size 0: expected a positive number"),
    ],
)
def test_options_without_effect_are_refused(options, says, base: Path, refused) -> None:
    assert refused("generate", base, "--prompt", "the", *options).startswith(says)


def test_out_of_memory_is_one_line(base: Path, refused, monkeypatch) -> None:
    def none_left(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(completions_module, "continuations", none_left)
    said = refused("generate", base, *ASK)
    assert said == "out of memory on cpu: set --batch-size 8 (it is 16)"


def test_special_tokens_stop() -> None:
    """A text without its special tokens never contains one; its id ends the text. One among others is refused."""
    model, words = gpt2(), Tokenizer.from_str(byte_level().to_str())
    ids = torch.tensor([words.encode("the cat sat").ids])
    free = generate(model, ids, max_new_tokens=8, temperature=0)[0, ids.shape[1] :].tolist()
    stop = words.id_to_token(free[3])  # which becomes a special one
    words.add_special_tokens([stop])
    assert words.token_to_id(stop) == free[3]
    rows = generate(model, ids, max_new_tokens=8, temperature=0, stop=[stop], tokenizer=words)
    assert rows[0, ids.shape[1] :].tolist() == free[: free.index(free[3]) + 1]
    with pytest.raises(ValueError, match="holds a special token and more"):
        generate(model, ids, max_new_tokens=8, stop=[f"{stop}\n"], tokenizer=words)


def test_modules_keep_their_modes() -> None:
    """A frozen norm in eval mode inside a model that trains stays so, also where generation fails."""
    model = gpt2().train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    ids = torch.tensor([[1, 2, 3]])
    generate(model, ids, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before

    def failing(*arguments, **settings):
        raise RuntimeError

    model.layers[1].forward = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        generate(model, ids, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before


def test_a_stop_is_found_in_the_last_tokens_alone() -> None:
    """What is decoded at a step does not grow with the text."""
    model, words = gpt2(max_positions=300), byte_level()
    seen = []

    class Counting:
        def decode(self, ids):
            seen.append(len(ids))
            return words.decode(ids)

        def get_added_tokens_decoder(self):
            return words.get_added_tokens_decoder()

    generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=200, stop=["\x00never"], tokenizer=Counting())
    assert max(seen) <= 20


@pytest.mark.parametrize(("rows", "says"), [(None, "comes without lm_head"), (7, "its embedding has 7 rows")])
def test_an_adapter_with_another_embedding(rows: int | None, says: str, base: Path, tmp_path: Path, refused) -> None:
    """A scalar, which has no rows, and a matrix that has fewer than the tokenizer has tokens."""
    model, _ = load(base)
    add_lora(model, LoRAConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    embedding = torch.zeros((rows, 32) if rows else ())
    save_file({**load_file(weights), "base_model.model.transformer.wte.weight": embedding}, weights)
    for command in (["generate", base, "--adapter", tmp_path / "adapter", *ASK], ["merge", base, tmp_path / "adapter"]):
        out = [tmp_path / "out"] if command[0] == "merge" else []
        assert says in refused(*command, *out)

"""The same command on a run that has begun or ended: what is stored stays as it is, and what happens is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_lines import ROWS, line, squares
from small_methods import RUNS, VARIANTS, base_folder, method_config
from small_runs import gpt2_folder, write_config, write_rows

from handtune.cli import main
from handtune.commands import train

OFTEN = [(name, list(VARIANTS)[i % len(VARIANTS)]) for i, name in enumerate(RUNS)]
ALL = [(name, variant) for name in RUNS for variant in VARIANTS]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: base_folder(family, folder) for family in {family for family, _, _ in RUNS.values()}}


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file's bytes, and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def out_of_use(*arguments: object, **settings: object) -> None:
    raise AssertionError("a finished run loads no weights and encodes no data")


def check_finished(name: str, variant: str, bases: dict[str, Path], folder: Path, capsys, monkeypatch) -> None:
    config, out = str(method_config(name, folder, bases[RUNS[name][0]], **VARIANTS[variant])), folder / "run"
    assert main(["train", config]) == 0
    stored = [text for text in capsys.readouterr().out.splitlines() if text.startswith("stored")]
    before, result = files(out), json.loads((out / "result.json").read_text())

    with monkeypatch.context() as patch:
        patch.setattr(train, "prepare", out_of_use)
        assert main(["train", config]) == 0
    assert capsys.readouterr().out.splitlines() == ["finished already: nothing is left to train", *stored]
    assert files(out) == before
    assert main(["train", config, "train.lr=0.5"]) == 2
    assert "train.lr = 0.003, not 0.5" in capsys.readouterr().err
    assert files(out) == before

    # Killed behind the last checkpoint: what trained is put into training again, and stored to the same bytes.
    (out / "result.json").unlink()
    for place in ("adapter", "model"):
        shutil.rmtree(out / place, ignore_errors=True)
    assert main(["train", config]) == 0
    told = capsys.readouterr()
    assert f"finished already: {result['steps']} of {result['steps']} steps" in told.err
    after, again = files(out), json.loads((out / "result.json").read_text())
    assert before.keys() == after.keys()
    assert {path.name for path, (data, _) in after.items() if data != before[path][0]} == {"result.json"}
    for values in (result, again):
        del values["seconds"], values["peak_memory"]
    assert again == result


@pytest.mark.parametrize(("name", "variant"), OFTEN)
def test_a_finished_run_stays_as_it_is(name, variant, bases, tmp_path, capsys, monkeypatch) -> None:
    check_finished(name, variant, bases, tmp_path, capsys, monkeypatch)


@pytest.mark.deep
@pytest.mark.parametrize(("name", "variant"), [pair for pair in ALL if pair not in OFTEN])
def test_every_finished_run_stays_as_it_is(name, variant, bases, tmp_path, capsys, monkeypatch) -> None:
    check_finished(name, variant, bases, tmp_path, capsys, monkeypatch)


def test_norms_unfrozen_later_stay_in_the_adapter(bases, tmp_path, capsys) -> None:
    """They are in its files after the run, and after one that only has to store what it came to."""
    config = method_config("sft", tmp_path, bases["gpt2"], **VARIANTS["lora, gradual"])
    for _ in range(2):
        assert main(["train", str(config)]) == 0
        stored = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
        base = load_file(bases["gpt2"] / "model.safetensors")
        norms = {key.removeprefix("base_model.model."): value for key, value in stored.items() if ".ln_" in key}
        assert len(norms) == 10  # weights and biases of two in each of two layers, and of the last one
        assert all(not torch.equal(value, base[key]) for key, value in norms.items())
        shutil.rmtree(tmp_path / "run/adapter")


def test_a_run_tells_where_it_goes_on(tmp_path, capsys) -> None:
    def interrupted(model: Any, batch: torch.Tensor) -> Any:
        if len(model.seen) == 7:
            raise KeyboardInterrupt
        return squares(model, batch)

    with pytest.raises(KeyboardInterrupt):
        line(epochs=3, save_every=2, loss_fn=interrupted, run_dir=tmp_path / "run")
    assert "going on" not in capsys.readouterr().err
    line(epochs=3, save_every=2, run_dir=tmp_path / "run")
    assert "going on at step 6 of 15" in capsys.readouterr().err
    before = files(tmp_path / "run")
    model, result = line(epochs=3, save_every=2, run_dir=tmp_path / "run")
    assert "finished already: 15 of 15 steps" in capsys.readouterr().err
    assert (result.steps, len(model.seen)) == (15, 0)
    assert files(tmp_path / "run") == before
    line(ROWS[:4], run_dir=None)
    assert "going on" not in capsys.readouterr().err


@pytest.mark.parametrize("asked", [True, False])
def test_untrained_weights_are_not_stored_in_silence(asked, bases, tmp_path, capsys, caplog) -> None:
    """At a rate that does nothing but harm; what was not asked for is not given back."""
    train = {"lr": 3.0, "schedule": "constant", **({"best": "loss"} if asked else {})}
    config = method_config("sft", tmp_path, bases["gpt2"], train=train)
    assert main(["train", str(config)]) == 0
    result, out = json.loads((tmp_path / "run/result.json").read_text()), capsys.readouterr().out
    assert (result["best"]["step"] == 0) == asked
    assert ("UNTRAINED" in out) == ("the weights given back are the untrained ones" in caplog.text) == asked
    if not asked:
        assert f"stored: step {result['best']['step']} (best loss {result['best']['value']:.4f}, of 4 steps)" in out
    base, stored = (load_file(path / "model.safetensors") for path in (bases["gpt2"], tmp_path / "run/model"))
    assert all(torch.equal(base[key], stored[key]) for key in base) == asked


def headless(folder: Path) -> Path:
    """A GPT-2 whose output matrix is its own, but isn't in the checkpoint."""
    gpt2_folder(folder, tied=False)
    stored = load_file(folder / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_head_that_comes_with_an_adapter_is_not_announced(tmp_path, caplog) -> None:
    """Training announces it; evaluation, merging, generation and labelling load the one that was trained."""
    base, rows = headless(tmp_path / "base"), str(write_rows(tmp_path / "texts.jsonl", [{"text": "the cat"}]))
    run, adapter = tmp_path / "run", str(tmp_path / "run/adapter")

    def announced(*arguments: object) -> bool:
        caplog.clear()
        assert main([str(argument) for argument in arguments]) == 0
        return "lm_head.weight" in caplog.text and "new, " in caplog.text

    short = ("--prompt", "the", "--max-new-tokens", 2)
    assert announced("train", method_config("sft", tmp_path, base, lora={"rank": 2}, train={"max_steps": 1}))
    assert not announced("evaluate", run)
    assert not announced("generate", run, *short)
    assert not announced("generate", base, "--adapter", adapter, *short)
    assert not announced("label", run, rows, "--labels", "good", "bad", "--out", tmp_path / "labels.jsonl")
    assert not announced("merge", base, adapter, tmp_path / "merged")
    assert not announced("generate", tmp_path / "merged", *short)

    # Without the head, in base or adapter, what is made is untrained, and that is said.
    assert announced("generate", base, *short)
    weights = load_file(run / "adapter/adapter_model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if "lora" in key}, run / "adapter/adapter_model.safetensors"
    )
    assert announced("generate", run, *short)


def test_no_new_head_is_announced_for_a_reward_that_has_none(tmp_path, caplog, capsys) -> None:
    base = gpt2_folder(tmp_path / "base")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}])
    config = write_config(
        tmp_path / "ppo.toml", out=str(tmp_path / "run"), prompts=str(prompts), reward=str(base),
        model={"path": str(base)},
    )  # fmt: skip
    assert main(["ppo", str(config)]) == 2
    assert "this checkpoint has no reward head" in capsys.readouterr().err
    assert "new, " not in caplog.text

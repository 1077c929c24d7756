"""A run as a model: what `model.path` and `merge` make of its folder, and what it stores if only its head trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_methods import base_folder, method_config
from small_runs import CHAT, assert_same_weights, weights, write_config, write_rows

from handtune.adapted.run_models import model_info, opened_model
from handtune.cli import main
from handtune.engine import drop_adapter, load_adapter, merge_lora, save_adapter, set_adapter
from handtune.engine.peft.config import NO_TARGETS
from handtune.models import load

ONLY_HEAD = {"names": ["*"], "except": ["head.*"]}


def run(*arguments: object, code: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == code


def trained(folder: Path, method: str, base: Path, **tables: Any) -> Path:
    """A finished run in a folder of its own, beside its configuration and rows."""
    folder.mkdir()
    run("train", method_config(method, folder, base, **tables))
    return folder / "run"


def complaint(capsys, *arguments: object) -> str:
    capsys.readouterr()
    run(*arguments, code=2)
    said = capsys.readouterr().err.strip().splitlines()
    return said[-1]


def evaluation(capsys, folder: Path) -> dict[str, Any]:
    capsys.readouterr()
    run("evaluate", folder)
    said = "\n" + capsys.readouterr().out
    return json.loads(said[said.index("\n{") :])


def same_files(ours: Path, expected: Path) -> bool:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    return all((ours / name).read_bytes() == (expected / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """A folder with a base, and a run that has trained an adapter on it."""
    folder = tmp_path_factory.mktemp("adapted")
    trained(folder / "first", "sft", base_folder("gpt2", folder), lora={"rank": 4}, train={"lr": 0.03, "best": "last"})
    return folder


def test_merge_takes_a_run(adapted: Path, tmp_path: Path, capsys) -> None:
    base, first = adapted / "gpt2", adapted / "first/run"
    run("merge", base, first / "adapter", tmp_path / "expected")
    run("merge", first, tmp_path / "run")
    run("merge", base, first, tmp_path / "base and run")
    assert same_files(tmp_path / "run", tmp_path / "expected")
    assert same_files(tmp_path / "base and run", tmp_path / "expected")
    assert "is no run, whose adapter could be merged" in complaint(capsys, "merge", base, tmp_path / "out")
    assert "expected float32, bfloat16, float16" in complaint(
        capsys, "merge", first, tmp_path / "out", "--dtype", "int8"
    )
    said = complaint(capsys, "merge", first, first, tmp_path / "out")
    assert f"{first}/adapter was trained on {base}, not on the run {first}; give that base" in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_that_of_a_run(adapted: Path, tmp_path: Path, capsys) -> None:
    """One that was trained on the run stands on the merged weights, and one on the run's base takes its place."""
    first = adapted / "first/run"
    second = trained(tmp_path / "second", "sft", first, lora={"rank": 2})
    said = complaint(capsys, "generate", first, "--adapter", second / "adapter", "--prompt", "a")
    assert (
        f"was trained on the run {first}, whose own adapter belongs under it: first handtune merge {first} OUT" in said
    )
    run("merge", first, second, tmp_path / "both")
    run("merge", second, tmp_path / "expected")
    assert same_files(tmp_path / "both", tmp_path / "expected")
    moved = shutil.copytree(first, tmp_path / "moved")
    run("merge", moved, second, tmp_path / "of the moved")
    assert same_files(tmp_path / "of the moved", tmp_path / "expected")

    beside = trained(tmp_path / "beside", "sft", adapted / "gpt2", lora={"rank": 2})
    capsys.readouterr()
    run("generate", first, "--adapter", beside / "adapter", "--prompt", "a", "--temperature", 0)
    assert f"{first}: its base with --adapter, and without its own adapter" in capsys.readouterr().err
    run("generate", first, "--adapter", first / "adapter", "--prompt", "a", "--temperature", 0)
    assert "without its own" not in capsys.readouterr().err


@pytest.mark.parametrize("lora", [{"rank": 2}, pytest.param(None, marks=pytest.mark.deep)])
def test_a_run_that_starts_from_a_run_has_the_bits_of_one_that_starts_from_the_merged(lora, adapted, tmp_path) -> None:
    """And a run that starts from that one in turn."""
    run("merge", adapted / "first/run", tmp_path / "merged")
    tables = {} if lora is None else {"lora": lora}
    from_run = trained(tmp_path / "from run", "dpo", adapted / "first/run", **tables)
    from_merged = trained(tmp_path / "from merged", "dpo", tmp_path / "merged", **tables)
    stored = "model/model.safetensors" if lora is None else "adapter/adapter_model.safetensors"
    assert (from_run / stored).read_bytes() == (from_merged / stored).read_bytes()
    run("merge", from_run, tmp_path / "a")
    run("merge", from_merged, tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")
    with opened_model(model_info(from_run)) as info:
        assert_same_weights(weights(load(info, device="cpu")[0]), weights(load(tmp_path / "b", device="cpu")[0]))
    third = trained(tmp_path / "third", "classify", from_run, data={"train": str(_sentiment(tmp_path))})
    assert load(third / "model", device="cpu")[0].task == "sequence-classification"


def _sentiment(folder: Path) -> Path:
    return write_rows(folder / "rows.jsonl", [{"text": "good", "label": "up"}, {"text": "sat", "label": "down"}] * 2)


def test_a_run_with_a_changed_base_is_refused_and_one_that_moved_is_not(tmp_path: Path, capsys) -> None:
    (tmp_path / "a").mkdir()
    trained(tmp_path / "a/first", "sft", base_folder("gpt2", tmp_path / "a"), lora={"rank": 4})
    second = trained(tmp_path / "a/second", "sft", tmp_path / "a/first/run", lora={"rank": 2})
    before = evaluation(capsys, second)
    capsys.readouterr()
    run("train", tmp_path / "a/second/run.toml")
    assert "finished already" in capsys.readouterr().out

    # All together somewhere else; then another adapter, or another base below it, where the same lay.
    (tmp_path / "a").rename(tmp_path / "b")
    second = tmp_path / "b/second/run"
    assert evaluation(capsys, second) == before
    adapter = tmp_path / "b/first/run/adapter/adapter_model.safetensors"
    stored = load_file(adapter)
    save_file({key: value + 1 for key, value in stored.items()}, adapter)
    assert "model.path is not what it was when the run was made" in complaint(capsys, "evaluate", second)
    assert f"{adapter} has changed" in complaint(capsys, "evaluate", second)
    save_file(stored, adapter, {"format": "pt"})
    assert evaluation(capsys, second) == before
    base = tmp_path / "b/gpt2/model.safetensors"
    save_file({key: value + 1 for key, value in load_file(base).items()}, base)
    assert "first/run: model.path is not what it was when the run was made" in complaint(capsys, "evaluate", second)


def test_every_command_takes_a_run_for_a_model(adapted: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    first = adapted / "first/run"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run_model_scores.py").write_text(
        "def short(prompts, completions):\n    return [-len(c) for c in completions]\n"
    )
    write_rows(tmp_path / "rows.jsonl", CHAT)
    ppo = {"episodes": 4, "rollout_batch_size": 4, "batch_size": 4, "max_new_tokens": 2, "lora": {"rank": 2}}
    policy = write_config(
        tmp_path / "ppo.toml", out="policy", prompts="rows.jsonl", reward="run_model_scores:short",
        model={"path": str(first)}, ppo=ppo,
    )  # fmt: skip
    run("check-data", policy)
    run("ppo", policy, "--quiet")
    run("ppo", policy, "--quiet")
    assert "finished already" in capsys.readouterr().out
    run("merge", "policy", "merged")
    ask = ("--prompt", "the", "--temperature", 0, "--max-new-tokens", 3)
    capsys.readouterr()
    said = []
    for model in ("policy", "merged"):
        run("generate", model, *ask)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_run_without_a_base_that_lies_somewhere(adapted: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"config": {"model": {"path": None}}}))
    shutil.copytree(adapted / "first/run/adapter", tmp_path / "adapter")
    assert "its base is a fresh preset, which no file holds" in complaint(capsys, "merge", tmp_path, tmp_path / "out")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/run.json").write_text(json.dumps({"config": {}}))
    assert "the run has not finished" in complaint(capsys, "merge", tmp_path / "unfinished", tmp_path / "out")
    job = method_config("sft", tmp_path, Path("unfinished"))
    monkeypatch.chdir(tmp_path)  # a name that a hub id could have, too
    assert "unfinished: the run has not finished" in complaint(capsys, "train", job)


@pytest.mark.parametrize("wide", [True, pytest.param(False, marks=pytest.mark.deep)])
def test_the_dtype_of_a_merged_checkpoint(wide: bool, adapted: Path, tmp_path: Path) -> None:
    """The change is added in fp32 to the base as it is stored, and rounded once."""
    base, adapter = adapted / "gpt2", adapted / "first/run/adapter"
    if not wide:
        shutil.copytree(base, tmp_path / "base")
        base = tmp_path / "base"
        narrow = {key: value.bfloat16() for key, value in load_file(base / "model.safetensors").items()}
        save_file(narrow, base / "model.safetensors", {"format": "pt"})
    for dtype in ("float32", "bfloat16"):
        run("merge", base, adapter, tmp_path / dtype, "--dtype", dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    exact, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    stored, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for key, value in exact.items():
        change = torch.zeros(())
        name = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{name}.lora_A.weight" in factors:
            change = 32 / 4 * (factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]).T
        torch.testing.assert_close(value, stored[key].float() + change)
        assert torch.equal(rounded[key], value.bfloat16()), key
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert again.dtype == torch.bfloat16


def test_an_adapter_in_the_dtype_of_its_base(adapted: Path, tmp_path: Path) -> None:
    narrow = {"model": {"path": str(adapted / "gpt2"), "dtype": "bfloat16"}}
    sizes = {}
    for dtype in ("float32", "base"):
        folder = trained(tmp_path / dtype, "sft", adapted / "gpt2", lora={"rank": 4, "save_dtype": dtype}, **narrow)
        sizes[dtype] = (folder / "adapter/adapter_model.safetensors").stat().st_size
    exact, rounded = (load_file(tmp_path / name / "run/adapter/adapter_model.safetensors") for name in sizes)
    assert all(torch.equal(rounded[key], value.bfloat16()) for key, value in exact.items())
    assert sizes["base"] < 0.7 * sizes["float32"]  # the header is of one size
    reference = transformers.AutoModelForCausalLM.from_pretrained(adapted / "gpt2")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "base/run/adapter").eval()
    ours, _ = load(adapted / "gpt2", device="cpu")
    load_adapter(ours, tmp_path / "base/run/adapter")
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "family", "kind"),
    [
        ("classify", "bert", "BertForSequenceClassification"),
        pytest.param("tag", "bert", "BertForTokenClassification", marks=pytest.mark.deep),
        pytest.param("reward", "gpt2", "GPT2ForSequenceClassification", marks=pytest.mark.deep),
        # Of small images, which transformers doesn't read.
        pytest.param("images", "resnet", None, marks=pytest.mark.deep),
    ],
)
def test_a_run_on_frozen_features_stores_its_head(method, family, kind, tmp_path, capsys) -> None:
    """As an adapter without factors, for PEFT too; merged it is the whole model, for transformers too."""
    base = base_folder(family, tmp_path)
    folder = trained(tmp_path / "frozen", method, base, freeze=ONLY_HEAD)
    assert not (folder / "model").exists()
    result = json.loads((folder / "result.json").read_text())
    assert json.loads((folder / "run.json").read_text())["trains"] == "frozen features"
    assert result["stored_bytes"] < (base / "model.safetensors").stat().st_size
    head = load_file(folder / "adapter/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in head.values()) == result["trainable"]
    assert evaluation(capsys, folder)["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)
    run("train", tmp_path / "frozen/run.toml")
    assert "finished already" in capsys.readouterr().out
    if method == "tag":
        run("report", folder, "--out", tmp_path / "page.html")

    # The whole model for whoever wants it, and as a base to go on from.
    run("merge", folder, tmp_path / "merged")
    merged, _ = load(tmp_path / "merged", device="cpu")
    inputs = torch.rand(2, 3, 16, 16) if family == "resnet" else torch.arange(1, 9).view(2, 4)
    labels = list(merged.labels) or None
    ours, _ = load(base, merged.task, labels=labels, device="cpu", head_follows=True)
    load_adapter(ours, folder / "adapter")
    torch.testing.assert_close(ours(inputs), merged(inputs), rtol=0, atol=0)
    if kind is not None:
        _compare_with_others(base, folder, tmp_path / "merged", kind, inputs, merged(inputs))
    second = trained(tmp_path / "second", method, folder, train={"epochs": 1, "best": "loss"})
    before = json.loads((second / "result.json").read_text())["before"]
    assert before["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)  # it starts with the trained head


def _compare_with_others(base: Path, folder: Path, merged: Path, kind: str, inputs: Any, ours: torch.Tensor) -> None:
    """The merged model in transformers, and the run's head on the base by PEFT, compute what ours does."""
    theirs = getattr(transformers, kind).from_pretrained(merged).eval()
    torch.testing.assert_close(ours, theirs(inputs).logits.squeeze(-1), rtol=1e-4, atol=1e-5)
    empty = getattr(transformers, kind).from_pretrained(
        base, num_labels=theirs.config.num_labels, ignore_mismatched_sizes=True
    )
    if kind.startswith("GPT2"):
        empty.config.pad_token_id = theirs.config.pad_token_id
    by_peft = peft.PeftModel.from_pretrained(empty, folder / "adapter").eval()
    torch.testing.assert_close(ours, by_peft(inputs).logits.squeeze(-1), rtol=1e-4, atol=1e-5)


def test_a_head_alone_is_an_adapter_like_any_other(tmp_path: Path, capsys) -> None:
    """It can be switched off, stored again, dropped and merged; and a reward model with such a head serves PPO."""
    base = base_folder("gpt2", tmp_path)
    folder = trained(tmp_path / "frozen", "reward", base, freeze=ONLY_HEAD)
    adapter = folder / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["target_modules"] == NO_TARGETS
    model, _ = load(base, "reward", device="cpu", head_follows=True)
    before = weights(model)
    load_adapter(model, adapter, "a")
    after = weights(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["head.out.weight"]
    set_adapter(model, None)
    assert_same_weights(weights(model), before)
    set_adapter(model, "a")
    assert_same_weights(weights(model), after)
    with pytest.raises(ValueError, match="adapter 'a' exists already"):
        load_adapter(model, adapter, "a")
    with pytest.raises(ValueError, match="adapter 'a' is in use"):
        drop_adapter(model, "a")
    save_adapter(model, tmp_path / "again", "a")
    files = [folder / "adapter_model.safetensors" for folder in (adapter, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    merge_lora(model, keep_base=False)
    assert_same_weights(weights(model), after)
    with pytest.raises(ValueError, match="no adapter is active"):
        merge_lora(model)
    load_adapter(model, adapter, "a")  # as in the base now, and still an adapter
    set_adapter(model, None)
    drop_adapter(model, "a")

    rows = write_rows(tmp_path / "prompts.jsonl", CHAT)
    policy = write_config(
        tmp_path / "ppo.toml", out=str(tmp_path / "policy"), prompts=str(rows), reward=str(folder),
        model={"path": str(base)},
        ppo={"episodes": 4, "rollout_batch_size": 4, "batch_size": 4, "max_new_tokens": 2, "lora": {"rank": 2}},
    )  # fmt: skip
    run("ppo", policy, "--quiet")


def test_what_is_stored_whole(tmp_path: Path) -> None:
    """More than a head, a head that more may follow, and a fresh model, whose weights are stored nowhere else."""
    base = base_folder("bert", tmp_path)
    part = trained(tmp_path / "part", "classify", base, freeze={"names": ["*"], "except": ["head.*", "layers.1.*"]})
    later = trained(tmp_path / "later", "classify", base, train={"epochs": 1, "unfreeze": {"head.*": 0, "layers.*": 5}})
    sizes = {"n_layer": 1, "d_model": 32, "n_head": 2, "d_ff": 32}
    fresh = {"preset": "minilm-l6", "tokenizer": str(base / "tokenizer.json"), "overrides": sizes}
    preset = trained(tmp_path / "preset", "classify", base, model=fresh, freeze=ONLY_HEAD)
    assert all((folder / "model/config.json").is_file() for folder in (part, later, preset))

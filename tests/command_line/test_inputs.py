"""A run is bound to what it was made from, by contents: changed by one byte it is refused, moved it goes on."""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_lines import line
from small_runs import CHAT, contents, gpt2, gpt2_folder, logged, write_config, write_rows
from small_tokenizers import byte_level

from handtune import _files
from handtune._files import parse_json
from handtune.cli import main
from handtune.engine import LoRAConfig, TrainConfig, add_lora, train
from handtune.engine.data.batches import Collate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.encode import encode
from handtune.engine.training.optim import Optimizer
from handtune.models import load, save
from handtune.reporting.side_by_side import comparison_table

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
REWARD = "def {name}(prompts, completions):\n    return [len(text) / 20 for text in completions]\n"


@contextmanager
def flipped(path: Path, at: int = -2) -> Iterator[None]:
    """Inside, one bit of the file is another."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[at] ^= 1
    path.write_bytes(changed)
    yield
    path.write_bytes(data)


def base_with_everything(folder: Path) -> Path:
    """A checkpoint in two shards, with every file that says how texts are read and written."""
    model, words = load(gpt2_folder(folder), device="cpu")
    model.tokens = model.tokens.__class__(
        ends=(0,), names={"eos_token": "<|end|>"}, chat_template=TEMPLATE, settings={"eos_token": "<|end|>"}
    )
    save(model, words, folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / "model.safetensors")
    parts = [dict(list(stored.items())[i::2]) for i in range(2)]
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


def project(folder: Path) -> Path:
    """A folder with base, rows and configuration, all named relative to it."""
    folder.mkdir(exist_ok=True)
    base_with_everything(folder / "base")
    write_rows(folder / "rows.jsonl", CHAT)
    write_rows(folder / "more.jsonl", CHAT[:2])
    write_rows(folder / "held.jsonl", CHAT[1:])
    write_config(
        folder / "run.toml", method="sft", out="runs/a", model={"path": "base"}, lora={"rank": 2, "dropout": 0.1},
        data={"train": ["rows.jsonl", "more.jsonl"], "eval": "held.jsonl", "max_length": 48},
        train={"epochs": 3, "batch_size": 2, "lr": 0.01, "save_every": 2},
    )  # fmt: skip
    return folder


@pytest.fixture
def interrupt(monkeypatch) -> Callable[..., None]:
    """Have the command end as by Ctrl-C, in its fifth step."""

    def command(*arguments: object) -> None:
        steps, step = [], Optimizer.step

        def counted(self: Optimizer, lr: float) -> None:
            steps.append(lr)
            if len(steps) == 5:
                signal.raise_signal(signal.SIGINT)
            step(self, lr)

        with monkeypatch.context() as patch:
            patch.setattr(Optimizer, "step", counted)
            assert main([str(argument) for argument in arguments]) == 130

    return command


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A project whose run has finished undisturbed."""
    folder = project(tmp_path_factory.mktemp("whole"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "run.toml"]) == 0
    finally:
        os.chdir(before)
    return folder


def assert_same_end(out: Path, other: Path) -> None:
    ours, theirs = logged(out), logged(other)
    for row in (*ours, *theirs):
        for key in [key for key in row if "seconds" in key or "per_second" in key]:
            del row[key]
    assert ours == theirs
    ours, theirs = ({name: data for name, data in contents(run).items() if "adapter" in name} for run in (out, other))
    del ours["adapter/adapter_config.json"], theirs["adapter/adapter_config.json"]  # which names the base's path
    assert ours == theirs


INPUTS = [
    "rows.jsonl", "more.jsonl", "held.jsonl", "base/config.json", "base/tokenizer.json", "base/tokenizer_config.json",
    "base/generation_config.json", "base/special_tokens_map.json", "base/chat_template.jinja",
    "base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors",
    "base/model.safetensors.index.json",
]  # fmt: skip


@pytest.mark.parametrize("finished", [True, False])
def test_one_changed_byte_is_refused_by_name(whole, finished, tmp_path, monkeypatch, capsys) -> None:
    """Of every file that the run is made from, whether the run is at its end or on its way."""
    folder = shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(folder)
    if not finished:
        Path("runs/a/result.json").unlink()
    before = contents(folder / "runs")
    for name in INPUTS:
        with flipped(Path(name)):
            assert main(["train", "run.toml"]) == 2, name
        field = "model.path" if name.startswith("base") else "data.eval" if name == "held.jsonl" else "data.train"
        refusal = f"runs/a holds a run with other contents of {field} ({folder / name} has changed); take back"
        assert refusal in capsys.readouterr().err
    for name, what in (("base/added_tokens.json", "is new"), ("base/chat_template.jinja", "is gone")):
        path = Path(name)
        data = path.read_bytes() if path.exists() else None
        path.unlink() if data is not None else path.write_text("{}")
        assert main(["train", "run.toml"]) == 2, name
        assert f"other contents of model.path ({folder / name} {what})" in capsys.readouterr().err
        path.write_bytes(data) if data is not None else path.unlink()
    assert main(["train", "run.toml", 'data.train=["more.jsonl", "rows.jsonl"]']) == 2
    assert "other contents of data.train" in capsys.readouterr().err
    assert main(["train", "run.toml", "data.eval=0.25"]) == 2
    assert "data.eval = 'held.jsonl', not 0.25" in capsys.readouterr().err
    assert contents(folder / "runs") == before
    (folder / "base/README.md").write_text("not read")
    assert main(["train", "run.toml"]) == 0
    if finished:
        assert contents(folder / "runs") == before
        assert capsys.readouterr().out.startswith("finished already")


def test_images_are_known_by_name_and_contents(tmp_path, monkeypatch, capsys) -> None:
    from small_methods import base_folder, method_config

    config = str(method_config("images", tmp_path, base_folder("resnet", tmp_path), train={"epochs": 1}))
    assert main(["train", config]) == 0
    image = next((tmp_path / "images").rglob("*.png"))
    with flipped(image):
        assert main(["train", config]) == 2
    assert f"other contents of data.train ({image} has changed)" in capsys.readouterr().err
    image.rename(image.with_name("other.png"))
    assert main(["train", config]) == 2
    assert f"{image} is gone, {image.with_name('other.png')} is new" in capsys.readouterr().err
    image.with_name("other.png").rename(image)
    (image.parent / ".thumbnails").write_text("hidden files are not read")
    assert main(["train", config]) == 0


def policy(folder: Path) -> Path:
    """A project of ppo whose run has finished; its rewards are a reward model's run and a function."""
    gpt2_folder(folder / "base")
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in CHAT]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "prompts.jsonl", [{"prompt": "the cat sat"}, {"prompt": "good"}] * 2)
    (folder / "judges_of_length.py").write_text(REWARD.format(name="long") + REWARD.format(name="same"))
    model, lora = {"path": "base"}, {"rank": 2, "targets": "layers.1.*"}
    write_config(
        folder / "reward.toml", method="reward", out="reward", model=model, lora=lora,
        data={"train": "pairs.jsonl", "max_length": 48}, train={"batch_size": 2},
    )  # fmt: skip
    settings = {
        "episodes": 12,
        "rollout_batch_size": 4,
        "batch_size": 4,
        "max_new_tokens": 4,
        "reward_norm_samples": 4,
        "lora": lora,
    }
    rewards = ["reward", "judges_of_length:long"]
    write_config(folder / "ppo.toml", out="run", prompts="prompts.jsonl", reward=rewards, model=model, ppo=settings)
    assert main(["train", "reward.toml"]) == 0
    assert main(["ppo", "ppo.toml", "--quiet"]) == 0
    return folder


def test_a_policy_is_bound_to_what_it_is_made_from_and_moves_with_it(interrupt, tmp_path, monkeypatch, capsys) -> None:
    """Refused with another prompt, reward or base; interrupted, moved, called from elsewhere: to the same end."""
    folder = tmp_path / "policy"
    folder.mkdir()
    monkeypatch.chdir(folder)
    policy(folder)
    before = contents(folder / "run")
    for name, field in (
        ("prompts.jsonl", "prompts"), ("reward/adapter/adapter_model.safetensors", "reward"),
        ("judges_of_length.py", "reward"), ("base/model.safetensors", "model.path"),
        ("base/tokenizer.json", "model.path"),
    ):  # fmt: skip
        with flipped(Path(name)):
            assert main(["ppo", "ppo.toml"]) == 2
        shown = f"{folder / name}:long" if name.endswith(".py") else folder / name
        assert f"run holds a run with other contents of {field} ({shown} has changed)" in capsys.readouterr().err
    with flipped(Path("base/model.safetensors")):  # which lies where the reward model's base lay
        assert main(["ppo", "ppo.toml", "out=new"]) == 2
    base = f"another base ({folder / 'base/model.safetensors'} has changed), and would score otherwise"
    assert f"reward: this reward model was trained on {base}" in capsys.readouterr().err
    assert main(["ppo", "ppo.toml", 'reward=["reward", "judges_of_length:same"]']) == 2
    assert "other contents of reward (" in capsys.readouterr().err
    assert main(["ppo", "ppo.toml"]) == 0
    assert contents(folder / "run") == before

    interrupt("ppo", "ppo.toml", "out=half", "--quiet")
    folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "judges_of_length")
    monkeypatch.syspath_prepend(str(tmp_path / "moved"))
    moved = ["model.path=moved/base", "prompts=moved/prompts.jsonl", 'reward=["moved/reward", "judges_of_length:long"]']
    assert main(["ppo", "moved/ppo.toml", "out=moved/half", *moved, "--quiet"]) == 0
    assert_same_end(Path("moved/half"), Path("moved/run"))
    capsys.readouterr()
    assert main(["ppo", "moved/ppo.toml", "out=moved/run", *moved]) == 0
    assert "finished already" in capsys.readouterr().out
    assert main(["generate", "moved/run", "--prompt", "the cat", "--max-new-tokens", "2"]) == 0
    assert contents(tmp_path / "moved/run") == before


def test_a_run_goes_on_wherever_it_lies(whole, interrupt, tmp_path, monkeypatch) -> None:
    """Moved alone or with its data, under another name, and from another working folder: to the same bits."""
    folder = project(tmp_path / "a")
    monkeypatch.chdir(folder)
    interrupt("train", "run.toml")

    def ends(config: object, out: Path, *overrides: str) -> None:
        assert main(["train", str(config), f"out={out}", *overrides]) == 0
        assert_same_end(out, whole / "runs/a")

    ends("run.toml", shutil.copytree("runs/a", tmp_path / "elsewhere"))  # an absolute name, outside
    shutil.copytree("runs/a", "b")
    ends("run.toml", Path("b"))  # the same folder, another name

    # All of it is moved, and started from above: each path has another name now.
    moved = Path(shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("b")))
    shutil.rmtree(folder)
    monkeypatch.chdir(tmp_path)
    paths = ["model.path=moved/base", 'data.train=["moved/rows.jsonl", "moved/more.jsonl"]']
    ends("moved/run.toml", Path("moved/runs/a"), *paths, "data.eval=moved/held.jsonl")
    facts = json.loads((moved / "runs/a/run.json").read_text())
    assert facts["folder"] == str(moved / "runs/a")
    assert facts["inputs"]["model.path"][0]["path"] == str(moved / "base")


def test_a_finished_run_that_is_moved_is_used_from_there(whole, tmp_path, monkeypatch, capsys) -> None:
    ask = ["--prompt", "the cat", "--temperature", "0", "--max-new-tokens", "4"]
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(whole / "runs/a"), *ask]) == 0
    written = capsys.readouterr().out
    assert main(["evaluate", str(whole / "runs/a")]) == 0
    numbers = json.loads(capsys.readouterr().out)

    alone, place = shutil.copytree(whole / "runs/a", tmp_path / "alone"), shutil.copytree(whole, tmp_path / "together")
    first = [contents(alone), contents(place)]
    monkeypatch.chdir(place)
    assert main(["train", "run.toml", f"out={alone}"]) == 0
    assert capsys.readouterr().out.startswith("finished already: nothing is left to train")
    monkeypatch.chdir("/")
    for run in (alone, place / "runs/a"):
        assert main(["generate", str(run), *ask]) == 0
        assert capsys.readouterr().out == written
        assert main(["evaluate", str(run)]) == 0
        assert json.loads(capsys.readouterr().out) == numbers
    assert "a" in comparison_table([alone])
    assert [contents(alone), contents(place)] == first


def test_another_base_of_the_same_name_is_not_taken_for_the_run_s(whole, tmp_path, monkeypatch, capsys) -> None:
    """Where the base is gone, one that lies there now under its name is named, and not used."""
    place = Path(shutil.copytree(whole, tmp_path / "gone"))
    facts = json.loads((place / "runs/a/run.json").read_text().replace(str(whole), "/nowhere"))
    (place / "runs/a/run.json").write_text(json.dumps(facts))
    monkeypatch.chdir(place)
    assert main(["generate", "runs/a", "--prompt", "the", "--max-new-tokens", "2"]) == 0
    (tmp_path / "base").mkdir()  # no checkpoint, where one lay
    moved = json.loads(json.dumps(facts).replace("/nowhere/base", str(tmp_path / "base")))
    (place / "runs/a/run.json").write_text(json.dumps(moved))
    assert main(["generate", "runs/a", "--prompt", "the", "--max-new-tokens", "2"]) == 0
    (place / "runs/a/run.json").write_text(json.dumps(facts))
    shard, held = place / "base/model-00001-of-00002.safetensors", place / "held.jsonl"
    capsys.readouterr()
    with flipped(shard):
        assert main(["generate", "runs/a", "--prompt", "the"]) == 2
    was = "is not what it was when the run was made"
    assert f"model.path {was} ({shard} has changed); put it back" in capsys.readouterr().err
    with flipped(held):
        assert main(["evaluate", "runs/a"]) == 2
        assert f"data.eval {was} ({held} has changed); put it back" in capsys.readouterr().err
        assert main(["evaluate", "runs/a", "--data", "rows.jsonl"]) == 0
    shutil.rmtree("base")
    capsys.readouterr()
    assert main(["generate", "runs/a", "--prompt", "the"]) == 2
    assert "(/nowhere/base is gone); put it back" in capsys.readouterr().err


def test_another_environment_is_said(whole, interrupt, tmp_path, monkeypatch, capsys) -> None:
    folder = project(tmp_path / "a")
    monkeypatch.chdir(folder)
    interrupt("train", "run.toml")
    capsys.readouterr()
    path = Path("runs/a/run.json")
    facts = json.loads(path.read_text())
    assert set(facts["versions"]) == {"handtune", "torch", "python", "numpy"}
    facts["versions"]["torch"], facts["device"] = "2.12.0", "CPU, 9 threads"
    path.write_text(json.dumps(facts))
    assert main(["train", "run.toml"]) == 0
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("the bits may differ")]
    assert said == [
        f"the bits may differ from here: torch 2.12.0 before, {torch.__version__} now; device CPU, 9 threads before, "
        f"CPU, {torch.get_num_threads()} threads now"
    ]
    assert_same_end(Path("runs/a"), whole / "runs/a")
    assert main(["train", "run.toml"]) == 0
    assert "the bits may differ" not in capsys.readouterr().err


def test_what_is_given_in_memory_is_compared_too(tmp_path) -> None:
    """Frozen weights and rows of a call; not what trains, nor another adapter."""
    words, texts = byte_level(), [{"text": "the cat sat"}, {"text": "the dog"}]

    def call(change: Callable[[Any, Any], None] = lambda model, rows: None, out: Path = tmp_path / "run") -> Any:
        model, rows = gpt2(), encode(texts, words, "pretrain", max_length=16, eos=0)[0]
        add_lora(model, LoRAConfig(rank=2))
        change(model, rows)
        config = TrainConfig(epochs=2, batch_size=2)
        return train(model, rows, causal_lm_loss, config, collate=Collate(), run_dir=out)

    def row_changed(model: Any, rows: Any) -> None:
        rows[1]["input_ids"] = [*rows[1]["input_ids"][:-1], 9]

    def weight_changed(model: Any, rows: Any) -> None:
        with torch.no_grad():  # two that change places, which a sum would not notice
            model.embed.tokens.weight[[3, 4]] = model.embed.tokens.weight[[4, 3]]

    def adapter_changed(model: Any, rows: Any) -> None:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if ".lora." in name).fill_(1.0)

    call()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"other contents of the data \(what was given has changed\)"):
        call(row_changed)
    with pytest.raises(ValueError, match=r"other contents of the model \(what is frozen of it has changed\)"):
        call(weight_changed)
    assert call(adapter_changed).steps == 2
    assert contents(tmp_path) == before
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert call(out=tmp_path / "moved").steps == 2
    assert {name.split("/", 1)[1]: data for name, data in contents(tmp_path).items()} == {
        name.split("/", 1)[1]: data for name, data in before.items()
    }


def test_a_run_without_its_log_is_still_a_run(tmp_path) -> None:
    line(run_dir=tmp_path / "run", lr=0.1)
    (tmp_path / "run/metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds a run with train\.lr = 0\.1, not 0\.2"):
        line(run_dir=tmp_path / "run", lr=0.2)


@pytest.mark.parametrize("old", [False, True], ids=["", "vocabulary files"])
def test_a_checkpoints_files_are_read_once(old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no two parts of a command go by different contents; the index also says what to take fingerprints of."""
    monkeypatch.chdir(project(tmp_path / "p"))
    if old:
        Path("base/tokenizer.json").unlink()
        byte_level().model.save("base")
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
        Path("base/tokenizer_config.json").write_text(json.dumps(names))
    read: Counter[str] = Counter()
    monkeypatch.setattr(
        _files, "parse_json", lambda text, where, *more: read.update([where]) or parse_json(text, where)
    )
    assert main(["train", "run.toml", "train.epochs=1"]) == 0
    names = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
    counts = {Path(path).name: count for path, count in read.items() if Path(path).parent.name == "base"}
    assert counts == dict.fromkeys(names, 1) | {"model.safetensors.index.json": 2}

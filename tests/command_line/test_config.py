"""The configuration file: what is read, what may be changed on the command line, and what is refused how."""

import dataclasses
import json
from pathlib import Path

import pytest
from small_runs import write_config

from handtune.config import PPORunConfig, RunConfig, from_table, read_config
from handtune.engine.adapters.lora import LoRAConfig
from handtune.engine.tasks.objectives import METHODS
from handtune.engine.training.config import TrainConfig
from handtune.reference.methods import EXAMPLES, ONLY_FOR
from handtune.saved_runs import _as_toml

FULL = """
method = "classify"
out = "runs/a"
name = "a name"
[model]
path = "bert"
labels = ["down", "up"]
head_layers = 2
[data]
train = ["a.jsonl", "b.csv"]
eval = 0.1
max_length = 64
packing = false
[lora]
rank = 4
alpha = 8
targets = ["q_proj", "layers.*.up"]
rank_pattern = { "up" = 2 }
[freeze]
names = ["embed.*"]
except = ["embed.positions.*"]
[train]
epochs = 3
batch_tokens = 512
lr = 1e-4
betas = [0.9, 0.95]
max_grad_norm = 0.5
lr_scale = { "head.*" = 10 }
unfreeze = { "head.*" = 0, "layers.*" = 1.5 }
"""


def read(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        read(tmp_path, text, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(tmp_path) + "/", "")


def test_everything(tmp_path) -> None:
    config = read(tmp_path, FULL)
    assert (config.method, config.out, config.name) == ("classify", "runs/a", "a name")
    assert (config.model.path, config.model.labels, config.model.head_layers) == ("bert", ["down", "up"], 2)
    assert (config.data.train, config.data.eval) == (["a.jsonl", "b.csv"], 0.1)
    assert (config.data.max_length, config.data.packing) == (64, False)
    assert config.lora == LoRAConfig(4, 8.0, ("q_proj", "layers.*.up"), rank_pattern={"up": 2})
    assert (config.freeze.names, config.freeze.except_) == (["embed.*"], ["embed.positions.*"])
    assert (config.train.epochs, config.train.lr, config.train.betas) == (3, 1e-4, (0.9, 0.95))
    assert config.train.unfreeze == {"head.*": 0, "layers.*": 1.5}
    assert (config.train.weight_decay, config.train.schedule) == (TrainConfig.weight_decay, TrainConfig.schedule)


def test_defaults(tmp_path) -> None:
    config = read(tmp_path, 'method = "sft"\nout = "o"\n[model]\npath = "m"\n[data]\ntrain = "d"\n')
    assert config.lora is None
    assert config.train == TrainConfig()
    assert (config.data.packing, config.data.eval, config.data.max_length) == (True, None, None)


def test_a_stored_configuration_comes_back(tmp_path) -> None:
    """run.json holds it as JSON; `evaluate` and `generate` read it from there."""
    config = read(tmp_path, FULL)
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    again = from_table(RunConfig, _as_toml(stored), "run.json")
    assert json.loads(json.dumps(dataclasses.asdict(again))) == stored


def test_overrides(tmp_path) -> None:
    changes = (
        "train.lr=5", "out=elsewhere/run-2", "data.train=more.jsonl", "lora.targets=attention", "data.packing=true",
        "train.betas=[0.8, 0.9]", 'name="x = y"', "model.labels=['a']", "train.max_steps=7", "train.schedule=linear",
        "data.eval=held out.csv",
    )  # fmt: skip
    config = read(tmp_path, FULL, *changes)
    assert (config.train.lr, config.out, config.data.train) == (5.0, "elsewhere/run-2", "more.jsonl")
    assert type(config.train.lr) is float
    assert (config.lora.targets, config.data.packing, config.train.betas) == ("attention", True, (0.8, 0.9))
    assert (config.name, config.model.labels, config.train.max_steps) == ("x = y", ["a"], 7)
    assert (config.train.schedule, config.data.eval) == ("linear", "held out.csv")
    fresh = read(tmp_path, FULL.partition("[lora]")[0], "lora.rank=3")  # a table that the file lacks
    assert fresh.lora.rank == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.leraning_rate=1"], "run.toml: train: unknown key 'leraning_rate'; known: epochs, max_steps"),
        (["train.epoch=1"], "run.toml: train: unknown key 'epoch'; did you mean 'epochs'?"),
        (["train.learning_rate=1"], "run.toml: train: unknown key 'learning_rate'; did you mean 'lr'?"),
        (["train.batch_rows=1"], "run.toml: train: unknown key 'batch_rows'; did you mean 'batch_size'?"),
        (["train.clip=1"], "run.toml: train: unknown key 'clip'; did you mean 'max_grad_norm'?"),
        (["lora.r=1"], "run.toml: lora: unknown key 'r'; did you mean 'rank'?"),
        (["lora.ranks=1"], "run.toml: lora: unknown key 'ranks'; did you mean 'rank'?"),
        (["modle.path=x"], "run.toml: unknown key 'modle'; did you mean 'model'?"),
        (["train.lr=fast"], "run.toml: train: lr: expected float, got 'fast'"),
        (["train.epochs=2.5"], "run.toml: train: epochs: expected int, got 2.5"),
        (["train.epochs=true"], "run.toml: train: epochs: expected int, got True"),
        (["train.lr=true"], "run.toml: train: lr: expected float, got True"),
        (["train.max_grad_norm=nothing"], "run.toml: train: max_grad_norm: expected float, got 'nothing'"),
        (["train.betas=[0.9]"], "run.toml: train: betas: expected [float, float], got [0.9]"),
        (["train.betas=['a', 'b']"], "expected [float, float]"),
        (["data.train=[1, 2]"], "run.toml: data: train: expected str or [str, ...], got [1, 2]"),
        (["data.eval=[0.1]"], "run.toml: data: eval: expected str or float, got [0.1]"),
        (["train.lr_scale={ 'a' = 'b' }"], "train: lr_scale: expected a table of float, got {'a': 'b'}"),
        (["train=3"], "run.toml: train: expected a table, got 3"),
        (["data.mix=[{path='a', weight=2}]"], "run.toml: data: train and mix both name what to train on"),
        (["data.mix=[{path='a', weight=0}]"], "data: mix: a: weight: expected a positive number, got 0"),
        (["data.mix=[{path='a', weight=-1}]"], "data: mix: a: weight: expected a positive number, got -1"),
        (["data.mix=[{weight=1}]"], "data: mix: path is missing"),
        (["data.mix=['a']"], "data: mix: expected [a table, ...], got ['a']"),
        (["data.columns={lable='a'}"], "data: columns: no row has a field 'lable'; there are adapter, anchor"),
        (["data.columns={text=3}"], "data: columns: expected a table of str, got {'text': 3}"),
        (["data.prompt='a'"], "data: prompt: 'a' names no column; write one in braces"),
        (["data.prompt='{a'"], "data: prompt: '{a': expected '}' before end of string; double a brace"),
        (["data.prompt='{a:5}'"], "data: prompt: '{a:5}': braces hold the name of a column and nothing else"),
        (["data.prompt='{a!r}'"], "braces hold the name of a column and nothing else"),
        (["data.prompt='{}'"], "braces hold the name of a column and nothing else"),
        (["data.prompt='{a}'", "data.columns={prompt='b'}"], "data: prompt: columns names a column for it, too"),
        (["model.tokenizer='a'"], "run.toml: model: tokenizer, overrides: they are for a preset; a checkpoint has"),
        (["model.overrides={ n_layer = 1 }"], "run.toml: model: tokenizer, overrides: they are for a preset"),
        (["data.datasets='a'"], "data: unknown key 'datasets'; did you mean 'mix'?"),
        (["lora.targets=[['a']]"], "lora: targets: expected str or [str, ...], got [['a']]"),
        (["train.schedule=cosin"], "run.toml: train: schedule = 'cosin': expected one of constant, linear,"),
        (["lora.rank=0"], "run.toml: lora: rank: expected a positive whole number, at most 32,768, got 0"),
        (["train.batch_size=4"], "run.toml: train: batch_size and batch_tokens"),
        (["method=stf"], "run.toml: method = 'stf': expected one of pretrain, sft"),
        (["model.preset=gpt2"], "run.toml: model: give path (a folder or hub id) or preset"),
        (["train.lr=nan"], "run.toml: train: lr: nan is no number to compute with"),
        (["train.max_grad_norm=inf"], "run.toml: train: max_grad_norm: inf is no number to compute with"),
        (["train.lr_scale={ 'a' = 1e39 }"], "run.toml: train: lr_scale: a: 1e+39 is no number to compute with"),
        (["train.betas=[0.9, -1e300]"], "run.toml: train: betas: -1e+300 is no number to compute with"),
        (["lr"], "'lr': expected section.field=value, for example train.lr=1e-4"),
        (["=3"], "expected section.field=value"),
        (["method.x=3"], "method is not a section"),
    ],
)  # fmt: skip
def test_refused(tmp_path, changes, message) -> None:
    assert message in refusal(tmp_path, FULL, *changes)


@pytest.mark.parametrize("name", [name for name, methods in ONLY_FOR.items() if methods != METHODS])
def test_an_option_that_the_method_makes_no_use_of(tmp_path, name) -> None:
    """What a method ignores is refused, whichever method it is."""
    changes = {"loss": "loss.label_smoothing=0.1", "dpo": "dpo.beta=0.2", "data.chat": "data.chat='on'",
               "data.truncate": "data.truncate='drop'", "data.prompt": "data.prompt='{a}'",
               "data.augment": "data.augment=false", "model.labels": "model.labels=['a', 'b']"}  # fmt: skip
    change = changes.get(name, f"{name}={EXAMPLES.get(name)}")
    text = 'out = "a"\n[model]\npath = "a"\n[data]\ntrain = "a.jsonl"\n'
    for method in METHODS:
        if method in ONLY_FOR[name]:
            assert read(tmp_path, text, f"method={method}", change)
        else:
            said = refusal(tmp_path, text, f"method={method}", change)
            assert said.startswith((f"run.toml: {name}: ", "run.toml: loss: "))  # of which some methods have no option


def test_an_option_that_ppo_makes_no_use_of() -> None:
    table = {"out": "a", "prompts": "a", "reward": "a"}
    for name, value in (("head_layers", 2), ("labels", ["a"]), ("task", "reward")):
        with pytest.raises(ValueError, match=rf"model\.{name}: method 'ppo' makes no use of it"):
            from_table(PPORunConfig, {**table, "model": {"path": "a", name: value}}, "ppo.toml")


def test_a_stored_number_that_no_tensor_holds(tmp_path) -> None:
    """In run.json, or written in hexadecimal digits: whole numbers may be of any length there."""
    with pytest.raises(ValueError, match=r"run\.json: train: seed: a whole number of 100 bits, where 64 are the most"):
        from_table(
            RunConfig, {"train": {"seed": 2**99}, "method": "sft", "out": "o", "model": {}, "data": {}}, "run.json"
        )
    large = "train.lr_scale={ 'a' = [1, 0x" + "f" * 10_000 + "] }"
    assert "run.toml: train: lr_scale: a: a whole number of 40,000 bits" in refusal(tmp_path, FULL, large)


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such configuration file"):
        read_config(tmp_path / "none.toml")
    assert "not valid TOML" in refusal(tmp_path, "method = ")
    (tmp_path / "latin.toml").write_bytes("name = 'é'".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.toml: byte 8 is not UTF-8"):
        read_config(tmp_path / "latin.toml")
    assert refusal(tmp_path, "") == "run.toml: method, out, model, data is missing"
    missing = refusal(tmp_path, 'method="sft"\nout="o"\n[model]\n[data]\n')
    assert missing == "run.toml: data: train is missing: files of rows, or tables [[data.mix]] with path and weight"


def test_the_helper_of_the_tests_writes_what_is_read(tmp_path) -> None:
    path = write_config(
        tmp_path / "x.toml",
        method="sft",
        out="o",
        model={"path": "m"},
        data={"train": "d"},
        train={"betas": [0.1, 0.2]},
    )
    assert read_config(path).train.betas == (0.1, 0.2)


def test_tables_in_tables_without_end_are_refused(tmp_path: Path) -> None:
    """Each level of the text is many of the table: dotted keys."""
    nested = "{" + ".".join("a" * 60) + " = "
    base = 'method = "sft"\nout = "out"\nmodel.path = "base"\ndata.train = "rows"\n'
    deep = tmp_path / "deep.toml"
    deep.write_text(f"{base}[train]\nlr_scale = {nested * 20}1{'}' * 20}\n")
    with pytest.raises(ValueError, match=r"deep\.toml: TOML that is nested too deeply to be read"):
        read_config(deep)


def test_ppo_adds_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "ppo.toml").write_text(
        'out = "out"\nprompts = "p.jsonl"\nreward = "m:f"\n[model]\npath = "base"\nadd_tokens = ["<a>"]\n'
    )
    with pytest.raises(ValueError, match=r"model\.add_tokens: ppo trains no rows of the embedding"):
        read_config(tmp_path / "ppo.toml", (), PPORunConfig)

"""A model in shards trains as the whole model does: adapters to the bit, its own weights to rounding."""

import io
import json
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from divided_methods import (
    POLICIES,
    assert_same_left,
    configuration,
    divided,
    divided_policy,
    in_process,
    typed,
    written_in_shards,
)
from many_ranks import fork_server, on_ranks
from safetensors.torch import load_file
from small_runs import PAIRS, gpt2, logged, write_rows

from handtune.cli import main
from handtune.config import read_config
from handtune.engine import LoRAConfig, add_lora, merge_lora, quantize
from handtune.engine.parallel.ranks import gathered
from handtune.engine.parallel.sharding import Sharding, is_shard
from handtune.prepare import prepare, run_base
from handtune.processes import sharding_of, while_loading

QUICK = [("sft", "nf4")]
CELLS = [
    ("pretrain", "lora"), ("sft", "lora"), ("sft", "dora"), ("masked-lm", "nf4"), ("classify", "head"), ("tag", "lora"),
    ("qa", "dora"), ("embed", "lora"), ("reward", "lora"), ("dpo", "lora"), ("span-corruption", "lora"),
    ("seq2seq", "lora"), ("images", "head"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def processes():
    with fork_server("divided_methods"):
        yield


@pytest.mark.parametrize(("name", "variant"), QUICK)
def test_an_adapter_on_a_sharded_base(name, variant, tmp_path) -> None:
    alone = divided(name, variant, 1, tmp_path / "1")
    assert_same_left(alone, divided(name, variant, 3, tmp_path / "3", shard="full"))


@pytest.mark.deep
@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_every_adapter_on_a_sharded_base(name, variant, tmp_path) -> None:
    alone = divided(name, variant, 1, tmp_path / "1")
    for n in (2, 4):
        assert_same_left(alone, divided(name, variant, n, tmp_path / str(n), shard="full"))


def test_texts_that_end_early_wait_for_the_others(tmp_path) -> None:
    """A model in shards computes each token in all processes together."""
    alone = written_in_shards("none")
    assert len({len(text) for text in alone}) > 3
    assert on_ranks(3, tmp_path / "ranks", written_in_shards, "full") == [alone] * 3


@pytest.mark.deep
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_on_a_sharded_base(name, tmp_path) -> None:
    alone = divided_policy(name, 1, tmp_path / "1")
    for n in (2, 3, 4):
        assert_same_left(alone, divided_policy(name, n, tmp_path / str(n), "full"))


@pytest.mark.deep
@pytest.mark.parametrize("variant", ["upper layer", "dora", "pissa", "nf4", "from an adapter"])
def test_policies_rewarded_by_a_model_on_their_sharded_base(variant, tmp_path) -> None:
    """Where shared layers are computed once, weights are read for an adapter's start, or an adapter trains on."""
    reward = divided("reward", "lora", 1, tmp_path / "reward")
    settings: dict[str, Any] = {"reward": reward, "reward_norm_samples": 5}
    if variant == "nf4":
        settings["model"] = {"quantize": "nf4"}
    elif variant == "from an adapter":
        settings |= {"model": {"adapter": str(divided("sft", "lora", 1, tmp_path / "sft"))}, "lora": {}}
    else:
        adapters = {"upper layer": {"targets": ["layers.1.*"]}, "dora": {"dora": True}, "pissa": {"init": "pissa"}}
        settings["lora"] = {"rank": 2, **adapters[variant]}

    alone = divided_policy("ppo", 1, tmp_path / "1", **settings)
    for n in (2, 3):
        assert_same_left(alone, divided_policy("ppo", n, tmp_path / str(n), "full", **settings))


@pytest.mark.deep
@pytest.mark.parametrize(
    ("method", "start", "goes_on"),
    [
        ("masked-lm", 'freeze.except=["embed.tokens.weight"]', 'freeze.names=["embed.*"]'),
        ("classify", "train.lr=0.001", "model.head_layers=2"),
    ],
)
def test_what_an_adapter_brings_stays_whole(method, start, goes_on, tmp_path) -> None:
    """Frozen, an embedding that trained with the adapter is stored with it again; another head has its layers."""
    config = str(configuration("masked-lm", "lora", tmp_path / "start"))
    on_ranks(1, tmp_path / "ranks", typed, ["train", config, start])
    runs = []
    for n in (1, 3):
        config = str(configuration(method, "full", tmp_path / str(n), "none" if n == 1 else "full"))
        on_ranks(
            n,
            tmp_path / f"ranks-{n}",
            typed,
            ["train", config, f"model.adapter={tmp_path / 'start' / 'run'}", goes_on],
        )
        runs.append(tmp_path / str(n) / "run")
    assert_same_left(*runs)


STARTS = {
    "factors": ["lora.rank=2"],
    "new tokens": ["lora.rank=2", 'model.add_tokens=["<|new|>"]'],
    "token rows and norms": ["lora.rank=2", 'freeze.token_rows=["a", "b"]', 'freeze.except=["*norm*"]'],
    "matrices": ["lora.rank=2", 'freeze.except=["layers.*.up.weight"]'],
    "the vocabulary": ["lora.rank=2", 'freeze.except=["embed.tokens.weight"]', 'model.add_tokens=["<|new|>"]'],
}


def matrices_of_layers_whole(config: str, overrides: list[str]) -> int:
    """How many matrices of layers a process has whole of the model of a run, once it is prepared."""
    run = read_config(Path(config), overrides)
    sharding = sharding_of(run, None)
    ready = prepare(run, run_base(run), Path(run.out), shard=while_loading(run, sharding))
    layers = [(name, p) for name, p in ready.model.layers.named_parameters() if ".lora." not in name and p.dim() > 1]
    return sum(not is_shard(parameter) for _, parameter in layers)


@pytest.mark.deep
@pytest.mark.parametrize("start", STARTS)
def test_adapters_that_go_on(start, tmp_path) -> None:
    """The run that makes an adapter, the one that goes on from it, and DPO against it: in shards as without."""
    options = STARTS[start]
    for number, name in enumerate(("sft", "sft", "dpo")):
        runs = []
        for n in (1, 3):
            folder = tmp_path / f"{number}-{n}"
            config = str(configuration(name, "full", folder, "none" if n == 1 else "full"))
            on_ranks(n, tmp_path / f"ranks-{number}-{n}", typed, ["train", config, *options])
            runs.append(folder / "run")
        assert_same_left(*runs)
        whole = on_ranks(3, tmp_path / f"seen-{number}", matrices_of_layers_whole, config, options)
        assert (min(whole) > 0) == (start == "matrices")  # they train, or come with the adapter
        options = [f"model.adapter={runs[0]}"]


@pytest.mark.deep
@pytest.mark.parametrize(("n", "mode"), [(2, "full"), (3, "full"), (4, "hybrid")])
@pytest.mark.parametrize("name", ["sft", "masked-lm", "seq2seq", "classify"])
def test_all_weights_in_shards_after_twenty_steps(name, n, mode, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two machines of two processes, where there are four
    settings = {"max_steps": 20, "best": "last", "lr": 1e-3}
    alone = divided(name, "full", 1, tmp_path / "1", **settings)
    other = divided(name, "full", n, tmp_path / "n", shard=mode, **settings)
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (alone, other))
    # Absolute: of keys' biases, which change nothing, the gradient is rounding alone, which Adam makes steps of.
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-6
    for one, two in zip(logged(alone), logged(other), strict=True):
        assert one.keys() == two.keys()
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=1e-5)


@pytest.mark.deep
def test_weights_in_shards_are_saved_whole_and_go_on_in_other_shards(tmp_path) -> None:
    """From four processes to one without shards, and to three; the files are those of one process."""
    settings = {"epochs": 8, "best": "last", "lr": 1e-3, "save_every": 1, "keep_last": 9}
    alone = divided("masked-lm", "full", 1, tmp_path / "1", **settings)
    four = divided("masked-lm", "full", 4, tmp_path / "4", shard="full", **settings)
    stored = "checkpoints/step-00000004/tensors.safetensors"
    ours, theirs = load_file(alone / stored), load_file(four / stored)
    assert ours.keys() == theirs.keys()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in theirs.items()}
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-6

    # What comes after the fourth step is taken away, as a kill would have prevented it.
    for n, mode in ((1, "none"), (3, "full"), (2, "none")):
        folder = tmp_path / f"go-on-{n}"
        shutil.copytree(tmp_path / "4", folder)
        shutil.rmtree(folder / "ranks")
        for name in ("result.json", "model", "examples.json"):
            remove(folder / "run" / name)
        for step in range(5, 9):
            remove(folder / f"run/checkpoints/step-{step:08d}")
        text = (folder / "run.toml").read_text().replace(str(tmp_path / "4"), str(folder))
        (folder / "run.toml").write_text(text.replace('"full"', f'"{mode}"'))
        on_ranks(n, folder / "ranks", in_process, "train", str(folder / "run.toml"))
        end = load_file(folder / "run/model/model.safetensors")
        whole = load_file(four / "model/model.safetensors")
        assert max((end[name] - whole[name]).abs().max().item() for name in whole) <= 1e-6
        assert [row["step"] for row in logged(folder / "run") if "loss" in row] == list(range(1, 9))


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def refused_in_shards() -> list[str]:
    model = gpt2()
    Sharding("full", 0, torch.device("cpu")).finish(model, ())
    said = []
    add_lora(model, LoRAConfig(rank=2))
    for refused in (quantize, merge_lora):
        with pytest.raises(ValueError, match="the model's weights are in shards: ") as error:
            refused(model)
        said.append(str(error.value))
    return said


def test_what_needs_whole_weights_is_refused(tmp_path) -> None:
    (said,) = on_ranks(1, tmp_path / "ranks", refused_in_shards)
    assert [line.rpartition("shards: ")[2] for line in said] == [
        "quantize it first, or load it with quantize=",
        "save_adapter(model, path), load the base whole, load_adapter and merge_lora there",
    ]


@pytest.mark.deep
def test_what_shards_can_not_do_is_said(tmp_path, capsys) -> None:
    for optimizer in ("muon", "adamw8bit"):
        folder = tmp_path / optimizer
        config = configuration("sft", "full", folder, shard="full", optimizer=optimizer)
        for code, line in on_ranks(2, folder / "ranks", refused, str(config)):
            assert code == 2
            assert f'train.optimizer = "{optimizer}": the matrices that train are in shards' in line
    config = configuration("sft", "gradual", tmp_path / "gradual", shard="full")
    for code, line in on_ranks(2, tmp_path / "gradual/ranks", refused, str(config)):
        assert (code, "train.unfreeze: a model in shards" in line) == (2, True)
    assert main(["train", str(config)]) == 2
    assert 'parallel.shard = "full": there is one process' in capsys.readouterr().err


def refused(config: str) -> tuple[int, str]:
    """The exit code of a run that is refused, and what is said."""
    sink = io.StringIO()
    with redirect_stderr(sink):
        code = main(["train", config])
    said = gathered(sink.getvalue())
    return code, "".join(said)


CHANGES = {
    "idle processes": ("sft", "full", ["train.micro_batch_size=3"]),
    "against itself": ("dpo", "full", []),
    "matrices alone": (
        "sft",
        "full",
        ['freeze.names=["*"]', 'freeze.except=["layers.*.up.weight", "layers.*.down.weight"]'],
    ),
    "a matrix beside an adapter": ("sft", "lora", ['freeze.except=["embed.tokens.weight"]']),
    "an adapter on embeddings": ("sft", "full", ["lora.rank=2", 'lora.targets=["embed.positions", "layers.*.up"]']),
    "against itself, on embeddings": (
        "dpo",
        "full",
        ["lora.rank=2", 'lora.targets=["embed.positions", "layers.*.up"]'],
    ),
    "a head with a hidden layer": ("classify", "lora", ["train.best=last", "model.head_layers=2"]),
    "and new tokens": ("classify", "lora", ["train.best=last", "model.head_layers=2", 'model.add_tokens=["<|n|>"]']),
    "and rows of tokens": ("classify", "lora", ["train.best=last", "model.head_layers=2", 'freeze.token_rows=["the"]']),
    "a tied matrix by its other name": ("sft", "lora", ['freeze.except=["head.weight"]']),
    "a head that is not tied": ("seq2seq", "full", ['freeze.names=["*"]', 'freeze.except=["head*"]']),
    # A large ε, so that gradients that are rounding alone make no steps.
    "the best in the middle": (
        "sft",
        "full",
        ["train.best=loss", "train.lr=0.4", "train.eps=0.01", "train.eval_every=1"],
    ),
}


@pytest.mark.deep
def test_micro_batches_with_and_without_negatives(tmp_path) -> None:
    """Where a negative is left out, since it is a positive, too, the model passes over as many batches."""
    runs = []
    for n in (1, 2, 3):
        config = configuration("embed", "lora", tmp_path / str(n), "none" if n == 1 else "full")
        rows = [{**row, "negative": PAIRS[i - i % 2]["positive"]} for i, row in enumerate(PAIRS)]
        write_rows(tmp_path / str(n) / "rows.jsonl", rows)
        on_ranks(n, tmp_path / f"ranks-{n}", in_process, "train", str(config))
        runs.append(tmp_path / str(n) / "run")
    for run in runs[1:]:
        assert_same_left(runs[0], run)


@pytest.mark.deep
@pytest.mark.parametrize("change", CHANGES)
def test_shards_in_unusual_runs(change, tmp_path) -> None:
    """What is stored, and what the model writes with it, is as from one process without shards."""
    name, variant, overrides = CHANGES[change]
    runs = {}
    for n in (1, 4):
        config = configuration(name, variant, tmp_path / str(n), "none" if n == 1 else "full", epochs=5)
        on_ranks(n, tmp_path / f"ranks-{n}", typed, ["train", str(config), *overrides])
        runs[n] = tmp_path / str(n) / "run"
    paths = [path.relative_to(runs[1]) for path in runs[1].rglob("*.safetensors")]
    assert len(paths) >= 2
    for path in paths:
        ours, theirs = load_file(runs[1] / path), load_file(runs[4] / path)
        assert ours.keys() == theirs.keys()
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-5
    best = json.loads((runs[4] / "result.json").read_text())["best"]
    assert (best.get("step") not in (None, 5)) == (change == "the best in the middle")
    one, other = (json.loads((run / "examples.json").read_text()) for run in runs.values())
    assert one["texts"] == other["texts"]
    if name == "sft":
        assert one["general"]["after"] == pytest.approx(other["general"]["after"], rel=1e-5)

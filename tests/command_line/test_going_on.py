"""Training that goes on from an adapter, by `model.adapter`, and a finished run that is prolonged."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_kills import killed_everywhere
from small_methods import COMPARISONS
from small_runs import CHAT, SENTIMENT, bert_folder, contents, gpt2_folder, logged, write_config, write_rows
from transformers import AutoModelForCausalLM

from handtune.cli import main
from handtune.engine import load_adapter
from handtune.models import add_tokens, load

WEIGHTS = "adapter/adapter_model.safetensors"
LORA = {"rank": 2, "alpha": 8, "targets": "attention"}


def job(method: str, out: Path, rows: list[dict[str, Any]], **tables: Any) -> str:
    file = str(write_rows(out.parent / f"{out.name}.jsonl", rows))
    train = {"epochs": 1, "batch_size": 2, "lr": 0.02, **tables.pop("train", {})}
    data = {"train": file, "eval": file, "max_length": 64}
    return str(write_config(out.with_suffix(".toml"), method=method, out=str(out), data=data, train=train, **tables))


def ran(command: str, *arguments: str) -> None:
    assert main(["--debug", command, *arguments]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("handtune: ")
    return said[-1].removeprefix("handtune: ")


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sft, with a token that was added and norms that train beside the adapter."""
    folder = tmp_path_factory.mktemp("going-on")
    model = {"path": str(gpt2_folder(folder / "base")), "add_tokens": ["<|new|>"]}
    rows = [{**row, "prompt": "<|new|>" + row["prompt"]} for row in CHAT]
    ran("train", job("sft", folder / "sft", rows, model=model, lora=LORA, freeze={"except": ["*norm*"]}))
    return folder / "sft"


def ppo_job(folder: Path, **model: str) -> str:
    judges = [str(path) for path in [folder / "judge"] if path.exists()]  # a reward model on the same base
    prompts = str(write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in CHAT]))
    (folder / "long_texts.py").write_text("def long(prompts, completions):\n    return [len(c) for c in completions]\n")
    return str(
        write_config(
            folder / "ppo.toml", out=str(folder / "ppo"), prompts=prompts,
            reward=["long_texts:long", *judges], model=model,
            ppo={"episodes": 8, "rollout_batch_size": 4, "batch_size": 4, "max_new_tokens": 4, "lr": 0.01},
        )
    )  # fmt: skip


def test_sft_then_dpo_then_ppo(sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Each begins exactly where the one before ended, and leaves an adapter for the base that all began with."""
    monkeypatch.chdir(tmp_path)
    dpo, ppo = tmp_path / "dpo", tmp_path / "ppo"
    ran("train", job("dpo", dpo, COMPARISONS, model={"adapter": str(sft)}))
    result = json.loads((dpo / "result.json").read_text())
    assert result["before"]["loss"] == pytest.approx(math.log(2), abs=1e-7)  # the reference is what it began with
    assert result["before"]["accuracy"] == 0.5
    assert result["metrics"]["loss"] < 0.69

    reward = tmp_path / "judge"
    ran("train", job("reward", reward, COMPARISONS, model={"path": str(sft.parent / "base")}, lora={"rank": 2}))
    ran("ppo", ppo_job(tmp_path, adapter=str(dpo)))
    first, second = logged(ppo)
    assert (first["kl"], first["approx_kl"] > 0) == (0.0, True)
    assert second["kl"] != 0.0

    # All three have the same sites, ranks and tensors, and say the same base; the token's row and norms came along.
    stored = [load_file(run / WEIGHTS) for run in (sft, dpo, ppo)]
    facts = [json.loads((run / "adapter/adapter_config.json").read_text()) for run in (sft, dpo, ppo)]
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["trainable_token_indices"] and any(".ln_1.weight" in key for key in stored[0])
    assert stored[0].keys() == stored[1].keys() == stored[2].keys()
    for before, after, frozen in ((stored[0], stored[1], ()), (stored[1], stored[2], (".ln_", "token_adapter"))):
        for key, tensor in after.items():
            same = any(part in key for part in frozen)
            assert torch.equal(tensor, before[key]) == same, key

    # PEFT puts it on the base, enlarged by the token, and both compute the same.
    theirs = AutoModelForCausalLM.from_pretrained(str(sft.parent / "base"))
    model, tokenizer = load(str(sft.parent / "base"))
    add_tokens(model, tokenizer, ["<|new|>"])
    theirs.resize_token_embeddings(model.config.vocab_size)
    theirs = peft.PeftModel.from_pretrained(theirs, str(ppo / "adapter"))
    load_adapter(model, ppo / "adapter")
    ids = torch.tensor([tokenizer.encode("<|new|>Question: who sat on the mat?").ids])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)

    # Run again, nothing changes; and what reads runs reads these.
    before = contents(tmp_path)
    for command, toml in (("train", "dpo.toml"), ("ppo", "ppo.toml")):
        ran(command, toml)
        assert capsys.readouterr().out.splitlines()[-3].startswith("finished already")
    assert contents(tmp_path) == before
    ran("check-data", "ppo.toml")
    ran("check-data", "dpo.toml")
    ran("generate", "ppo", "--prompt", "<|new|>Question:", "--max-new-tokens", "2")
    capsys.readouterr()
    ran("evaluate", "dpo")
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-6)


def test_evaluated_as_it_ended(sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that went on is evaluated with its own adapter, although the one that it began with is gone."""
    shutil.copytree(sft, tmp_path / "start")
    lora = {**LORA, "dropout": 0.25, "loraplus_lr_ratio": 4.0}
    ran("train", job("sft", tmp_path / "more", CHAT, model={"adapter": str(tmp_path / "start")}, lora=lora))
    assert json.loads((tmp_path / "more/adapter/adapter_config.json").read_text())["lora_dropout"] == 0.25
    shutil.rmtree(tmp_path / "start")
    result = json.loads((tmp_path / "more/result.json").read_text())
    capsys.readouterr()
    ran("evaluate", str(tmp_path / "more"))
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-6)
    ran("merge", str(sft.parent / "base"), str(tmp_path / "more/adapter"), str(tmp_path / "merged"))


def test_the_start_is_one_of_its_inputs(sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sft / "adapter", tmp_path / "start")
    config = job(
        "sft", tmp_path / "run", CHAT, model={"path": str(sft.parent / "base"), "adapter": str(tmp_path / "start")}
    )
    ran("train", config)
    shutil.move(tmp_path / "start", tmp_path / "moved")
    ran("train", config, f"model.adapter={tmp_path / 'moved'}")
    assert "finished already" in capsys.readouterr().out
    (tmp_path / "moved/chat_template.jinja").write_text("another")
    message = refused(capsys, "train", config, f"model.adapter={tmp_path / 'moved'}")
    assert f"other contents of model.adapter ({tmp_path / 'moved/chat_template.jinja'} is new)" in message


def test_a_classifier_goes_on_with_its_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head comes along; labels are those of the first run, also where the new rows have only one of them."""
    base = str(bert_folder(tmp_path / "bert"))
    first, second = tmp_path / "first", tmp_path / "second"
    ran("train", job("classify", first, SENTIMENT, model={"path": base}, lora=LORA, train={"epochs": 3}))
    down = [row for row in SENTIMENT if row["label"] == "down"]
    ran("train", job("classify", second, down, model={"adapter": str(first)}))
    facts, result = (json.loads((second / name).read_text()) for name in ("run.json", "result.json"))
    assert facts["labels"] == ["down", "up"]
    before, after = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert before.keys() == after.keys() and any("classifier" in key for key in before)
    assert not any(torch.equal(before[key], after[key]) for key in before if "classifier.weight" in key)
    assert result["metrics"]["accuracy"] == 1.0
    capsys.readouterr()
    ran("check-data", str(second.with_suffix(".toml")))
    assert "down" in capsys.readouterr().out

    # Its outputs are in its own order.
    for labels in ("['up', 'down']", "['a', 'b']"):
        said = refused(
            capsys, "train", str(second.with_suffix(".toml")), f"out={tmp_path / 'third'}", f"model.labels={labels}"
        )
        assert "has ['down', 'up'], in this order; leave model.labels out" in said
    ran("train", str(second.with_suffix(".toml")), f"out={tmp_path / 'third'}", "model.labels=['down', 'up']")


def test_the_same_table_is_no_difference_by_rounding(tmp_path: Path) -> None:
    """The scale 16 / √5 is stored as an alpha, and comes back with another last bit."""
    base = str(gpt2_folder(tmp_path / "base"))
    lora = {"rank": 5, "alpha": 16, "rslora": True}
    ran("train", job("sft", tmp_path / "first", CHAT, model={"path": base}, lora=lora))
    ran("train", job("sft", tmp_path / "second", CHAT, model={"adapter": str(tmp_path / "first")}, lora=lora))


def test_a_head_alone_is_a_model_to_go_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, head = str(bert_folder(tmp_path / "bert")), tmp_path / "head"
    frozen = {"names": ["*"], "except": ["head.*"]}
    ran("train", job("classify", head, SENTIMENT, model={"path": base}, freeze=frozen))
    config = job("classify", tmp_path / "run", SENTIMENT, model={"adapter": str(head)})
    message = refused(capsys, "train", config)
    assert f"model.adapter: {head} trained a head alone; give the run as model.path instead" in message
    ran("train", job("classify", tmp_path / "run", SENTIMENT, model={"path": str(head)}, lora=LORA))


def test_what_is_no_start(sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = job("sft", tmp_path / "run", CHAT, model={"adapter": str(sft)})

    def says(*changes: str) -> str:
        return refused(capsys, "train", config, *changes)

    assert says(f"model.adapter={tmp_path / 'none'}") == f"model.adapter: {tmp_path / 'none'}: no such folder"
    assert "no adapter_config.json there; give the folder of an adapter" in says(f"model.adapter={tmp_path}")
    assert "its fresh weights are not those that model.adapter was trained on" in says("model.preset=gpt2")
    other = gpt2_folder(tmp_path / "other", n_layer=1)
    message = says(f"model.path={other}")
    base = sft.parent / "base"
    assert message.startswith(f"model.adapter: {sft / 'adapter'} was trained on {base}, not on {other}; leave ")
    message = says("lora.rank=2", "lora.alpha=8")
    assert "it is not on transformer.h.0.mlp.c_fc, which targets = 'all-linear' names; leave" in message
    message = says("lora.rank=4", "lora.targets=attention")
    assert "its rank on transformer.h.0.attn.c_attn is 2, not 4; leave the [lora] table out" in message
    message = says("lora.rank=2", "lora.alpha=8", "lora.targets=attention", "lora.init=pissa")
    assert "its factors are there, so that init = 'pissa' begins nothing; leave the [lora] table out" in message
    message = says("model.add_tokens=['<|new|>', '<|newer|>']")
    assert message.startswith("model.add_tokens: '<|newer|>' is not among the tokens of")
    assert not (tmp_path / "run/result.json").exists()

    full = tmp_path / "full"
    ran("train", job("sft", full, CHAT, model={"path": str(other)}))
    assert f"{full} trained the weights themselves; give {full}/model as model.path instead" in says(
        f"model.adapter={full}"
    )
    alone = tmp_path / "alone"
    shutil.copytree(sft / "adapter", alone)
    published = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps({**published, "base_model_name_or_path": None}))
    assert "names no base; give it as model.path" in says(f"model.adapter={alone}")


def test_a_finished_run_is_prolonged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with the bytes of one that was that long from the beginning; until then the shorter one's are there."""
    tables = {"model": {"path": str(gpt2_folder(tmp_path / "base"))}, "lora": {**LORA, "dropout": 0.1}}
    rate = {"schedule": "constant", "warmup": 0}
    config = job("sft", tmp_path / "run", CHAT, train={"epochs": 2, **rate}, **tables)
    ran("train", config)
    short = (tmp_path / "run" / WEIGHTS).read_bytes()
    capsys.readouterr()
    ran("train", config, "train.epochs=4")
    said = capsys.readouterr()
    assert "going on at step 4 of 8" in said.err
    assert (tmp_path / "run" / WEIGHTS).read_bytes() != short
    ran("train", config, "train.epochs=4", f"out={tmp_path / 'whole'}")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "whole")]
    assert results[0]["best"] == results[1]["best"] and results[0]["steps"] == 8

    (tmp_path / "run/adapter/adapter_config.json").rename(tmp_path / "moved.json")
    assert refused(capsys, "evaluate", str(tmp_path / "run")).endswith("train it to its end first")
    (tmp_path / "moved.json").rename(tmp_path / "run/adapter/adapter_config.json")
    ran("train", config, "train.epochs=4")
    assert "finished already: nothing is left to train" in capsys.readouterr().out
    assert "train.epochs = 4, not 2" in refused(capsys, "train", config)


@pytest.mark.deep
def test_prolonging_may_be_killed(tmp_path: Path) -> None:
    """In front of any change of files: the same command ends with the same bytes."""
    tables = {"model": {"path": str(gpt2_folder(tmp_path / "base"))}, "lora": LORA}
    config = job("sft", tmp_path / "run", CHAT, train={"schedule": "constant", "warmup": 0}, **tables)
    ran("train", config)
    ran("train", config, "train.epochs=2", f"out={tmp_path / 'whole'}")
    shutil.copytree(tmp_path / "run", tmp_path / "short")

    def prolong() -> None:
        ran("train", config, "train.epochs=2")

    def check(n: int) -> None:
        prolong()
        assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes(), n
        assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 4
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "short", tmp_path / "run")

    assert killed_everywhere(prolong, check) > 20


def test_ppo_is_prolonged_by_more_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    config = ppo_job(tmp_path, path=str(gpt2_folder(tmp_path / "base")))
    ran("ppo", config, "ppo.schedule=constant", "ppo.episodes=4")
    ran("ppo", config, "ppo.schedule=constant")
    assert "going on at round 1 of 2" in capsys.readouterr().err
    ran("ppo", config, "ppo.schedule=constant", "out=whole")
    assert (tmp_path / "ppo" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    message = refused(capsys, "ppo", config, "ppo.schedule=constant", "ppo.episodes=4")
    assert "ppo.episodes = 8, not 4" in message

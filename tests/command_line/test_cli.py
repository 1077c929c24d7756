"""The command line from end to end on tiny models: what people type, and what they find afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from project import ROOT
from small_runs import (
    CHAT,
    PAIRS,
    QUESTIONS,
    SENTIMENT,
    TAGGED,
    TEXTS,
    write_config,
    write_rows,
)
from small_tokenizers import byte_level

from handtune.cli import main, parsed
from handtune.engine import load_adapter
from handtune.models import load

ROWS = {
    "pretrain": TEXTS, "sft": CHAT, "masked-lm": TEXTS, "classify": SENTIMENT, "tag": TAGGED, "qa": QUESTIONS,
    "embed": PAIRS,
}  # fmt: skip
METRICS = {
    "pretrain": "perplexity", "sft": "perplexity", "masked-lm": "perplexity", "classify": "accuracy", "tag": "f1",
    "qa": "f1", "embed": "accuracy@1",
}  # fmt: skip


def configuration(folder: Path, method: str, bases: dict[str, Path], **tables) -> Path:
    """Rows of the method in a file, the last quarter of them in another, three short epochs."""
    rows = ROWS[method]
    cut = max(2, len(rows) // 4)
    base = bases["gpt2" if method in ("pretrain", "sft") else "bert"]
    return write_config(
        folder / f"{method}.toml", method=method,
        **{
            "out": str(folder / "run"),
            "model": {"path": str(base)},
            "data": {
                "train": str(write_rows(folder / "train.jsonl", rows)),
                "eval": str(write_rows(folder / "eval.jsonl", rows[-cut:])),
            },
            "train": {"epochs": 3, "batch_size": 4, "lr": 3e-3},
            **tables,
        },
    )  # fmt: skip


def run(*arguments: object, code: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == code


def result_of(folder: Path) -> dict:
    return json.loads((folder / "run/result.json").read_text())


@pytest.mark.parametrize("method", ROWS)
def test_train_and_evaluate(method, bases, tmp_path, capsys) -> None:
    """Full fine-tuning of every method; evaluating the stored model gives the metrics of the run again."""
    run("train", configuration(tmp_path, method, bases))
    said = capsys.readouterr()
    assert all(f"{part}: " in said.out + said.err for part in ("train", "eval"))
    assert "trains " in said.out
    result = result_of(tmp_path)
    best = result["best"]
    chosen = f"(best {best['metric']} {best['value']:.4f}, of {result['steps']} steps)"
    assert f"stored: step {best['step']} {chosen}\nstored in {tmp_path / 'run/model'}" in said.out
    assert result["trainable"] == result["parameters"] > 0
    assert result["stored_bytes"] > 0
    assert METRICS[method] in result["metrics"]
    assert ("confusion" in result) == (method == "classify")
    assert json.loads((tmp_path / "run/run.json").read_text())["trains"] == "full"
    found = evaluated(capsys, tmp_path / "run")
    assert found.keys() - {"labels"} == result["metrics"].keys()
    assert found["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)


def evaluated(capsys, *arguments: object) -> dict:
    """What `evaluate` prints as JSON, which begins at the start of a line."""
    capsys.readouterr()
    run("evaluate", *arguments)
    said = "\n" + capsys.readouterr().out
    return json.loads(said[said.index("\n{") :])


@pytest.mark.parametrize("method", ["sft", "classify", "embed", "masked-lm"])
def test_lora_evaluate_and_merge(method, bases, tmp_path, capsys) -> None:
    """The adapter is a small folder; merged into its base it is the same model, for transformers too."""
    lora = {"rank": 4, "alpha": 8}
    run("train", configuration(tmp_path, method, bases, lora=lora))
    result = result_of(tmp_path)
    assert result["trainable"] < result["parameters"] / 3
    assert not (tmp_path / "run/model").exists()
    assert evaluated(capsys, tmp_path / "run")["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)
    (tmp_path / "train.jsonl").unlink()  # other rows need no training rows
    found = evaluated(capsys, tmp_path / "run", "--data", tmp_path / "eval.jsonl")
    assert found["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)
    base = bases["gpt2" if method == "sft" else "bert"]
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    run("merge", base, tmp_path / "run/adapter", tmp_path / "merged")
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    if method == "classify":
        return  # its head lies in the adapter, whose labels the base lacks
    merged, tokenizer = load(tmp_path / "merged")
    adapted, _ = load(base, merged.task)
    load_adapter(adapted, tmp_path / "run/adapter")
    ids = torch.tensor([tokenizer.encode("who sat on the mat?").ids])
    kinds = {"sft": "GPT2LMHeadModel", "embed": "BertModel", "masked-lm": "BertForMaskedLM"}
    theirs = getattr(transformers, kinds[method]).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = adapted(ids)
        torch.testing.assert_close(merged(ids), expected, rtol=1e-4, atol=1e-5)
        if method != "embed":
            torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head_layers", [1, 2])
def test_merge_of_a_classifier_keeps_its_labels(head_layers, bases, tmp_path, capsys) -> None:
    tables = {
        "lora": {"rank": 4},
        "model": {"path": str(bases["bert"]), "head_layers": head_layers},
        "train": {"epochs": 40, "lr": 3e-3, "best": "last"},
    }
    run("train", configuration(tmp_path, "classify", bases, **tables))
    run("merge", bases["bert"], tmp_path / "run/adapter", tmp_path / "merged")
    merged, tokenizer = load(tmp_path / "merged")
    assert merged.labels == ("down", "up")
    with torch.no_grad():
        right = [
            merged.labels[merged(torch.tensor([tokenizer.encode(row["text"]).ids])).argmax(-1).item()] == row["label"]
            for row in SENTIMENT
        ]
    assert sum(right) > 20  # of 24; random weights are right in 12
    alone = tmp_path / "adapter"
    (tmp_path / "run/adapter").rename(alone)
    run("merge", bases["bert"], alone, tmp_path / "nameless")  # without the run that knows the names
    nameless, _ = load(tmp_path / "nameless")
    assert nameless.labels == ("0", "1")
    assert torch.equal(nameless.head.out.weight, merged.head.out.weight)
    assert len(nameless.head.hidden) == head_layers - 1


def test_lora_on_four_bits_with_feed_forwards_recomputed(bases, tmp_path, capsys) -> None:
    model = {"path": str(bases["gpt2"]), "quantize": "nf4", "recompute": True}
    run("train", configuration(tmp_path, "sft", bases, model=model, lora={"rank": 4}, train={"epochs": 40, "lr": 0.01}))
    result = result_of(tmp_path)
    assert result["metrics"]["loss"] < 0.95 * result["before"]["loss"]
    assert evaluated(capsys, tmp_path / "run")["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)


def test_generate(bases, tmp_path, capsys) -> None:
    """A run that has learned its rows by heart continues their prompts; greedy, in batches, to the end or a stop."""
    train = {"epochs": 120, "batch_size": 4, "lr": 0.01, "best": "last"}
    run("train", configuration(tmp_path, "sft", bases, train=train))
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"text": row["prompt"]} for row in CHAT])
    capsys.readouterr()
    out, short = tmp_path / "completions.jsonl", ("--max-new-tokens", 32)
    run("generate", tmp_path / "run", "--prompts", prompts, "--temperature", 0, "--out", out, "--batch-size", 3, *short)
    assert capsys.readouterr().out.endswith(f"4 rows written to {out}\n")
    assert [json.loads(line) for line in out.read_text().splitlines()] == CHAT
    run("generate", tmp_path / "run", "--prompt", CHAT[1]["prompt"], "--temperature", 0, "--stop", " cat", *short)
    assert capsys.readouterr().out == CHAT[1]["prompt"] + "Answer: the\n"
    sampled = []
    for seed in (1, 1, 2):
        run("generate", bases["gpt2"], "--prompt", "the", "--seed", seed, "--max-new-tokens", 8)
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_with_the_adapter_of_a_run_or_a_given_one(bases, tmp_path, capsys) -> None:
    train = {"epochs": 60, "batch_size": 4, "lr": 0.03, "best": "last"}
    run("train", configuration(tmp_path, "sft", bases, lora={"rank": 8}, train=train))
    capsys.readouterr()
    ask = ("--prompt", CHAT[0]["prompt"], "--temperature", 0, "--max-new-tokens", 6)
    said = []
    for model in ((tmp_path / "run",), (bases["gpt2"], "--adapter", tmp_path / "run/adapter"), (bases["gpt2"],)):
        run("generate", *model, *ask)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_frozen_features_and_part(bases, tmp_path, capsys) -> None:
    def trains(name: str, **freeze) -> str:
        run("train", configuration(tmp_path, "classify", bases, out=str(tmp_path / name), freeze=freeze))
        return json.loads((tmp_path / name / "run.json").read_text())["trains"]

    assert trains("a", names=["*"], **{"except": ["head.*"]}) == "frozen features"
    assert trains("b", names=["embed.*", "layers.0.*"]) == "part"


def test_report(bases, tmp_path, capsys) -> None:
    runs = []
    for number in (1, 2):
        out = tmp_path / f"run-{number}"
        run(
            "train",
            configuration(tmp_path, "classify", bases),
            f"out={out}",
            f"name=try {number}",
            f"train.seed={number}",
        )
        runs.append(out)
    capsys.readouterr()
    run("report", *runs, "-o", tmp_path / "page.html")
    said = capsys.readouterr().out
    assert all(f"try {number}" in said for number in (1, 2))
    assert f"page written to {tmp_path / 'page.html'}" in said
    page = (tmp_path / "page.html").read_text()
    assert all(f"try {number}" in page for number in (1, 2))
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_evaluate_on_other_rows(bases, tmp_path, capsys) -> None:
    run("train", configuration(tmp_path, "classify", bases))
    own = evaluated(capsys, tmp_path / "run")
    assert sum(map(sum, own["confusion"])) == 6
    assert own["labels"] == json.loads((tmp_path / "run/run.json").read_text())["labels"]

    # A text with either label: one of the two is wrong, and is told by its line.
    rows = [{**SENTIMENT[0], "label": label} for label in own["labels"]]
    path = write_rows(tmp_path / "both.jsonl", rows)
    other = evaluated(capsys, tmp_path / "run", "--data", path)
    assert sum(map(sum, other["confusion"])) == 2
    (mistake,) = other["mistakes"]
    line = 1 + own["labels"].index(mistake["gold"])
    assert (mistake["row"], mistake["text"]) == (f"{path} line {line}", rows[0]["text"])
    assert mistake["predicted"] in own["labels"] and mistake["predicted"] != mistake["gold"]


def test_a_fresh_model_from_a_preset(tmp_path, capsys) -> None:
    """Pretraining from nothing on plain text with a tokenizer of one's own; the same command is done at once."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 60)
    path = tmp_path / "new.toml"
    path.write_text(
        f"""method = "pretrain"
out = "{tmp_path / "run"}"
[model]
preset = "gpt2"
tokenizer = "{tmp_path / "tokenizer.json"}"
overrides = {{ n_layer = 2, n_head = 2, d_model = 32, max_positions = 32 }}
[data]
train = "{tmp_path / "text.txt"}"
eval = 0.2
[train]
epochs = 20
batch_size = 4
lr = 1e-2
""",
        encoding="utf-8",
    )
    run("train", path)
    result = result_of(tmp_path)
    assert result["metrics"]["loss"] < 1.0 < 5.0 < result["before"]["loss"]
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    run("train", path)
    assert "stored in" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files
    run("generate", tmp_path / "run", "--prompt", "the cat", "--temperature", 0, "--max-new-tokens", 5)
    assert capsys.readouterr().out.startswith("the cat sat on the mat")


def test_a_preset_that_is_nearly_one(tmp_path, capsys) -> None:
    path = write_config(
        tmp_path / "new.toml", method="classify", out="run", model={"preset": "resnet-18"}, data={"train": "x"}
    )
    assert main(["train", str(path)]) == 2
    assert "preset 'resnet-18' is unknown; did you mean 'resnet18'? known: " in capsys.readouterr().err


def test_a_fresh_model_is_what_its_options_say(tmp_path, capsys) -> None:
    """The dtype, the depth of the head and the device of a preset."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    sizes = {"n_layer": 1, "n_head": 2, "d_model": 16, "max_positions": 32}
    path = write_config(
        tmp_path / "new.toml", method="classify", out=str(tmp_path / "run"),
        model={"preset": "minilm-l6", "tokenizer": str(tmp_path / "tokenizer.json"), "overrides": sizes,
               "dtype": "bfloat16", "head_layers": 3},
        data={"train": str(write_rows(tmp_path / "rows.jsonl", SENTIMENT))},
        train={"max_steps": 1, "batch_size": 4},
    )  # fmt: skip
    run("train", path)
    model, _ = load(tmp_path / "run" / "model")
    assert model.head_layers == 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert main(["train", str(path), f"out={tmp_path / 'other'}", "model.device=cud"]) == 2
    assert "device 'cud': expected" in capsys.readouterr().err
    assert main(["train", str(path), f"out={tmp_path / 'other'}", "model.dtype=int8"]) == 2
    assert "dtype 'int8': expected" in capsys.readouterr().err


def test_the_same_command_gives_the_same_weights(bases, tmp_path) -> None:
    """Also the start of a new head and a new adapter come from the seed."""
    ends = []
    for disturbance, (name, seed) in enumerate((("a", 3), ("b", 3), ("c", 4))):
        torch.manual_seed(disturbance)
        arguments = (f"out={tmp_path / name}", f"train.seed={seed}", "lora.rank=2")
        run("train", configuration(tmp_path, "classify", bases), *arguments)
        ends.append((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1] != ends[2]


def test_padding_instead_of_packing(bases, tmp_path) -> None:
    """The padded layout evaluates to the same loss before training, and trains."""
    ends = []
    for packing in ("true", "false"):
        run("train", configuration(tmp_path, "sft", bases), f"out={tmp_path / packing}", f"data.packing={packing}")
        ends.append(json.loads((tmp_path / packing / "result.json").read_text()))
    assert ends[0]["before"]["loss"] == pytest.approx(ends[1]["before"]["loss"], rel=1e-4)
    assert all(end["metrics"]["loss"] < end["before"]["loss"] for end in ends)


def process(*arguments: object, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "handtune", *map(str, arguments)]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120, **settings)


def test_as_a_process(bases, tmp_path) -> None:
    """From another folder, with paths relative to it."""
    configuration(tmp_path, "sft", bases)
    done = process("train", "sft.toml", "out=here", "train.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here/model/model.safetensors").is_file()
    assert all(note.startswith(("train: ", "eval: ", "dropout: ", "step ")) for note in done.stderr.splitlines())
    assert "2 steps in " in done.stdout
    done = process("generate", "here", "--max-new-tokens", 3, cwd=tmp_path, input="the cat\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")


def test_version_and_usage() -> None:
    assert process("--version").stdout.startswith("handtune ")
    wrong = process("trian", "x.toml")
    assert wrong.returncode == 2
    assert "invalid choice: 'trian'" in wrong.stderr


def test_changes_may_stand_behind_options(capsys) -> None:
    assert parsed(["train", "run.toml", "a=1", "--debug", "b.c=2"]).override == ["a=1", "b.c=2"]
    for wrong in ("train run.toml a=1 --quiet b=2", "merge base adapter out a=1"):
        with pytest.raises(SystemExit):
            parsed(wrong.split())
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["label base rows.jsonl --labels a --out x", "compare base --out x", "generate base"])
def test_an_option_of_several_commands_has_its_bounds_in_all(line) -> None:
    with pytest.raises(ValueError, match="--batch-size 0: expected a positive number"):
        parsed([*line.split(), "--batch-size", "0"])


def test_debug_shows_the_traceback(tmp_path) -> None:
    done = process("--debug", "train", tmp_path / "none.toml")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "no such configuration file" in done.stderr

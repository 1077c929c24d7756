"""What people get wrong: each mistake is one line that names place and remedy, exit code 2, and nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT
from small_runs import CHAT, SENTIMENT, TAGGED, TEXTS, gpt2_folder, write_config, write_rows
from small_tokenizers import byte_level

from handtune.cli import main


@pytest.fixture
def job(bases, tmp_path):
    """The configuration of an sft run that would go well."""
    return write_config(
        tmp_path / "run.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(bases["gpt2"])},
        data={"train": str(write_rows(tmp_path / "rows.jsonl", CHAT)), "max_length": 64},
        train={"epochs": 1, "batch_size": 2},
    )  # fmt: skip


@pytest.fixture
def complaint(capsys):
    """Runs a command that must fail; gives its one line, which comes after what is said about the data."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        *notes, said = capsys.readouterr().err.splitlines()
        starts = ("train: ", "eval: ", "held out: ", "dropout: ", "step ")
        assert all(note.startswith(starts) for note in notes), notes
        assert said.startswith("handtune: ")
        return said.removeprefix("handtune: ")

    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed_config(folder: Path, target: Path, **fields) -> Path:
    """A copy of a checkpoint whose config.json says something else."""
    target.mkdir()
    for path in folder.iterdir():
        os.link(path, target / path.name)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


def without(folder: Path, target: Path, name: str) -> Path:
    changed_config(folder, target)
    (target / name).unlink()
    return target


def test_the_job_itself_goes_well(job, tmp_path) -> None:
    assert main(["train", str(job)]) == 0
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_models_that_are_none(job, bases, complaint, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    line = complaint("train", job, f"model.path={empty}")
    assert line == f"{empty}: no config.json there; a checkpoint folder in Hugging Face layout has one"
    line = complaint("train", job, f"model.path={tmp_path / 'nowhere'}")
    assert line == f"{tmp_path / 'nowhere'}: no such folder"
    mamba = changed_config(bases["gpt2"], tmp_path / "mamba", model_type="mamba")
    line = complaint("train", job, f"model.path={mamba}")
    assert f"{mamba}/config.json: model_type 'mamba' is not an architecture of handtune (" in line
    headless = without(bases["gpt2"], tmp_path / "headless", "tokenizer.json")
    line = complaint("train", job, f"model.path={headless}")
    assert line.startswith(f"{headless}: no tokenizer.json, and text needs one; write it once with transformers: Auto")
    weightless = without(bases["gpt2"], tmp_path / "weightless", "model.safetensors")
    assert str(weightless) in complaint("train", job, f"model.path={weightless}")
    broken = changed_config(bases["gpt2"], tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert f"{broken}/config.json" in complaint("train", job, f"model.path={broken}")
    wider = changed_config(bases["gpt2"], tmp_path / "wider", n_embd=64)
    line = complaint("train", job, f"model.path={wider}")
    assert line.startswith(f"{wider}: the weights don't fit config.json; ")
    assert "of another shape" in line
    line = complaint("train", job, "model.dtype=int4")
    assert "dtype 'int4': expected" in line
    assert "model: quantize = 'int8': expected one of nf4" in complaint("train", job, "model.quantize=int8")
    assert "add a [lora] table" in complaint("train", job, "model.quantize=nf4")
    assert "torch finds no CUDA here" in complaint("train", job, "model.device=cuda:7") or "cuda" in os.environ


def test_a_tokenizer_that_is_not_the_model_s(job, complaint, tmp_path) -> None:
    small = gpt2_folder(tmp_path / "small", vocab_size=50)
    line = complaint("train", job, f"model.path={small}")
    last = byte_level().get_vocab_size() - 1
    assert line == (
        f"{small}: the tokenizer counts to {last}, the model has 50 tokens; give the model the tokenizer.json that "
        "belongs to it"
    )


def test_files_of_rows(job, complaint, tmp_path) -> None:
    path = tmp_path / "bad.jsonl"

    def complained(data: bytes) -> str:
        path.write_bytes(data)
        return complaint("train", job, f"data.train={path}")

    good = json.dumps(CHAT[0]).encode() + b"\n"
    assert complained(b"") == f"{path}: the file is empty; give a file with at least one row"
    assert complained(b" \n\n") == f"{path}: the file is empty; give a file with at least one row"
    line = complained(good + good.replace(b"France", b"Fran\xe7e"))
    assert line == f"{path} line 2: byte {len(good) + good.index(b'ce?') + 0} is not UTF-8; save the file as UTF-8"
    line = complained(good + good + b'{"prompt": "a", "completion": }\n')
    assert line.startswith(f"{path} line 3: not JSON (Expecting value, column 31); correct the line")
    line = complained(good + b'{"prompt": "a", "answer": "b"}\n')
    assert line.startswith(f"{path} line 2: the fields prompt, answer make no known shape; rename them to one of: ")
    line = complained(good + b'{"prompt": "a", "completion": 3}\n')
    assert line == f"{path} line 2: field 'completion' must be text, not a number"
    line = complained(good + b'{"text": "a", "label": "b"}\n')
    assert line.startswith(f"{path} line 2: a text/label row, but line 1 is prompt/completion; ")
    line = complaint("train", job, f"data.train={tmp_path / 'none.jsonl'}")
    assert line == f"{tmp_path / 'none.jsonl'}: no such file of rows; check the path"
    assert "unknown kind of file '.xlsx'; use one of .jsonl" in complaint("train", job, "data.train=rows.xlsx")
    write_rows(path, SENTIMENT)
    line = complaint("train", job, f"data.train={path}")
    assert line.startswith(
        f"data.train: {path} line 1: a text/label row, but sft needs prompt/completion or messages or text; "
    )
    assert "hold rows of different shapes" in complaint("train", job, f"data.train=['{path}', '{tmp_path}/rows.jsonl']")
    for share in ("1.5", "0"):
        assert f"must lie between 0 and 1, not {float(share)}" in complaint("train", job, f"data.eval={share}")
    assert "are too few to hold out" in complaint(
        "train", job, f"data.train={write_rows(path, CHAT[:1])}", "data.eval=0.5"
    )


def test_an_evaluation_label_that_training_lacks(bases, complaint, tmp_path) -> None:
    rows = [*SENTIMENT[:2], {"text": "the cat", "label": "sideways"}]
    path = write_config(
        tmp_path / "run.toml", method="classify", out=str(tmp_path / "run"), model={"path": str(bases["bert"])},
        data={
            "train": str(write_rows(tmp_path / "train.jsonl", SENTIMENT)),
            "eval": str(write_rows(tmp_path / "eval.jsonl", rows)),
        },
    )  # fmt: skip
    line = complaint("train", path)
    assert line.startswith(
        f"data.eval: {tmp_path / 'eval.jsonl'} line 3: label 'sideways' is not among the known labels (down, up); "
    )
    unknown = [*TAGGED, {"tokens": ["the"], "tags": ["B-THING"]}]
    changes = ("method=tag", f"data.train={write_rows(tmp_path / 'a.jsonl', TAGGED)}", f"out={tmp_path / 'tags'}")
    line = complaint("train", path, *changes, f"data.eval={write_rows(tmp_path / 'b.jsonl', unknown)}")
    assert line.startswith(
        f"data.eval: {tmp_path / 'b.jsonl'} line 7: tag of token 1 'B-THING' is not among the known labels (O, B-ANIMAL"
    )


def test_a_row_is_named_where_it_was_read(job, complaint, tmp_path) -> None:
    """Also behind another file, behind a blank line, and on whichever side of the held-out share it comes."""
    wrong = {**CHAT[0], "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]}
    (tmp_path / "second.jsonl").write_text(f"{json.dumps(CHAT[1])}\n\n{json.dumps(wrong)}\n")
    files = [str(write_rows(tmp_path / "first.jsonl", CHAT)), str(tmp_path / "second.jsonl")]
    for seed in range(3):
        line = complaint("train", job, f"data.train={files}", "data.eval=0.4", f"train.seed={seed}")
        assert f": {files[1]} line 3: only a chat template uses tools" in line

    silent = {"messages": [{"role": "user", "content": "hello"}]}
    files = [str(write_rows(tmp_path / f"{name}.jsonl", [silent] * 2)) for name in "ab"]
    line = complaint("train", job, f"data.train={files}")
    assert f"fully masked 4 ({files[0]} line 1, line 2, {files[1]} line 1, line 2)" in line


def test_lengths_and_masks(job, complaint, tmp_path) -> None:
    line = complaint("train", job, "data.max_length=1000")
    assert line == "data.max_length = 1000 exceeds the model's 64 positions; choose at most 64"
    silent = write_rows(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}] * 3)
    line = complaint("train", job, f"data.train={silent}")
    assert line.startswith("data.train: no target left to train on: 3 rows read, 0 kept")
    assert f"fully masked 3 ({silent} line 1, line 2, line 3)" in line
    assert "max_length must be at least 1" in complaint("train", job, "data.max_length=0")


def test_a_corpus_without_text(job, bases, complaint, tmp_path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert f"{tmp_path / 'empty.txt'}" in complaint(
        "train", job, "method=pretrain", f"data.train={tmp_path / 'empty.txt'}"
    )
    texts = write_rows(tmp_path / "texts.jsonl", TEXTS)
    for share in ("1.5", "0"):
        line = complaint("train", job, "method=pretrain", f"data.train={texts}", f"data.eval={share}")
        assert f"must lie between 0 and 1, not {float(share)}" in line
    line = complaint("train", job, "method=pretrain", f"data.train={texts}", "data.eval=0.01")
    assert line == "data.eval: no target left to train on: fewer than two tokens"


def test_adapters_and_freezing_that_match_nothing(job, complaint) -> None:
    line = complaint("train", job, 'lora.targets=["k_prj"]')
    assert line.startswith("LoRA target 'k_prj' matches no layer; there are ")
    line = complaint("train", job, 'freeze.names=["layer.*"]')
    assert line.startswith("'layer.*' matches no parameter; names start with embed, ")
    line = complaint("train", job, 'freeze.names=["*"]')
    assert line.startswith("nothing trains: ")
    assert "matches no parameter" in complaint("train", job, 'train.unfreeze={ "heads.*" = 1 }')


def test_methods_that_do_not_fit(job, complaint) -> None:
    assert "masked-lm" in complaint("train", job, "method=masked-lm")
    line = complaint("train", job, "model.task=embedding")
    assert line == "model.task = 'embedding', but method 'sft' trains 'causal-lm'"
    assert "unknown key 'bath_size'; did you mean 'batch_size'?" in complaint("train", job, "train.bath_size=3")
    assert "best = 'f1' is not a metric" in complaint("train", job, "train.best=f1", "data.eval=0.5")


def test_no_text_ends_an_answer_at_once(job, complaint) -> None:
    said = complaint("generate", "tests/kjv-gpt", "--prompt", "And", "--stop", "", "--max-new-tokens", 2)
    assert said == "stop is an empty text, which every text begins with; give another, or none"


def test_a_mistake_can_be_corrected_in_place(job, complaint, tmp_path) -> None:
    """What failed before its first step does not stand in the way of the corrected run."""
    complaint("train", job, "data.max_length=1000")
    complaint("train", job, 'lora.targets=["k_prj"]')
    complaint("train", job, "train.best=f1", "data.eval=0.5", "method=pretrain")  # after the first evaluation
    assert main(["train", str(job)]) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["lora"] is None


def test_folders_that_hold_something_else(job, complaint, tmp_path) -> None:
    assert main(["train", str(job)]) == 0
    before = contents(tmp_path / "run")
    line = complaint("train", job, "train.lr=1e-3", "lora.rank=4")
    assert line.startswith(f"{tmp_path / 'run'} holds a run with lora = None, not {{")
    assert "train.lr = 0.0002, not 0.001" in line
    assert line.endswith("; take back the change or choose another out")
    assert contents(tmp_path / "run") == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("mine")
    line = complaint("train", job, f"out={tmp_path / 'thesis'}")
    assert line == f"{tmp_path / 'thesis'} is not empty and holds no run; choose another out"
    assert contents(tmp_path / "thesis") == {tmp_path / "thesis/thesis.tex": b"mine"}
    assert str(job) in complaint("train", job, f"out={job}")


def test_data_that_changed_under_a_run(job, complaint, tmp_path) -> None:
    """The file is named, whether the run has finished or goes on."""
    assert main(["train", str(job)]) == 0
    rows, before = tmp_path / "rows.jsonl", contents(tmp_path / "run")
    write_rows(rows, CHAT[:3])
    begins = f"{tmp_path / 'run'} holds a run with other contents of data.train ({rows}"
    assert complaint("train", job).startswith(f"{begins} has changed); take back the change")
    assert contents(tmp_path / "run") == before
    (tmp_path / "run/result.json").unlink()
    assert complaint("train", job).startswith(f"{begins} has changed)")
    rows.unlink()
    assert complaint("train", job).startswith(f"{begins} is gone)")


def test_a_damaged_checkpoint(job, complaint, tmp_path) -> None:
    """It is named; removed, the one before it is used."""
    assert main(["train", str(job), "train.keep_last=2", "train.save_every=1"]) == 0
    (tmp_path / "run/result.json").unlink()  # the run was killed before it had stored what came out
    last = tmp_path / "run/checkpoints/step-00000002"
    (last / "tensors.safetensors").write_bytes(b"nothing")
    line = complaint("train", job, "train.keep_last=2", "train.save_every=1")
    assert line.startswith(f"{last}: the checkpoint is damaged")
    assert line.endswith("remove it, and the run goes on from step-00000001")
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert main(["train", str(job), "train.keep_last=2", "train.save_every=1"]) == 0


def test_the_other_commands(job, bases, complaint, tmp_path) -> None:
    nowhere = tmp_path / "nowhere"
    assert complaint("evaluate", nowhere) == f"{nowhere}: no run.json there; give the folder of a run"
    assert main(["train", str(job)]) == 0
    run = tmp_path / "run"
    assert complaint("evaluate", run) == f"{run}: the run held no rows out; give a file with --data"
    line = complaint("generate", bases["bert"], "--prompt", "x")
    assert "causal-lm" in line
    line = complaint("generate", bases["gpt2"], "--prompt", "x", "--adapter", nowhere)
    assert str(nowhere) in line
    assert "exceed the model's 64 positions" in complaint(
        "generate", bases["gpt2"], "--prompt", "x", "--max-new-tokens", 99
    )
    assert str(nowhere) in complaint("merge", bases["gpt2"], nowhere, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert str(nowhere) in complaint("report", nowhere)
    for file in (run / "model").iterdir():
        file.unlink()
    (run / "model").rmdir()
    other = write_rows(tmp_path / "other.jsonl", CHAT)
    assert "the run has not finished" in complaint("evaluate", run, "--data", other)


def test_a_loss_that_is_not_finite(job, complaint, tmp_path) -> None:
    """A weight of the base is as large as can be, or beyond; or the learning rate is one of another world."""
    from safetensors.torch import load_file, save_file

    base = gpt2_folder(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = 3e38
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    line = complaint("train", job, f"model.path={base}")
    assert line.startswith("step 1: the loss is ")
    assert "there is no checkpoint yet; try a smaller train.lr" in line
    line = complaint(
        "train",
        job,
        "train.lr=1e6",
        "train.max_grad_norm=1e9",
        "train.epochs=50",
        "train.warmup=0",
        f"out={tmp_path}/wild",
    )
    assert line.startswith("step ")
    assert line.endswith("; try a smaller train.lr")

    tensors["transformer.ln_f.weight"][0] = float("inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = f"{base}/model.safetensors: transformer.ln_f.weight holds NaN or infinity"
    assert said in complaint("train", job, f"model.path={base}")
    assert said in complaint("generate", base, "--prompt", "the cat")


def test_names_that_lead_nowhere(job, bases, complaint, tmp_path) -> None:
    (tmp_path / "circle.jsonl").symlink_to("circle.jsonl")
    labelled = ("--labels", "a", "b", "--out")
    assert "circle.jsonl" in complaint("label", bases["gpt2"], tmp_path / "circle.jsonl", *labelled, tmp_path / "out")
    assert "circle.jsonl" in complaint(
        "generate", bases["gpt2"], "--adapter", tmp_path / "circle.jsonl", "--prompt", "a"
    )
    for device in ("xpu", "meta", "mps"):
        assert f"device '{device}': expected" in complaint("train", job, f"model.device={device}")
    assert r"the argument 'the \udcff cat' is not UTF-8" in complaint(
        "generate", bases["gpt2"], "--prompt", "the \udcff cat"
    )


@pytest.mark.parametrize("change", ["data.train=none.jsonl", "train.lerning_rate=1"])
def test_as_a_process(job, change) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "handtune", "train", str(job), change]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("handtune: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_what_needs_rows_held_out_is_named_as_in_the_file(job, complaint) -> None:
    line = complaint("train", job, "train.early_stopping_patience=1", "train.eval_every=2", "train.best=loss")
    assert line.startswith("train.eval_every, train.early_stopping_patience, train.best: no rows are held out")
    assert "data.eval" in line
    assert main(["train", str(job), "train.best=last"]) == 0


def test_merging_a_damaged_adapter(bases, complaint, tmp_path) -> None:
    for name, damaged in (("adapter_config.json", b"{"), ("adapter_model.safetensors", b"nothing")):
        adapter = tmp_path / name.partition(".")[0]
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "task_type": "SEQ_CLS"}')
        (adapter / "adapter_model.safetensors").write_bytes(b"")
        (adapter / name).write_bytes(damaged)
        assert str(adapter / name) in complaint("merge", bases["bert"], adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

"""Training the rows of chosen tokens alone: the rest of the model stays what it was, bit for bit."""

import json
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_growing import NEW, SIZE, model_of, words
from small_models import padded, token_rows
from small_runs import gpt2_folder, write_config, write_rows

from handtune.cli import main
from handtune.engine import (
    LoRAConfig,
    TrainConfig,
    add_lora,
    freeze,
    load_adapter,
    merge_lora,
    save_adapter,
    train,
    train_rows,
    trainable_report,
    unfreeze,
)
from handtune.engine.data.batches import Batches, Collate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.training.guards import infinite_epochs
from handtune.models import add_tokens, load, save


def batches(rows: list[list[int]]) -> Batches:
    examples = [{"input_ids": row[:-1], "targets": row[1:]} for row in rows]
    return Batches(examples, Collate("packed", 0), rows=2, seed=3)


def rows_with(ids: list[int]) -> list[list[int]]:
    """Rows in which the new tokens stand between others."""
    return [[*row, ids[i % 2], 5, ids[1], 9] for i, row in enumerate(token_rows((6, 3, 8, 5), vocab=SIZE))]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["rows alone", "with LoRA"])
def test_only_the_chosen_rows_change(tmp_path, tied, dtype, recipe):
    model = model_of(tmp_path, dtype=dtype, tie_word_embeddings=tied)
    ids = add_tokens(model, words(), NEW)
    if recipe == "with LoRA":
        add_lora(model, LoRAConfig(2, 2))
    else:
        freeze(model, "*")
    train_rows(model, [*ids, 4])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = train(model, batches(rows_with(ids)), causal_lm_loss, TrainConfig(lr=0.02, epochs=8, weight_decay=0.1))
    assert result.steps == 16
    chosen = torch.zeros(SIZE + 2, dtype=torch.bool)
    chosen[[*ids, 4]] = True
    for name, parameter in model.named_parameters():
        changed = parameter != before[name]
        if name in ("embed.tokens.weight", "head.weight"):
            assert bool(changed[chosen].any(1).all()), name
            assert not changed[~chosen].any(), name
        else:
            assert bool(changed.any()) == (".lora." in name), name
    assert (model.head.weight is model.embed.tokens.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_the_steps_are_those_of_the_whole_matrix(tmp_path, tied):
    """torch's AdamW on the whole matrices, the other rows put back after each step, gives the same rows."""
    model = model_of(tmp_path, tie_word_embeddings=tied)
    ids = add_tokens(model, words(), NEW)
    reference = load_copy(model, tmp_path / "copy")
    freeze(model, "*")
    train_rows(model, ids)
    data, settings = batches(rows_with(ids)), {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    train(
        model,
        data,
        causal_lm_loss,
        TrainConfig(lr=0.01, epochs=4, warmup=0, schedule="constant", max_grad_norm=None, **settings),
    )
    whole = [reference.embed.tokens.weight] if tied else [reference.embed.tokens.weight, reference.head.weight]
    optimizer = torch.optim.AdamW(whole, lr=0.01, **settings)
    old = [weight.detach().clone() for weight in whole]
    for micros in islice(infinite_epochs(batches(rows_with(ids))), 8):
        loss, count = causal_lm_loss(reference, micros[0])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, before in zip(whole, old, strict=True):
                weight[:SIZE] = before[:SIZE]
    torch.testing.assert_close(model.embed.tokens.weight, reference.embed.tokens.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.head.weight, reference.head.weight, atol=1e-6, rtol=0)


def load_copy(model: Any, folder: Path) -> Any:
    save(model, None, folder)
    return load(folder, device="cpu")[0]


def test_the_report_counts_rows(tmp_path):
    model = model_of(tmp_path)
    ids = add_tokens(model, words(), NEW)
    freeze(model, "*")
    train_rows(model, ids)
    report = trainable_report(model)
    assert report.modules == (("embed", 48),) and report.trainable == 48
    assert (report.gradients, report.optimizer) == ((SIZE + 2) * 24 * 4, 48 * 12)
    unfreeze(model, "embed.tokens.weight")
    assert trainable_report(model).trainable == 48
    freeze(model, "embed.*")
    assert trainable_report(model).trainable == 0


def test_a_run_stopped_and_resumed_is_the_same_run(tmp_path):
    ends = []
    for name, stops in (("whole", [8]), ("parts", [3, 8])):
        for stop in stops:
            model = model_of(tmp_path / "base", dtype="bfloat16")
            ids = add_tokens(model, words(), NEW)
            torch.manual_seed(0)
            add_lora(model, LoRAConfig(2, 2))
            train_rows(model, ids)
            settings = TrainConfig(lr=0.01, epochs=4, max_steps=8, save_every=1)
            data = Stopping(batches(rows_with(ids)), stop)
            with suppress(KeyboardInterrupt):
                train(model, data, causal_lm_loss, settings, run_dir=tmp_path / name)
        ends.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class Stopping:
    """The same batches, and an interrupt before step `stop`."""

    def __init__(self, data: Batches, stop: int):
        self.data, self.left = data, stop

    def __iter__(self) -> Any:
        for step in self.data:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield step

    def __len__(self) -> int:
        return 2

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left -= 3
        self.data.load_state_dict(state)


def trained_with_adapter(folder: Path, kind: str, tied: bool) -> tuple[Any, list[int]]:
    """A model on the base `folder`/grown, whose adapter and new rows were trained; they lie in `folder`/adapter."""
    model, tokenizer = model_of(folder / "base", kind, tie_word_embeddings=tied), words()
    ids = add_tokens(model, tokenizer, NEW)
    save(model, tokenizer, folder / "grown")
    add_lora(model, LoRAConfig(2, 2))
    train_rows(model, ids)
    train(model, batches(rows_with(ids)), causal_lm_loss, TrainConfig(lr=0.02, epochs=4))
    save_adapter(model, folder / "adapter")
    return model, ids


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_go_with_the_adapter(tmp_path, kind, tied):
    """Stored as rows, and read by us (who may train on) and by PEFT; merged, the whole is a checkpoint."""
    model, ids = trained_with_adapter(tmp_path, kind, tied)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.numel() < SIZE * 4 for tensor in stored.values())
    again, tokenizer = load(tmp_path / "grown", device="cpu")
    load_adapter(again, tmp_path / "adapter")
    inputs = padded(rows_with(ids))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs), model(**inputs))
        mask = inputs["attention_mask"].bool()
        torch.testing.assert_close(theirs(**inputs).logits[mask], model(**inputs)[mask], atol=1e-4, rtol=0)
    assert trainable_report(again).trainable == trainable_report(model).trainable
    with torch.no_grad():
        merge_lora(again, keep_base=False)
        save(again, tokenizer, tmp_path / "merged")
        merged, _ = load(tmp_path / "merged", device="cpu")
        torch.testing.assert_close(merged(**inputs), model(**inputs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("as_list", [True, False])
def test_rows_that_peft_trained(tmp_path, tied, as_list):
    model_of(tmp_path / "base", "llama", tie_word_embeddings=tied)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    both = {"embed_tokens": [9, 4], "lm_head": [9, 4]}
    chosen: Any = [9, 4] if as_list else {"embed_tokens": [9]} if tied else both
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=chosen, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(reference, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens" in name or "lora_B" in name:
                parameter.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "base", device="cpu")[0]
    load_adapter(model, tmp_path / "theirs")
    inputs = padded([[9, 5, 4, 7], [4, 9]])
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits[mask], model(**inputs)[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"transformer.wte": [7]}, r"tokens_delta \(2, 24\) with trainable_token_indices \[7\] does not fit a matrix"),
        ({"transformer.wte": [1, SIZE + 2]}, "does not fit a matrix of"),
        ({"other": [1, 2]}, "trainable_token_indices None does not fit"),
        (None, "trainable_token_indices None does not fit"),
    ],
)
def test_stored_rows_that_do_not_fit(tmp_path, table, message):
    trained_with_adapter(tmp_path, "gpt2", True)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": table}))
    with pytest.raises(ValueError, match=message):
        load_adapter(load(tmp_path / "grown", device="cpu")[0], tmp_path / "adapter")


def test_rows_that_cannot_train(tmp_path):
    model = model_of(tmp_path)
    for ids, message in (
        ([], r"ids \[\]: expected"),
        ([3, -1, SIZE], rf"ids \[-1, {SIZE}\]: expected token ids from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_rows(model, ids)
    with pytest.raises(ValueError, match="Sequential is not a model of handtune"):
        train_rows(torch.nn.Sequential(), [1])
    untied = model_of(tmp_path, tie_word_embeddings=False)
    add_lora(untied, LoRAConfig(2, 2, targets=["embed.tokens"]))
    with pytest.raises(ValueError, match="embed.tokens carries an adapter"):
        train_rows(untied, [1])


def test_token_rows_from_the_command_line(tmp_path, capsys):
    """Added tokens beside an adapter: the run stores both, and evaluates to what it ended with."""
    model, tokenizer = load(gpt2_folder(tmp_path / "base"), device="cpu")
    ids = add_tokens(model, tokenizer, NEW)
    save(model, tokenizer, tmp_path / "grown")
    chats = [{"prompt": f"question {i}: ", "completion": f"{NEW[0]} x {i} {NEW[1]}"} for i in range(8)]
    config = write_config(
        tmp_path / "run.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(tmp_path / "grown")},
        data={"train": str(write_rows(tmp_path / "rows.jsonl", chats)), "eval": str(tmp_path / "rows.jsonl")},
        lora={"rank": 2}, freeze={"token_rows": NEW}, train={"epochs": 4, "batch_size": 4, "lr": 0.02},
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["loss"] < 0.9 * result["before"]["loss"]
    assert result["stored_bytes"] < 40_000
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    rows = stored["base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"]
    assert bool((rows != model.embed.tokens.weight[ids]).any(1).all())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-4)
    assert main(["train", str(config), "freeze.token_rows=['nothing']", f"out={tmp_path / 'other'}"]) == 2
    assert "freeze.token_rows: there is no token 'nothing'; model.add_tokens adds it" in capsys.readouterr().err

"""Models that are not ours: the embedder's path, in a few lines each."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
import transformers
from small_runs import CHAT, TEXTS, assert_same_weights, examples, logged, weights
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from handtune.engine import (
    LoRAConfig,
    TrainConfig,
    add_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    train,
    use_adapter,
)


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    config = transformers.LlamaConfig(
        vocab_size=400, num_key_value_heads=2, max_position_embeddings=64, **sizes, **ends
    )
    return transformers.LlamaForCausalLM(config)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right; -100 where there is no target."""
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row["input_ids"])) for row in rows], batch_first=True)
    targets = pad_sequence([torch.tensor(row["targets"]) for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": mask, "targets": targets}


def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100, reduction="sum")
    return loss, (batch["targets"] >= 0).sum()  # a tensor will do for the count


def pretrained() -> transformers.LlamaForCausalLM:
    model = llama()
    train(model, examples(TEXTS, "pretrain"), loss_fn, TrainConfig(epochs=80, batch_size=4, lr=1e-2), collate=collate)
    return model


CHANGED = [{**row, "completion": CHAT[i - 1]["completion"]} for i, row in enumerate(CHAT)]


def test_a_transformers_llama_learns_by_lora(tmp_path) -> None:
    model, rows = pretrained(), examples(CHANGED, "sft")
    before = weights(model)
    adapted = add_lora(model, LoRAConfig(rank=8, alpha=16, targets=["q_proj", "v_proj", "*_proj"]))
    assert len(adapted) == 2 * 7
    config = TrainConfig(epochs=60, batch_size=4, micro_batch_size=2, lr=1e-2, best="last")
    out = tmp_path / "run"
    result = train(model, rows, loss_fn, config, eval_data=rows, collate=collate, run_dir=out)
    assert result.metrics["loss"] < 0.1 < 0.6 < result.before["loss"]
    assert [e["tokens"] for e in logged(out) if "loss" in e] == [sum(len(row["input_ids"]) for row in rows)] * 60
    after = {name: p for name, p in weights(model).items() if ".lora." not in name}
    assert_same_weights(after, before)

    batch = collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        tuned = model(**inputs).logits
        with use_adapter(model, None):
            plain = model(**inputs).logits
        fresh = llama()
        fresh.load_state_dict(before)
        assert torch.equal(fresh.eval()(**inputs).logits, plain)
        load_adapter(fresh, tmp_path / "adapter")
        torch.testing.assert_close(fresh(**inputs).logits, tuned)
        merge_lora(model)
        torch.testing.assert_close(model(**inputs).logits, tuned, rtol=1e-3, atol=1e-3)
    assert (tuned - plain).abs().max() > 0.1


def test_a_killed_foreign_run_resumes(tmp_path) -> None:
    """The same call on the same folder, after an error in the middle, ends where the undisturbed one ends."""
    rows, ends = examples(CHAT, "sft"), []
    for broken in (False, True):
        model, calls = llama(), []
        add_lora(model, LoRAConfig(rank=4, dropout=0.2, targets=["q_proj", "down_proj"]))

        def loss(model, batch, calls=calls, broken=broken):
            calls.append(1)
            if broken and len(calls) == 9:
                raise RuntimeError("the power is gone")
            return loss_fn(model, batch)

        config = TrainConfig(epochs=6, batch_size=2, lr=1e-2, save_every=3)
        settings = {"collate": collate, "run_dir": tmp_path / str(broken)}
        if broken:
            with pytest.raises(RuntimeError, match="power"):
                train(model, rows, loss, config, **settings)
            torch.manual_seed(99)
            model = llama()
            add_lora(model, LoRAConfig(rank=4, dropout=0.2, targets=["q_proj", "down_proj"]))
        train(model, rows, loss, config, **settings)
        ends.append(weights(model))
    assert_same_weights(ends[1], ends[0])
    assert logged(tmp_path / "True") == logged(tmp_path / "False")


def test_a_transformers_vit_learns_full_and_by_lora() -> None:
    """Images as tuples of tensors; a label is the brighter half."""
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=8, num_labels=2, **sizes)
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 16, 16, generator=generator)
    labels = torch.arange(24) % 2
    images[labels == 0, :, :8] += 1.0
    images[labels == 1, :, 8:] += 1.0
    rows = list(zip(images, labels, strict=True))

    def stack(rows):
        return torch.stack([image for image, _ in rows]), torch.stack([label for _, label in rows])

    def loss(model, batch):
        return F.cross_entropy(model(pixel_values=batch[0]).logits, batch[1], reduction="sum"), len(batch[1])

    config = TrainConfig(epochs=60, batch_size=8, lr=3e-3, best="last")
    result = train(model, rows, loss, config, eval_data=rows, collate=stack)
    assert result.metrics["loss"] < 0.1 < 0.5 < result.before["loss"]
    before = weights(model)
    swapped = [(image, 1 - label) for image, label in rows]
    adapted = add_lora(model, LoRAConfig(rank=4))
    assert len(adapted) == 2 * 6
    assert not any("classifier" in path for path in adapted)
    result = train(
        model, swapped, loss, TrainConfig(epochs=20, batch_size=8, lr=1e-2), eval_data=swapped, collate=stack
    )
    assert result.metrics["loss"] < 0.3 < 1.0 < result.before["loss"]
    assert_same_weights({name: p for name, p in weights(model).items() if ".lora." not in name}, before)


def test_a_plain_module_trains() -> None:
    """Nothing is asked of a module but parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.rand(64, 2) * 2 - 1
    rows = list(zip(x, x.prod(1), strict=True))

    def loss(model, batch):
        return (model(batch["x"])[:, 0] - batch["y"]).square().sum(), len(batch["y"])

    def stack(rows):
        return {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows])}

    config = TrainConfig(epochs=60, batch_size=16, lr=2e-2)
    result = train(model, rows, loss, config, eval_data=rows, collate=stack)
    assert result.metrics["loss"] < 0.005 < 0.05 < result.before["loss"]

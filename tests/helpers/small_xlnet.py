"""Tiny XLNets of transformers and ours, and what two-stream attention is given."""

from pathlib import Path
from typing import Any

import torch
import transformers
from small_models import CLASSES, PAD, theirs
from torch import Tensor
from transformers import PreTrainedModel, XLNetConfig

from handtune.models import XLNet, load

XLNET_CLASSES = {
    "causal-lm": transformers.XLNetLMHeadModel,
    "sequence-classification": transformers.XLNetForSequenceClassification,
    "token-classification": transformers.XLNetForTokenClassification,
    "question-answering": transformers.XLNetForQuestionAnsweringSimple,
    "embedding": transformers.XLNetModel,
    "reward": transformers.XLNetForSequenceClassification,
}
CLASSES.update({("xlnet", task): its_class for task, its_class in XLNET_CLASSES.items()})
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one way": {"attn_type": "uni"},
    "one way, same length": {"attn_type": "uni", "same_length": True, "mem_len": 3},
    "clamped": {"clamp_len": 3},
    "clamped further than any row": {"clamp_len": 100},
    "both directions": {"bi_data": True},
    "both directions, clamped, one way": {"bi_data": True, "clamp_len": 2, "attn_type": "uni"},
    "same length without effect": {"same_length": True},
    "untied": {"tie_word_embeddings": False},
    "one head": {"n_head": 1, "d_model": 20},
    "five heads of six, feed-forward of 17": {"n_head": 5, "d_model": 30, "d_inner": 17},
    "relu": {"ff_activation": "relu"},
    "gelu_new, large eps": {"ff_activation": "gelu_new", "layer_norm_eps": 0.3},
}


def tiny_xlnet(**overrides: Any) -> XLNetConfig:
    """Two layers, three heads of eight, no dropout, a memory without limit."""
    sizes = {"vocab_size": 61, "d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 40, "mem_len": None}
    rest = {"dropout": 0.0, "summary_last_dropout": 0.0, "pad_token_id": PAD}
    return XLNetConfig(**{**sizes, **rest, **overrides})


def both_xlnets(folder: Path, task: str = "causal-lm", **overrides: Any) -> tuple[PreTrainedModel, XLNet]:
    """transformers' model, and ours loaded from what transformers saved in `folder`."""
    reference = theirs(tiny_xlnet(**overrides), task)
    reference.save_pretrained(folder)
    return reference, load(folder, task, device="cpu")[0]


def targets(b: int, t: int, n: int, seed: int = 1) -> dict[str, Tensor]:
    """A random order of each row's tokens, with the last n of it to predict: perm_mask and target_mapping (B, n, T)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(t, generator=generator) for _ in range(b)])
    rank = order.argsort(1)
    rank = rank.masked_fill(rank < t - n, -1)
    unseen = (rank[:, :, None] <= rank[:, None]) & (rank >= 0)[:, None]
    mapping = torch.nn.functional.one_hot(order[:, t - n :], t)
    return {"perm_mask": unseen.float(), "target_mapping": mapping.float()}


def assert_same_xlnet_gradients(reference: PreTrainedModel, model: XLNet, unused: tuple[str, ...] = ()) -> None:
    """Each of our gradients equals transformers' to 1e-4 of its largest entry; `unused` have none."""
    published = {name: parameter.grad for name, parameter in reference.named_parameters()}
    own = dict(model.named_parameters())
    table = model.key_map()
    assert set(own) == set(table)
    for key, source in table.items():
        parts = [published.pop(name) for name in source.names]
        grad = own[key].grad
        if key.endswith(unused):
            assert all(each is None or each.abs().max() < 1e-6 for each in (*parts, grad)), key
            continue
        assert grad is not None, key
        expected = torch.cat([source.ours(part) for part in parts])
        error, size = (grad - expected).abs().max(), expected.abs().max()
        assert size > 1e-4, f"{key}: at most {size:.1e}"
        assert error <= 1e-4 * size, f"{key}: off by {error:.1e}, of at most {size:.1e}"
    assert not published

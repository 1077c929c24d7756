"""Tiny random T5s of transformers, with weights and batches of source and target."""

from pathlib import Path
from typing import Any

import torch
from small_models import PAD, padded, theirs, token_rows
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config

from handtune.models import load

SOURCES, TARGETS = token_rows((7, 1, 12, 4)), token_rows((3, 5, 2, 6), seed=1)


def tiny_t5(scaled: bool = True, **overrides: Any) -> T5Config:
    """Two layers each, three heads of eight, eight buckets up to a distance of 20, no dropout; targets start with 5."""
    sizes = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    more = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "dropout_rate": 0.0}
    ids = {"pad_token_id": PAD, "eos_token_id": 60, "decoder_start_token_id": 5}
    config = T5Config(**{**sizes, **more, **ids, **overrides})
    config.scale_decoder_outputs = scaled  # which the constructor derives from another field
    return config


def their_t5(task: str = "seq2seq-lm", seed: int = 0, tied: bool = True, **overrides: Any) -> PreTrainedModel:
    """transformers' model. Its own way of untying the head would give the encoder an embedding of its own, too."""
    model = theirs(tiny_t5(**overrides), task, seed)
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def both_t5(folder: Path, task: str = "seq2seq-lm", seed: int = 0, **overrides: Any) -> tuple[PreTrainedModel, Any]:
    """transformers' model, and ours loaded from what transformers saved in `folder`."""
    model = their_t5(task, seed, **overrides)
    model.save_pretrained(folder)
    return model, load(folder, task, device="cpu")[0]


def pairs(sources: list[list[int]], targets: list[list[int]], side: str = "right") -> dict[str, Tensor]:
    """Sources and targets padded on one side, with masks."""
    source, target = padded(sources, side), padded(targets, side)
    return {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "decoder_input_ids": target["input_ids"],
        "decoder_attention_mask": target["attention_mask"],
    }


def lively(folder: Path, seed: int = 0, **overrides: Any) -> tuple[PreTrainedModel, Any]:
    """Both models with strong position tables: tiny ones repeat one token otherwise."""
    reference = their_t5(seed=seed, **overrides)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "relative_attention_bias" in name or "EncDecAttention" in name:
                parameter *= 6
    reference.save_pretrained(folder)
    return reference, load(folder, device="cpu")[0]

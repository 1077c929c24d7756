"""BERT: a bidirectional encoder, normalised after each addition.

Devlin et al. 2018, arXiv:1810.04805.

    x = norm(E[token] + P[position] + S[segment])
    x = norm₁(x + O attention(QKV x))
    x = norm₂(x + D gelu(U x))
    masked LM: E norm(gelu(W x)) + b        classification: C tanh(W x[CLS])

Published checkpoints come with or without `bert.` in front; old ones call a norm's weight and bias `gamma` and `beta`;
of the masked-LM head's output only the bias is stored (as `cls.predictions.bias`, sometimes `.decoder.bias` too), its
matrix being the token embedding; tagging and question answering have no pooler.

Shapes: B rows, T tokens, D width, H heads of width hd, F feed-forward width, V vocabulary, C classes. Packed, B is 1
and T all tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .encoder import BERT_KEYS, Encoder, tied_output
from .layers.heads import TEXT_TASKS
from .layers.key_map import CheckpointKey
from .layers.post_norm import Block, Embed, EncoderConfig


@dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """Sizes in the project's vocabulary; the defaults are those of bert-base-uncased."""

    n_types: int = 2  # segment ids

    keys: ClassVar[dict[str, str]] = {**EncoderConfig.keys, "type_vocab_size": "n_types"}

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {"model_type": "bert", **super().to_published()}


PRESETS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {},
    "bert-base-cased": {"vocab_size": 28996},
    "bert-large-uncased": {"n_layer": 24, "n_head": 16, "d_model": 1024, "d_ff": 4096},
    "bert-large-cased": {"vocab_size": 28996, "n_layer": 24, "n_head": 16, "d_model": 1024, "d_ff": 4096},
    "minilm-l6": {"n_layer": 6, "d_model": 384, "d_ff": 1536},
}


class Bert(Encoder):
    """BERT with the head of a task; see `PretrainedModel` for what it has from there."""

    title = "BERT"
    model_types: ClassVar = {"bert": "Bert"}
    config_class = BertConfig
    presets = PRESETS
    base_prefix = ("bert.",)
    head_keys: ClassVar = {
        "cls.predictions.*": ("masked-lm",),
        "cls.seq_relationship.*": (),  # the next-sentence head of pretraining
        "classifier.*": (*TEXT_TASKS, "token-classification"),
        "qa_outputs.*": ("question-answering",),
        "pooler.*": TEXT_TASKS,
    }
    tied_keys: ClassVar = tied_output("cls.predictions.decoder", "cls.predictions.bias")

    config: BertConfig

    def build(self, config: BertConfig) -> None:
        """The embeddings with their norm, and the blocks, each of which ends with one."""
        self.embed = Embed(config, config.max_positions, config.n_types)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones. The pooler is published beside the encoder, not under the head's name."""
        return {
            **BERT_KEYS,
            "head.pooler": "bert.pooler.dense",
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head.bias": CheckpointKey(("cls.predictions.bias",), also=("cls.predictions.decoder.bias",)),
        }

"""DistilBERT: BERT with half of its layers, which has learnt from BERT.

Sanh et al. 2019, arXiv:1910.01108. The blocks are BERT's, and so are positions and masked-LM head. It differs in

    segments         none
    dropout          none behind attention; in front of each head with a probability of its own
    classification   C relu(W x[CLS])

Shapes: B rows, T tokens, D width, V vocabulary. Packed, B is 1 and T all tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from .encoder import Encoder, tied_output
from .layers.config_fields import resolve_aliases
from .layers.heads import TEXT_TASKS
from .layers.key_map import CheckpointKey
from .layers.post_norm import Block, Embed, EncoderConfig


@dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """Sizes in the project's vocabulary; the defaults are those of distilbert-base-uncased."""

    n_layer: int = 6
    head_dropout: float | None = 0.2  # in front of a head for texts
    qa_dropout: float = 0.1  # in front of the head for questions; `dropout` of that for tokens

    keys: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "dim": "d_model",
        "hidden_dim": "d_ff",
        "activation": "activation",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "seq_classif_dropout": "head_dropout",
        "qa_dropout": "qa_dropout",
        "tie_word_embeddings": "tied",
    }

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json."""
        aliases = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
        return super().from_published(resolve_aliases(published, aliases))

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {"model_type": "distilbert", **super().to_published()}


PRESETS: dict[str, dict[str, Any]] = {
    "distilbert-base-uncased": {},
    "distilbert-base-cased": {"vocab_size": 28996},
    "distilbert-base-multilingual-cased": {"vocab_size": 119547},
}


class DistilBert(Encoder):
    """DistilBERT with the head of a task; see `PretrainedModel` for what it has from there."""

    title = "DistilBERT"
    model_types: ClassVar = {"distilbert": "DistilBert"}
    config_class = DistilBertConfig
    presets = PRESETS
    base_prefix = ("distilbert.",)
    head_keys: ClassVar = {
        "vocab_*": ("masked-lm",),
        "classifier.*": (*TEXT_TASKS, "token-classification"),
        "pre_classifier.*": TEXT_TASKS,
        "qa_outputs.*": ("question-answering",),
    }
    text_head: ClassVar = {"pooler": "relu"}
    tied_keys: ClassVar = tied_output("vocab_projector", "vocab_projector.bias")

    config: DistilBertConfig

    def build(self, config: DistilBertConfig) -> None:
        """The embeddings with their norm, and the blocks, each of which ends with one."""
        self.embed = Embed(config, config.max_positions)
        self.layers = nn.ModuleList(Block(config, attention_drops=False) for _ in range(config.n_layer))

    @property
    def head_rate(self) -> float:
        """The published dropout in front of the head."""
        by_token = {"token-classification": self.config.dropout, "question-answering": self.config.qa_dropout}
        return by_token.get(self.task, self.config.head_rate)

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones; what scores a text is published beside the encoder."""
        layer = "transformer.layer.{i}"
        qkv = (f"{layer}.attention.q_lin", f"{layer}.attention.k_lin", f"{layer}.attention.v_lin")
        return {
            "embed.tokens": "embeddings.word_embeddings",
            "embed.positions": "embeddings.position_embeddings",
            "embed.norm": "embeddings.LayerNorm",
            "layers.{i}.qkv": CheckpointKey(qkv),
            "layers.{i}.o": f"{layer}.attention.out_lin",
            "layers.{i}.norm1": f"{layer}.sa_layer_norm",
            "layers.{i}.up": f"{layer}.ffn.lin1",
            "layers.{i}.down": f"{layer}.ffn.lin2",
            "layers.{i}.norm2": f"{layer}.output_layer_norm",
            "head.pooler": "pre_classifier",
            "head.dense": "vocab_transform",
            "head.norm": "vocab_layer_norm",
            "head.bias": CheckpointKey(("vocab_projector.bias",)),
        }

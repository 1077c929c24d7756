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
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ..kernels import LayerNorm, Linear, activation_linear, attention
from ..kernels.dropout import Dropout
from .layers.config_fields import ACTIVATIONS, read_fields, write_fields
from .layers.heads import MaskedLMHead
from .layers.inputs import check_length, key_bias, positions
from .layers.key_map import CheckpointKey
from .model import PretrainedModel


@dataclass(frozen=True)
class BertConfig:
    """Sizes in the project's vocabulary; the defaults are those of bert-base-uncased."""

    vocab_size: int = 30522
    max_positions: int = 512  # tokens of a row; the position table ends there
    n_types: int = 2  # segment ids
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    d_ff: int = 3072
    activation: str = "gelu"  # by its published name
    eps: float = 1e-12  # of the norms
    # In training, where the published dropout is asked for: behind embeddings, attention and feed-forward, on what is
    # attended to, and in front of a head for labels (None: as `dropout`).
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float | None = None
    tied: bool = True  # the masked-LM output matrix is the token embedding; no other is implemented

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.d_model % self.n_head:
            raise ValueError(f"hidden_size {self.d_model} is not a multiple of num_attention_heads {self.n_head}")

    @property
    def head_rate(self) -> float:
        return self.dropout if self.head_dropout is None else self.head_dropout

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json."""
        return cls(**read_fields(cls, published, CONFIG_KEYS))

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {"model_type": "bert", **write_fields(self, CONFIG_KEYS)}


PRESETS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {},
    "bert-base-cased": {"vocab_size": 28996},
    "bert-large-uncased": {"n_layer": 24, "n_head": 16, "d_model": 1024, "d_ff": 4096},
    "bert-large-cased": {"vocab_size": 28996, "n_layer": 24, "n_head": 16, "d_model": 1024, "d_ff": 4096},
    "minilm-l6": {"n_layer": 6, "d_model": 384, "d_ff": 1536},
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "n_types",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "hidden_act": "activation",
    "layer_norm_eps": "eps",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "head_dropout",
    "tie_word_embeddings": "tied",
}


class Embed(nn.Module):
    """Sum of token, position and segment embedding, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_positions, config.d_model)
        self.types = nn.Embedding(config.n_types, config.d_model)
        self.norm = LayerNorm(config.d_model, config.eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor) -> Tensor:
        if token_type_ids is None:
            token_type_ids = input_ids.new_zeros(1, 1)
        types = self.types(token_type_ids)  # (B or 1, T or 1, D)
        x = self.norm(self.tokens(input_ids) + types + self.positions(position_ids))  # (B, T, D)
        return self.dropout(x)


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to its input and then normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.qkv = Linear(d, 3 * d, parts=(("query", d), ("key", d), ("value", d)))
        self.o = Linear(d, d)
        self.up = Linear(d, config.d_ff)
        self.down = Linear(config.d_ff, d)
        self.norm1 = LayerNorm(d, config.eps)
        self.norm2 = LayerNorm(d, config.eps)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.dropout)
        self.attention_dropout = Dropout(config.attention_dropout)

    def forward(self, x: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
        """The stream x (B, T, D) after this layer; `bias` as `attention` takes it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).unbind(2)  # (B, T, H, hd) each
        out = attention(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, bias=bias, causal=False,
            dropout=self.attention_dropout.rate,
        )  # fmt: skip
        out = out.flatten(2)  # (B, T, D)

        x = self.norm1(self.dropout(self.o(out)), residual=x)
        mlp = activation_linear(self.up(x), self.activation, self.down)  # (B, T, D), through (B, T, F)
        return self.norm2(self.dropout(mlp), residual=x)


class Bert(PretrainedModel):
    """BERT with the head of a task; see `PretrainedModel` for what it has from there."""

    title = "BERT"
    config_class = BertConfig
    presets = PRESETS
    architectures: ClassVar = {
        "masked-lm": "BertForMaskedLM",
        "sequence-classification": "BertForSequenceClassification",
        "reward": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
        "embedding": "BertModel",
    }
    base_prefix = ("bert.",)
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    head_keys: ClassVar = {
        "cls.predictions.*": ("masked-lm",),
        "cls.seq_relationship.*": (),  # the next-sentence head of pretraining
        "classifier.*": ("sequence-classification", "reward", "token-classification"),
        "qa_outputs.*": ("question-answering",),
        "pooler.*": ("sequence-classification", "reward"),
    }
    # A text is scored by its first token, [CLS], behind a pooler.
    text_head: ClassVar = {"pooler": True}
    text_pooling = "first"
    published_dropout = True
    tasks_with_dropout = ("sequence-classification", "reward", "token-classification")
    # Constants that some checkpoints carry.
    ignored_keys = ("*embeddings.position_ids",)
    tied_keys: ClassVar = {
        "cls.predictions.decoder.weight": (
            "embed.tokens.weight",
            "the token embedding; a masked-LM output matrix of its own is not implemented",
        ),
        "cls.predictions.decoder.bias": ("head.bias", "cls.predictions.bias; take one of them out"),
    }
    supported_config_values: ClassVar = {
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }

    config: BertConfig

    def build(self, config: BertConfig) -> None:
        """The embeddings with their norm, and the blocks, each of which ends with one."""
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))

    def build_language_head(self) -> nn.Module:
        """The masked-LM head, whose output matrix is the token embedding."""
        return MaskedLMHead(self.embed.tokens.weight, ACTIVATIONS[self.config.activation], self.config.eps)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """States before the head (B, T, D) for token ids (B, T) and a mask (B, T) of ones and zeros."""
        check_length(input_ids, cu_seqlens, max_seqlen, self.config.max_positions)
        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, cu_seqlens)  # (B or 1, T)

        x = self.embed(input_ids, token_type_ids, position_ids)  # (B, T, D)
        bias = key_bias(attention_mask)  # (B, 1, 1, T) or None
        for block in self.layers:
            x = block(x, bias, cu_seqlens, max_seqlen)
        return x

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones. The pooler is published beside the encoder, not under the head's name."""
        layer = "encoder.layer.{i}"
        attention = "encoder.layer.{i}.attention"
        qkv = (f"{attention}.self.query", f"{attention}.self.key", f"{attention}.self.value")
        return {
            "embed.tokens": "embeddings.word_embeddings",
            "embed.positions": "embeddings.position_embeddings",
            "embed.types": "embeddings.token_type_embeddings",
            "embed.norm": "embeddings.LayerNorm",
            "layers.{i}.qkv": CheckpointKey(qkv),
            "layers.{i}.o": f"{attention}.output.dense",
            "layers.{i}.norm1": f"{attention}.output.LayerNorm",
            "layers.{i}.up": f"{layer}.intermediate.dense",
            "layers.{i}.down": f"{layer}.output.dense",
            "layers.{i}.norm2": f"{layer}.output.LayerNorm",
            "head.pooler": "bert.pooler.dense",
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head.bias": CheckpointKey(("cls.predictions.bias",), also=("cls.predictions.decoder.bias",)),
        }

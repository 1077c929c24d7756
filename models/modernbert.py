"""ModernBERT: an encoder with rotary positions, gated feed-forwards and layers that look only near by.

Warner et al. 2024, arXiv:2412.13663.

    x = norm(E[token])
    x = x + O attention(rope(QKV norm₁(x)))     in layer 0 without norm₁
    x = x + D (gelu(g) ⊙ v),  [g | v] = G norm₂(x)
    masked LM: E norm(gelu(W x)) + b            all other heads: C norm(gelu(W x))

Every third layer, from the first on, attends to all tokens; the others to those at most half of `local_attention` away,
and turn their heads with another base. Norms and projections have no biases unless the configuration says so.

Shapes: B rows, T tokens, D width, H heads of width hd, F feed-forward width, V vocabulary, C classes. Packed, B is 1
and T all tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ..kernels import LayerNorm, Linear, activate, attention, feed_forward, norm_linear, split_rope
from ..kernels.dropout import Dropout
from .encoder import TOKENS, Encoder, tied_output
from .layers.config_fields import ACTIVATIONS, read_fields, write_fields
from .layers.heads import TEXT_TASKS, MaskedLMHead, MLPHead, Pooling, n_outputs
from .layers.inputs import check_length, key_bias, positions
from .layers.key_map import CheckpointKey
from .layers.near_and_far import (
    FAR,
    NEAR,
    read_far_layers,
    read_interval,
    read_rotations,
    write_layer_types,
    write_rotations,
)
from .layers.rope_scaling import Rope

# A gated feed-forward by the activation of its gate.
GATED = {"gelu": "geglu", "gelu_tanh": "geglu_tanh", "silu": "swiglu"}
POOLINGS = {"cls": "first", "mean": "mean"}  # of a head for texts
# published field -> ours
KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "hidden_activation": "activation",
    "classifier_activation": "head_activation",
    "classifier_pooling": "text_pooling",
    "classifier_bias": "head_bias",
    "norm_eps": "eps",
    "norm_bias": "norm_bias",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "local_attention": "local_attention",
    "embedding_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "classifier_dropout": "head_rate",
    "tie_word_embeddings": "tied",
}


@dataclass(frozen=True)
class ModernBertConfig:
    """Sizes in the project's vocabulary; the defaults are those of ModernBERT-base, but for the pooling."""

    vocab_size: int = 50368
    max_positions: int = 8192  # tokens of a row
    n_layer: int = 22
    n_head: int = 12
    d_model: int = 768
    d_ff: int = 1152
    activation: str = "gelu"  # of gates, by its published name
    head_activation: str = "gelu"
    text_pooling: str = "cls"  # what a head for texts reads: a key of POOLINGS
    head_bias: bool = False
    eps: float = 1e-5  # of the norms
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    local_attention: int = 128  # tokens on both sides together that a local layer sees
    global_layers: tuple[int, ...] | None = None  # indices of the layers that see all; None: every third from 0 on
    global_theta: float = 160000.0  # the rotation's base in global layers
    local_theta: float = 10000.0
    # In training, where the published dropout is asked for: of embeddings, of attention and behind it, of heads.
    dropout: float = 0.0
    attention_dropout: float = 0.0
    head_rate: float = 0.0
    tied: bool = True  # the masked-LM output matrix is the token embedding; no other is implemented

    def __post_init__(self) -> None:
        if ACTIVATIONS.get(self.activation) not in GATED:
            known = ", ".join(name for name, ours in ACTIVATIONS.items() if ours in GATED)
            raise ValueError(f"hidden_activation {self.activation!r} is not implemented; known: {known}")
        if self.head_activation not in ACTIVATIONS:
            raise ValueError(
                f"classifier_activation {self.head_activation!r} is unknown; known: {', '.join(ACTIVATIONS)}"
            )
        if self.text_pooling not in POOLINGS:
            raise ValueError(f"classifier_pooling {self.text_pooling!r} is unknown; known: {', '.join(POOLINGS)}")
        if self.d_model % (2 * self.n_head):
            raise ValueError(
                f"hidden_size {self.d_model} is not an even multiple of num_attention_heads {self.n_head}: rotary "
                "positions turn pairs of entries"
            )

    def is_global(self, layer: int) -> bool:
        """Whether a layer sees all tokens."""
        return layer % 3 == 0 if self.global_layers is None else layer in self.global_layers

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json. ValueError for what is not implemented, by name and value."""
        config = cls(**read_fields(cls, published, KEYS))
        layers = read_far_layers(published, config.n_layer)
        if layers is None:
            layers = tuple(range(0, config.n_layer, read_interval(published, "global_attn_every_n_layers", 3)))

        bases = {FAR: ("global_rope_theta", cls.global_theta), NEAR: ("local_rope_theta", cls.local_theta)}
        far, near = read_rotations(published, config.d_model // config.n_head, config.max_positions, bases)
        if far.scaling or near.scaling:
            raise ValueError("rope_parameters: a rotation that is scaled is not implemented for ModernBERT")
        return replace(config, global_layers=layers, global_theta=far.theta, local_theta=near.theta)

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {
            "model_type": "modernbert",
            **write_fields(self, KEYS),
            "layer_types": write_layer_types(tuple(filter(self.is_global, range(self.n_layer))), self.n_layer),
            "rope_parameters": write_rotations(Rope(self.global_theta), Rope(self.local_theta)),
        }


PRESETS: dict[str, dict[str, Any]] = {
    "ModernBERT-base": {"text_pooling": "mean"},
    "ModernBERT-large": {
        "n_layer": 28, "d_model": 1024, "n_head": 16, "d_ff": 2624, "text_pooling": "mean",
    },
}  # fmt: skip


class Embed(nn.Module):
    """The token embedding, normalised."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.norm = LayerNorm(config.d_model, config.eps, config.norm_bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.dropout(self.norm(self.tokens(input_ids)))  # (B, T, D)


class Block(nn.Module):
    """One layer: attention to all tokens or to near ones, then the gated feed-forward, each behind a norm."""

    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.is_global = config.is_global(index)
        # Both sides and the token itself.
        self.window = None if self.is_global else config.local_attention // 2 + 1
        self.norm1 = LayerNorm(d, config.eps, config.norm_bias) if index else None
        self.qkv = Linear(d, 3 * d, config.attention_bias)
        self.o = Linear(d, d, config.attention_bias)
        self.norm2 = LayerNorm(d, config.eps, config.norm_bias)
        self.gate_up = Linear(d, 2 * config.d_ff, config.mlp_bias)
        self.down = Linear(config.d_ff, d, config.mlp_bias)
        self.activation = GATED[ACTIVATIONS[config.activation]]
        self.attention_dropout = Dropout(config.attention_dropout)
        self.o_dropout = Dropout(config.attention_dropout)
        self.recompute = False  # see kernels/mlp/

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> Tensor:
        """The stream x (B, T, D) after this layer; `tables` are cosine and sine, `bias` as `attention` takes it."""
        qkv = self.qkv(x) if self.norm1 is None else norm_linear(x, self.norm1, self.qkv)  # (B, T, 3D)
        q, k, v = split_rope(qkv.unflatten(-1, (3 * self.n_head, -1)), self.n_head, *tables)  # (B, T, H, hd) each
        out = attention(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, window=self.window, bias=bias, causal=False,
            dropout=self.attention_dropout.rate,
        )  # fmt: skip
        x = x + self.o_dropout(self.o(out.flatten(2)))  # (B, T, D)
        return x + feed_forward(x, self.norm2, self.gate_up, self.activation, self.down, self.recompute)


class TaskHead(MLPHead):
    """A head for labels or spans behind ModernBERT's projection with activation and norm: (..., D) → (..., C)."""

    def __init__(self, config: ModernBertConfig, n_out: int, layers: int, scalar: bool):
        super().__init__(config.d_model, n_out, layers, scalar=scalar, dropout=config.head_rate)
        self.dense = Linear(config.d_model, config.d_model, config.head_bias)
        self.norm = LayerNorm(config.d_model, config.eps, config.norm_bias)
        self.activation = ACTIVATIONS[config.head_activation]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(activate(self.dense(x), self.activation)))


class ModernBert(Encoder):
    """ModernBERT with the head of a task; see `PretrainedModel` for what it has from there."""

    title = "ModernBERT"
    model_types: ClassVar = {"modernbert": "ModernBert"}
    config_class = ModernBertConfig
    presets = PRESETS
    base_prefix = ("model.",)
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.gate_up", "layers.*.down"),
    }
    head_keys: ClassVar = {
        "decoder.*": ("masked-lm",),
        "classifier.*": (*TEXT_TASKS, "token-classification", "question-answering"),
        "head.*": ("masked-lm", *TEXT_TASKS, "token-classification", "question-answering"),
    }
    # Its dropout is published for pretraining alone, and is zero.
    published_dropout = False
    tasks_with_dropout = (*TEXT_TASKS, "token-classification", "question-answering")
    tied_keys: ClassVar = tied_output("decoder", "decoder.bias")
    supported_config_values: ClassVar = {
        **Encoder.supported_config_values, "decoder_bias": (True,), "mlp_dropout": (0.0,),
    }  # fmt: skip

    config: ModernBertConfig

    def build(self, config: ModernBertConfig) -> None:
        """The embedding with its norm, the blocks, and the norm behind them."""
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = LayerNorm(config.d_model, config.eps, config.norm_bias)
        if self.task in TEXT_TASKS:
            self.pooling = POOLINGS[config.text_pooling]

    def build_head(self, pooling: Pooling) -> nn.Module:
        """The head of the task, without values; what reads labels or spans off begins as the masked-LM head does."""
        if self.task == "embedding" or self.task.endswith("-lm"):
            return super().build_head(pooling)
        n_out = n_outputs(self.task, self.labels)
        return TaskHead(self.config, n_out, self.head_layers, scalar=self.task == "reward")

    def build_language_head(self) -> nn.Module:
        """The masked-LM head, whose output matrix is the token embedding."""
        c = self.config
        activation = ACTIVATIONS[c.head_activation]
        return MaskedLMHead(self.get_parameter(TOKENS), activation, c.eps, c.head_bias, c.norm_bias)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """States before the head (B, T, D) for token ids (B, T) and a mask (B, T) of ones and zeros.

        ModernBERT has no segments: `token_type_ids` are ignored.
        """
        c = self.config
        check_length(input_ids, cu_seqlens, max_seqlen, c.max_positions)
        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, cu_seqlens)  # (B or 1, T)
        width = c.d_model // c.n_head
        far = Rope(c.global_theta).tables(position_ids, width)  # (B, T, hd/2) or (T, hd/2) each
        near = Rope(c.local_theta).tables(position_ids, width)
        bias = key_bias(attention_mask)  # (B, 1, 1, T) or None

        x = self.embed(input_ids)  # (B, T, D)
        for block in self.layers:
            x = block(x, far if block.is_global else near, bias, cu_seqlens, max_seqlen)
        return self.norm(x)

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones."""
        return {
            "embed.tokens": "embeddings.tok_embeddings",
            "embed.norm": "embeddings.norm",
            "layers.{i}.norm1": "layers.{i}.attn_norm",
            "layers.{i}.qkv": "layers.{i}.attn.Wqkv",
            "layers.{i}.o": "layers.{i}.attn.Wo",
            "layers.{i}.norm2": "layers.{i}.mlp_norm",
            "layers.{i}.gate_up": "layers.{i}.mlp.Wi",
            "layers.{i}.down": "layers.{i}.mlp.Wo",
            "norm": "final_norm",
            "head.dense": "head.dense",
            "head.norm": "head.norm",
            "head.bias": "decoder.bias",
        }

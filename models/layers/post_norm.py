"""What encoders of BERT's kind share: embeddings with a norm, and a block that is normalised after each addition.

    x = norm(E[token] + P[position] (+ S[segment]))
    x = norm₁(x + O attention(QKV x))
    x = norm₂(x + D activation(U x))

Devlin et al. 2018, arXiv:1810.04805. How a family's tensors are published, and what its heads are, stands in its own
file.

Shapes: B rows, T tokens, D width, H heads of width hd, F feed-forward width. Packed, B is 1 and T all tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, activation_linear, attention
from ...kernels.dropout import Dropout
from .config_fields import ACTIVATIONS, read_fields, write_fields
from .inputs import positions


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes in the project's vocabulary; the defaults are those that transformers has for a field that is left out."""

    vocab_size: int = 30522
    max_positions: int = 512  # tokens of a row
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

    # published field -> ours
    keys: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
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
        return cls(**read_fields(cls, published, cls.keys))

    def to_published(self) -> dict[str, Any]:
        """The same fields as config.json has them."""
        return write_fields(self, self.keys)


class Embed(nn.Module):
    """Sum of token, position and, where there are types, segment embedding (type 0 if none are given), normalised."""

    def __init__(self, config: EncoderConfig, n_positions: int, n_types: int = 0):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(n_positions, config.d_model)
        self.types = nn.Embedding(n_types, config.d_model) if n_types else None
        self.norm = LayerNorm(config.d_model, config.eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        x = self.tokens(input_ids)  # (B, T, D)
        if self.types is not None:
            if token_type_ids is None:
                token_type_ids = input_ids.new_zeros(1, 1)
            x = x + self.types(token_type_ids)  # (B or 1, T or 1, D)
        return self.dropout(self.norm(x + self.positions(position_ids)))


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to its input and then normalised.

    `attention_drops`: whether the published model has dropout behind attention, as it has behind the feed-forward.
    """

    def __init__(self, config: EncoderConfig, attention_drops: bool = True):
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
        self.attention_dropout = Dropout(config.attention_dropout)
        self.o_dropout = Dropout(config.dropout) if attention_drops else nn.Identity()
        self.down_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
        """The stream x (B, T, D) after this layer; `bias` as `attention` takes it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).unbind(2)  # (B, T, H, hd) each
        out = attention(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, bias=bias, causal=False,
            dropout=self.attention_dropout.rate,
        )  # fmt: skip
        out = out.flatten(2)  # (B, T, D)

        x = self.norm1(self.o_dropout(self.o(out)), residual=x)
        mlp = activation_linear(self.up(x), self.activation, self.down)  # (B, T, D), through (B, T, F)
        return self.norm2(self.down_dropout(mlp), residual=x)


def positions_behind_pad(
    input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, pad_id: int
) -> Tensor:
    """Rows of fairseq's position tables (B, T): from `pad_id` + 1 on for tokens, `pad_id` for pad tokens anywhere.

    Pad tokens, and what the mask hides, are not counted. Raises ValueError as `positions` does.
    """
    index = positions(input_ids, attention_mask, cu_seqlens)  # (B or 1, T)
    counted = input_ids != pad_id  # (B, T)
    if attention_mask is not None:
        counted &= attention_mask.bool()

    count = counted.cumsum(1)  # (B, T)
    if cu_seqlens is not None:
        # A segment's count begins behind that of all segments in front of it.
        starts = torch.arange(index.shape[1], device=index.device) - index[0]  # (T,)
        count = count - (count - counted.long())[:, starts]
    return pad_id + count * counted

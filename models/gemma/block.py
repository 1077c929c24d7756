"""What Gemma 2 and 3 have in common, both decoders of Llama's kind.

    norm(x)  = x · rstd ⊙ (1 + w)
    x₀       = √D E[token]
    x        = x + norm₂(O attention(q, k, v)),  scores divided by √query_scale instead of √hd
    x        = x + norm₄(D (gelu(G norm₃(x)) ⊙ U norm₃(x))),  gelu by its tanh form

Most layers see `near` positions only. Shapes: B rows, T tokens, D width, H query heads and K key/value heads of width
hd, F feed-forward width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels import Linear, RMSNorm, feed_forward, norm_linear, rms_norm
from ...kernels.dropout import Dropout
from ..layers.key_map import CheckpointKey
from ..llama.config import CONFIG_KEYS, LlamaConfig
from ..llama.model import Attending, Embed, Llama

# published field -> ours
KEYS = {theirs: ours for theirs, ours in CONFIG_KEYS.items() if ours not in ("window", "mlp_bias")} | {
    "query_pre_attn_scalar": "query_scale",
    "sliding_window": "near",
}


@dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """Sizes in the project's vocabulary, as Llama's; the defaults are those of transformers."""

    vocab_size: int = 256000
    max_positions: int = 8192
    n_layer: int = 26
    n_head: int = 8
    n_kv_head: int | None = 4
    d_model: int = 2304
    d_ff: int = 9216
    head_width: int | None = 256
    tied: bool = True
    query_scale: int = 256  # scores are divided by its root
    near: int = 4096  # positions that a near layer looks back, its own included
    far_layers: tuple[int, ...] | None = None  # indices of the layers that see all; None: the last of every `period`
    period: ClassVar[int]

    def is_far(self, layer: int) -> bool:
        """Whether a layer sees all positions."""
        return (layer + 1) % self.period == 0 if self.far_layers is None else layer in self.far_layers


class Norm(RMSNorm):
    """RMSNorm whose weight says by how much it differs from one."""

    def parameters_in_order(self) -> tuple[Tensor, None]:
        # In fp32, as 1 + w would lose what w has beyond the last bit of one.
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)), None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.parameters_in_order()[0], self.eps, residual)


class ScaledEmbed(Embed):
    """Token embedding times √D, which is rounded to the dtype of the weights."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)  # (B, T, D)
        return x * torch.full((), math.sqrt(x.shape[-1]), dtype=x.dtype, device=x.device)


class Block(Attending):
    """One layer: attention and feed-forward, each between two norms and added to x, the residual stream."""

    # q (B, T, H, hd) and k (B, T, K, hd), turned by their positions, and v, of qkv (B, T, H + 2K, hd) and `tables`
    turned: Callable[[Tensor, Any], tuple[Tensor, Tensor, Tensor]]

    def __init__(self, config: GemmaConfig, index: int):
        super().__init__()
        d, f, hd = config.d_model, config.d_ff, config.width
        q_width = config.n_head * hd
        kv_width = config.kv_heads * hd

        self.index = index
        self.head_width = hd
        self.qkv_heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.scale = config.query_scale**-0.5
        self.is_far = config.is_far(index)
        self.window = None if self.is_far else config.near

        self.norm1, self.norm2, self.norm3, self.norm4 = (Norm(d, config.eps) for _ in range(4))
        qkv_parts = (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width))
        self.qkv = Linear(d, q_width + 2 * kv_width, config.attention_bias, parts=qkv_parts)
        self.o = Linear(q_width, d, config.attention_bias)
        self.gate_up = Linear(d, 2 * f, False, parts=(("gate_proj", f), ("up_proj", f)))
        self.down = Linear(f, d, False)
        self.attention_dropout = Dropout(config.attention_dropout)
        self.recompute = False  # see kernels/mlp/

    def forward(self, x: Tensor, tables: Any, *context: Any) -> Tensor:
        """The stream x (B, T, D) after this layer; `tables` as `turned` takes them, `context` as `attend` does."""
        qkv = norm_linear(x, self.norm1, self.qkv).unflatten(-1, (-1, self.head_width))  # (B, T, H + 2K, hd)
        x, out = self.attend(x, *self.turned(qkv, tables), *context)
        x = x + self.norm2(self.o(out))  # (B, T or n, D)
        return x + self.norm4(feed_forward(x, self.norm3, self.gate_up, "geglu_tanh", self.down, self.recompute))


class Gemma(Llama):
    """What the two models have in common; `block` is the class of their layers."""

    base_prefix: ClassVar[tuple[str, ...]] = ("model.",)
    block: ClassVar[type[Block]]

    def build(self, config: Any) -> None:
        """Token embedding, the blocks, and the norm behind them."""
        self.embed = ScaledEmbed(config)
        self.layers = nn.ModuleList(self.block(config, i) for i in range(config.n_layer))
        self.norm = Norm(config.d_model, config.eps)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights: N(0, 0.02²); norms begin as one."""
        super().initialize()
        for module in self.modules():
            if isinstance(module, Norm):
                module.weight.zero_()

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones: Llama's, with two more norms."""
        return {
            **super().checkpoint_keys(),
            "layers.{i}.norm2": "layers.{i}.post_attention_layernorm",
            "layers.{i}.norm3": "layers.{i}.pre_feedforward_layernorm",
            "layers.{i}.norm4": "layers.{i}.post_feedforward_layernorm",
        }

"""BLOOM: a pre-norm decoder that knows positions only as distances between tokens.

BigScience Workshop 2022, arXiv:2211.05100; ALiBi: Press et al. 2021, arXiv:2108.12409.

    x₀ = norm₀(E[token])                   a norm behind the embedding, for a stable training
    x  = x + O attention(QKV norm₁(x))     scores: q_t · k_s / √hd + slope_h · (s − t)
    x  = x + D gelu(U norm₂(x))            gelu in its tanh form, U of width 4 D
    logits = E norm(x)                     the output matrix is the token embedding

The slopes of H heads, H a power of two, are 2^(−8/H), 2^(−16/H), … 2^(−8). For another H they are those of the power
of two below, and then, until there are enough, every other one of those of the power above (5 heads: 2⁻², 2⁻⁴, 2⁻⁶,
2⁻⁸, and 2⁻¹). There is no table of positions, so no row is too long.

Published checkpoints store the rows of `query_key_value` head by head, (H, 3, hd), where ours are (3, H, hd): the key
map and the adapter files sort them. They leave out the tied `lm_head`, and come with or without `transformer.` in
front.

Shapes: B rows, T tokens, S cached and new tokens, D width, H heads of width hd, V vocabulary, C classes, n positions
that are asked for. Packed, B is 1 and T all tokens.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, attention, feed_forward, norm_linear
from ...kernels.dropout import Dropout
from ..layers.inputs import ALL_LAYERS, key_bias
from ..layers.key_map import TIED, CheckpointKey
from ..layers.kv_cache import KVCache
from ..model import PretrainedModel
from .config import PRESETS, BloomConfig


def alibi_slopes(n_head: int, device: torch.device | None = None) -> Tensor:
    """How steeply the scores of each head fall with the distance, (H,) fp32; see above."""
    power = 2 ** (n_head.bit_length() - 1)  # the power of two below, or H itself
    regular = torch.arange(1, power + 1, device=device) / power  # (power,)
    between = (2 * torch.arange(n_head - power, device=device) + 1) / (2 * power)  # (H − power,)
    return torch.exp2(-8 * torch.cat((regular, between)))  # (H,)


def mask_bias(attention_mask: Tensor | None, slopes: Tensor) -> Tensor | None:
    """What a mask (B, S) adds to scores with ALiBi by column: which keys may be seen (B, 1, 1, S), or None where all.

    Published models count the real tokens of a row instead of columns. With padding on one side, or on both, the two
    differ by the same number for all real keys of a row; that adds a constant to the scores of a query, and softmax
    doesn't see it. Only where padding stands between real tokens is there something to correct: (B, H, 1, S), float.
    """
    visible = key_bias(attention_mask)  # (B, 1, 1, S)
    if visible is None or attention_mask is None:
        return None

    real = attention_mask.long()  # (B, S)
    if not may_have_holes(real):
        return visible

    shift = real.cumsum(1) - torch.arange(real.shape[1], device=real.device)  # (B, S)
    bias = slopes[:, None, None] * shift[:, None, None]  # (B, H, 1, S)
    return bias.masked_fill(~visible, torch.finfo(slopes.dtype).min)


def may_have_holes(real: Tensor) -> bool:
    """Whether padding may stand between real tokens (ones) in some row (B, S): so a GPU, which isn't waited for, says.

    In a row with a hole real tokens begin more than once: a 1 behind a 0, or in the first column.
    """
    if real.is_cuda:
        return True
    n_runs = real.diff(dim=1).clamp(min=0).sum(1) + real[:, 0]  # (B,)
    return bool((n_runs > 1).any())


class Embed(nn.Module):
    """Token embedding and its norm."""

    def __init__(self, config: BloomConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.norm = LayerNorm(config.d_model, config.eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.tokens(input_ids))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm and added to x, the residual stream."""

    def __init__(self, config: BloomConfig, index: int):
        super().__init__()
        d = config.d_model
        self.index = index
        self.n_head = config.n_head
        self.window = None  # it sees all that came before
        self.norm1 = LayerNorm(d, config.eps)
        self.norm2 = LayerNorm(d, config.eps)
        self.qkv = Linear(d, 3 * d)
        self.o = Linear(d, d)
        self.up = Linear(d, 4 * d)
        self.down = Linear(4 * d, d)
        self.dropout = Dropout(config.dropout)
        self.attention_dropout = Dropout(config.attention_dropout)
        # True: up(norm(x)) is not kept but computed again in the backward pass (kernels/mlp/).
        self.recompute = False

    def forward(
        self,
        x: Tensor,
        slopes: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        keys: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        positions_to_return: Tensor | None = None,
    ) -> Tensor:
        """The stream x (B, T, D) after this layer; `slopes` are ALiBi's (H,), `bias` as `attention` takes it."""
        qkv = norm_linear(x, self.norm1, self.qkv)  # (B, T, 3·D)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).unbind(2)  # (B, T, H, hd) each
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, S, H, hd) each

        out = attention(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, keys=keys, bias=bias, alibi=slopes,
            dropout=self.attention_dropout.rate,
        )  # fmt: skip
        out = out.flatten(2)  # (B, T, D)

        # Last layer: keys and values needed every position, but only these are read further; the rest stops here.
        if positions_to_return is not None:
            x = x[:, positions_to_return]  # (B, n, D)
            out = out[:, positions_to_return]  # (B, n, D)

        x = x + self.dropout(self.o(out))  # (B, T or n, D)
        return x + self.dropout(feed_forward(x, self.norm2, self.up, "gelu_tanh", self.down, self.recompute))


class Bloom(PretrainedModel):
    """BLOOM with the head of a task; see `PretrainedModel` for what it has from there."""

    title = "BLOOM"
    model_types: ClassVar = {"bloom": "Bloom"}
    config_class = BloomConfig
    presets = PRESETS
    architectures: ClassVar = {
        "causal-lm": "BloomForCausalLM",
        "sequence-classification": "BloomForSequenceClassification",
        "reward": "BloomForSequenceClassification",
        "token-classification": "BloomForTokenClassification",
        "question-answering": "BloomForQuestionAnswering",
        "embedding": "BloomModel",
    }
    base_prefix = ("transformer.",)
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    head_keys: ClassVar = {
        "lm_head.*": ("causal-lm",),
        "score.*": ("sequence-classification", "reward"),
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
    }
    # Heads that score a text are published without a bias.
    text_head: ClassVar = {"bias": False}
    # Constants that some checkpoints carry.
    ignored_keys = ("*.self_attention.scale_mask_softmax.causal_mask",)
    tied_keys: ClassVar = {"lm_head.weight": ("embed.tokens.weight", TIED)}
    supported_config_values: ClassVar = {
        "apply_residual_connection_post_layernorm": (False,),
        "is_causal": (True, None),
    }
    is_decoder = True

    config: BloomConfig

    def build(self, config: BloomConfig) -> None:
        """Token embedding with its norm, the blocks, and the norm behind them."""
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = LayerNorm(config.d_model, config.eps)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `length` positions."""
        c = self.config
        return KVCache(c.n_layer, batch, length, c.n_head, c.d_model // c.n_head, self.embed.tokens.weight)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        keys: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        hidden_states: Tensor | None = None,
        layer_range: slice = ALL_LAYERS,
        positions_to_return: Tensor | None = None,
    ) -> Tensor:
        """States before the head (B, T, D) for token ids (B, T); `attention_mask` is (B, S), S counting the cache.

        `layer_range` computes these layers only, and `hidden_states` (B, T, D) is what enters the first of them. A
        range with an end gives what would enter the layer behind it, without the last norm. `positions_to_return` (n,)
        gives the states of these positions only, (B, n, D): the last layer feeds forward no others.

        BLOOM knows neither token types nor positions: `token_type_ids` and `position_ids` are ignored. Distances count
        the real tokens between two.
        """
        slopes = alibi_slopes(self.config.n_head, input_ids.device)  # (H,)
        bias = mask_bias(attention_mask, slopes)  # (B, 1 or H, 1, S) or None

        x = hidden_states
        if x is None:
            x = self.embed(input_ids)  # (B, T, D)
        # As a tuple: a slice of a ModuleList would build a new module in each pass.
        for block in tuple(self.layers)[layer_range]:
            # Below the last layer every position is a key of the next one.
            returned = positions_to_return if block is self.layers[-1] else None
            x = block(x, slopes, bias, cu_seqlens, max_seqlen, keys, cache, returned)

        if layer_range.stop is not None:
            return x
        return self.norm(x)

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones, of which q, k and v are stored head by head."""
        qkv = "h.{i}.self_attention.query_key_value"
        return {
            "embed.tokens": "word_embeddings",
            "embed.norm": "word_embeddings_layernorm",
            "layers.{i}.norm1": "h.{i}.input_layernorm",
            "layers.{i}.qkv": CheckpointKey((qkv,), interleaved=(self.config.n_head, 3)),
            "layers.{i}.o": "h.{i}.self_attention.dense",
            "layers.{i}.norm2": "h.{i}.post_attention_layernorm",
            "layers.{i}.up": "h.{i}.mlp.dense_h_to_4h",
            "layers.{i}.down": "h.{i}.mlp.dense_4h_to_h",
            "norm": "ln_f",
        }

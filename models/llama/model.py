"""Llama, Mistral, Qwen2, Qwen3: pre-norm decoders with rotary positions, shared key/value heads, gated feed-forward.

Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Llama Team 2024, arXiv:2407.21783; what the other families add is
in `config.py`. Norms are RMSNorm.

    x₀ = E[token]
    q, k, v = QKV norm₁(x),  q and k normalised head by head (Qwen3), then turned by their positions
    x  = x + O attention(q, k, v)          H query heads share K key/value heads
    x  = x + D (silu(G norm₂(x)) ⊙ U norm₂(x))
    logits = H norm(x)                     H is E in the tied ones

q, k, v are one product here, and so are gate and up; published checkpoints store them one by one. The order of the
entries in a head is that of the Hugging Face layout: a pair that turns together lies hd/2 apart.

Shapes: B rows, T tokens, S cached and new tokens, D width, H query heads and K key/value heads of width hd, F
feed-forward width, V vocabulary, C classes, n positions that are asked for. Packed, B is 1 and T all tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from ...kernels import Linear, RMSNorm, attention, feed_forward, norm_linear, rope, split_rope
from ...kernels.attn.made_again import made_again
from ...kernels.dropout import Dropout
from ..layers.inputs import ALL_LAYERS, check_length, key_bias, positions
from ..layers.key_map import TIED, CheckpointKey
from ..layers.kv_cache import KVCache
from ..model import PretrainedModel
from .config import FAMILIES, PRESETS, LlamaConfig


class Embed(nn.Module):
    """Token embedding."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)


class Attending(nn.Module):
    """What the blocks of Llama's kind do with q, k and v."""

    index: int
    window: int | None  # positions that the layer looks back, its own included; None: all
    scale: float | None = None  # of scores; None: 1/√hd
    softcap: float | None = None  # of scores, where they have one
    causal = True
    attention_dropout: Dropout

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None,
        max_seqlen: int | None, keys: tuple[Tensor, Tensor] | None, cache: KVCache | None,
        positions_to_return: Tensor | None = None, *, make: Callable[[], Sequence[Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x (B, T, D), and what q (B, T, H, hd) makes of k, v (B, T, K, hd): (B, T, H·hd); n positions if asked.

        Where `make` gives q and k again, they are not kept for the backward pass.
        """
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, S, K, hd) each
        with nullcontext() if make is None else made_again(make, q, k):
            out = attention(
                q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, keys=keys, window=self.window, bias=bias,
                causal=self.causal, scale=self.scale, softcap=self.softcap, dropout=self.attention_dropout.rate,
            )  # fmt: skip
        out = out.flatten(2)  # (B, T, H·hd)

        # Last layer: keys and values needed every position, but only these are read further; the rest stops here.
        if positions_to_return is not None:
            x = x[:, positions_to_return]  # (B, n, D)
            out = out[:, positions_to_return]  # (B, n, H·hd)
        return x, out


class Block(Attending):
    """One layer: attention and feed-forward, each behind its norm and added to x, the residual stream."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        d, f, hd = config.d_model, config.d_ff, config.width
        q_width = config.n_head * hd
        kv_width = config.kv_heads * hd

        self.index = index
        self.head_width = hd
        self.qkv_heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.window = config.window_of(index)
        self.norm1 = RMSNorm(d, config.eps)
        self.norm2 = RMSNorm(d, config.eps)
        qkv_parts = (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width))
        self.qkv = Linear(d, q_width + 2 * kv_width, config.qkv_bias, parts=qkv_parts)
        self.q_norm = RMSNorm(hd, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(hd, config.eps) if config.qk_norm else None
        self.o = Linear(q_width, d, config.attention_bias)
        self.gate_up = Linear(d, 2 * f, config.mlp_bias, parts=(("gate_proj", f), ("up_proj", f)))
        self.down = Linear(f, d, config.mlp_bias)
        self.attention_dropout = Dropout(config.attention_dropout)
        # True: up(norm(x)) is not kept but computed again in the backward pass (kernels/mlp/).
        self.recompute = False

    def forward(self, x: Tensor, tables: Any, *context: Any) -> Tensor:
        """The stream x (B, T, D) after this layer; `tables` are cosine and sine, `context` as `attend` takes it."""
        qkv = norm_linear(x, self.norm1, self.qkv).unflatten(-1, (-1, self.head_width))  # (B, T, H + 2K, hd)
        if self.q_norm is not None and self.k_norm is not None:
            # The norms keep all of qkv for their backward pass, so that v may stay a view of it.
            q, k, v = qkv.split(self.qkv_heads, dim=2)  # (B, T, H, hd), (B, T, K, hd), (B, T, K, hd)
            q, k = rope(self.q_norm(q), self.k_norm(k), *tables)
        else:
            q, k, v = split_rope(qkv, self.qkv_heads[0], *tables)
        x, out = self.attend(x, q, k, v, *context)
        x = x + self.o(out)  # (B, T or n, D)
        return x + feed_forward(x, self.norm2, self.gate_up, "swiglu", self.down, self.recompute)


class Llama(PretrainedModel):
    """A model of the Llama kind with the head of a task; see `PretrainedModel` for what it has from there."""

    title = "Llama"
    model_types: ClassVar = {family.lower(): family for family in FAMILIES}
    config_class: ClassVar[Any] = LlamaConfig
    presets = PRESETS
    architectures: ClassVar = {
        "causal-lm": "{}ForCausalLM",
        "sequence-classification": "{}ForSequenceClassification",
        "reward": "{}ForSequenceClassification",
        "token-classification": "{}ForTokenClassification",
        "question-answering": "{}ForQuestionAnswering",
        "embedding": "{}Model",
    }
    base_prefix: ClassVar[tuple[str, ...]] = ("model.", "transformer.")  # the second under question answering
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.gate_up", "layers.*.down"),
    }
    head_keys: ClassVar = {
        "lm_head.*": ("causal-lm",),
        "score.*": ("sequence-classification", "reward", "token-classification"),
        "qa_outputs.*": ("question-answering",),
    }
    # Heads that score a text are published without a bias.
    text_head: ClassVar = {"bias": False}
    # Constants that some checkpoints carry.
    ignored_keys = ("*rotary_emb.inv_freq",)
    tied_keys: ClassVar = {"lm_head.weight": ("embed.tokens.weight", TIED)}
    supported_config_values: ClassVar = {
        "is_causal": (True, None),
        "hidden_act": ("silu",),
        "pretraining_tp": (1,),
        "dual_chunk_attention_config": (None,),  # of Qwen2.5-1M
        "use_mrope": (False, None),
    }
    is_decoder = True

    config: LlamaConfig

    def build(self, config: LlamaConfig) -> None:
        """Token embedding, the blocks, and the norm behind them."""
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.eps)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `length` positions."""
        c = self.config
        return KVCache(c.n_layer, batch, length, c.kv_heads, c.width, self.embed.tokens.weight)

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
        keys: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None, hidden_states: Tensor | None = None,
        layer_range: slice = ALL_LAYERS, positions_to_return: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """States before the head (B, T, D) for token ids (B, T); `attention_mask` is (B, S), S counting the cache.

        `layer_range` computes these layers only, and `hidden_states` (B, T, D) is what enters the first of them. A
        range with an end gives what would enter the layer behind it, without the last norm. `positions_to_return` (n,)
        gives the states of these positions only, (B, n, D): the last layer feeds forward no others.

        Llama knows no token types: `token_type_ids` are ignored. No table ends at `max_positions`, so that longer rows,
        or packed segments, would give states without meaning: they are refused (ValueError).
        """
        past = cache.length if cache is not None else 0
        check_length(input_ids, cu_seqlens, max_seqlen, self.config.max_positions, past)
        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, cu_seqlens, past)  # (B or 1, T)
        tables = self.tables(position_ids)
        bias = key_bias(attention_mask)  # (B, 1, 1, S) or None

        x = hidden_states
        if x is None:
            x = self.embed(input_ids)  # (B, T, D)
        # As a tuple: a slice of a ModuleList would build a new module in each pass.
        for block in tuple(self.layers)[layer_range]:
            # Below the last layer every position is a key of the next one.
            returned = positions_to_return if block is self.layers[-1] else None
            x = block(x, tables, bias, cu_seqlens, max_seqlen, keys, cache, returned)

        if layer_range.stop is not None:
            return x
        return self.norm(x)

    def tables(self, position_ids: Tensor) -> Any:
        """What turns q and k, as the blocks take it: cosine and sine (B, T, hd/2), or (T, hd/2) for one row."""
        return self.config.rope.tables(position_ids, self.config.width)

    @property
    def checkpoint_prefix(self) -> str:
        """What stands in front of the base model's tensors in a checkpoint of this task."""
        if self.task == "question-answering" and self.config.family != "Mistral":
            return self.base_prefix[1]
        return super().checkpoint_prefix

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones; one that reads what others read is made up of their rows."""
        attention = "layers.{i}.self_attn"
        mlp = "layers.{i}.mlp"
        return {
            "embed.tokens": "embed_tokens",
            "layers.{i}.norm1": "layers.{i}.input_layernorm",
            "layers.{i}.qkv": CheckpointKey((f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")),
            "layers.{i}.q_norm": f"{attention}.q_norm",
            "layers.{i}.k_norm": f"{attention}.k_norm",
            "layers.{i}.o": f"{attention}.o_proj",
            "layers.{i}.norm2": "layers.{i}.post_attention_layernorm",
            "layers.{i}.gate_up": CheckpointKey((f"{mlp}.gate_proj", f"{mlp}.up_proj")),
            "layers.{i}.down": f"{mlp}.down_proj",
            "norm": "norm",
        }

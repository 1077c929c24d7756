"""GPT-2 and GPT-3: pre-norm decoders with learned positions.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Brown et al. 2020, arXiv:2005.14165.

    x₀ = E[token] + P[position]
    x  = x + O attention(QKV norm₁(x))
    x  = x + D gelu(U norm₂(x))            gelu in its tanh form
    logits = E norm(x)                     the output matrix is the token embedding

GPT-3 is the same block; its odd layers attend in a band of `window` positions.

Published GPT-2 checkpoints store projections as Conv1D, (in, out), so they are transposed on the way; leave out the
tied `lm_head`; come with or without `transformer.` in front; and carry the constants `attn.bias`, `attn.masked_bias`.

Shapes: B rows, T tokens, S cached and new tokens, D width, H heads of width hd, F feed-forward width, V vocabulary, C
classes, n positions that are asked for. Packed, B is 1 and T all tokens.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, attention, feed_forward, norm_linear
from ...kernels.dropout import Dropout
from ..layers.config_fields import ACTIVATIONS
from ..layers.inputs import ALL_LAYERS, check_length, key_bias, positions
from ..layers.key_map import TIED, CheckpointKey
from ..layers.kv_cache import KVCache
from ..model import PretrainedModel
from .config import PRESETS, GPT2Config


class Embed(nn.Module):
    """Token and position embedding."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_positions, config.d_model)
        self.dropout = Dropout(config.embed_dropout)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm and added to x, the residual stream."""

    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        d = config.d_model
        inner = config.n_head * config.width  # not D in GPT-3 XL and 13B
        d_ff = config.d_ff or 4 * d

        self.index = index
        self.n_head = config.n_head
        self.head_width = config.width
        self.activation = ACTIVATIONS[config.activation]
        self.norm1 = LayerNorm(d, config.eps)
        self.norm2 = LayerNorm(d, config.eps)
        self.qkv = Linear(d, 3 * inner)
        self.o = Linear(inner, d)
        self.up = Linear(d, d_ff)
        self.down = Linear(d_ff, d)
        self.dropout = Dropout(config.dropout)
        self.attention_dropout = Dropout(config.attention_dropout)

        # Some checkpoints leave the division of the scores by √hd out, or divide by the depth, too.
        self.scale = 1.0
        if config.scale_attention:
            self.scale = self.head_width**-0.5
        if config.scale_by_layer:
            self.scale /= index + 1
        self.window = config.window if index % 2 else None
        # True: up(norm(x)) is not kept but computed again in the backward pass (kernels/mlp/).
        self.recompute = False

    def forward(
        self, x: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None,
        keys: tuple[Tensor, Tensor] | None, cache: KVCache | None, positions_to_return: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The stream x (B, T, D) after this layer; `bias` as `attention` takes it."""
        qkv = norm_linear(x, self.norm1, self.qkv)  # (B, T, 3·H·hd)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, self.head_width)).unbind(2)  # (B, T, H, hd) each
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, S, H, hd) each

        out = attention(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, keys=keys, window=self.window, bias=bias,
            scale=self.scale, dropout=self.attention_dropout.rate,
        )  # fmt: skip
        out = out.flatten(2)  # (B, T, H·hd)

        # Last layer: keys and values needed every position, but only these are read further; the rest stops here.
        if positions_to_return is not None:
            x = x[:, positions_to_return]  # (B, n, D)
            out = out[:, positions_to_return]  # (B, n, H·hd)

        x = x + self.dropout(self.o(out))  # (B, T or n, D)
        mlp = feed_forward(x, self.norm2, self.up, self.activation, self.down, self.recompute)  # (B, T or n, D)
        return x + self.dropout(mlp)


class GPT2(PretrainedModel):
    """GPT-2 or GPT-3 with the head of a task; see `PretrainedModel` for what it has from there."""

    title = "GPT-2"
    model_types: ClassVar = {"gpt2": "GPT2", "gpt3": "GPT2"}
    config_class = GPT2Config
    presets = PRESETS
    # transformers' class for each task, as config.json names it.
    architectures: ClassVar = {
        "causal-lm": "GPT2LMHeadModel",
        "sequence-classification": "GPT2ForSequenceClassification",
        "reward": "GPT2ForSequenceClassification",
        "token-classification": "GPT2ForTokenClassification",
        "question-answering": "GPT2ForQuestionAnswering",
        "embedding": "GPT2Model",
    }
    base_prefix = ("transformer.",)
    # What "attention" and "mlp" mean as targets of adapters.
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    # The tasks that a stored head is for; the heads of other tasks are left out.
    head_keys: ClassVar = {
        "lm_head.*": ("causal-lm",),
        "score.*": ("sequence-classification", "reward"),
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
    }
    # Heads that score a text are published without a bias.
    text_head: ClassVar = {"bias": False}
    # Constants that some checkpoints carry.
    ignored_keys = ("*.attn.bias", "*.attn.masked_bias")
    # lm_head.weight may be stored, too; it must then equal the token embedding.
    tied_keys: ClassVar = {"lm_head.weight": ("embed.tokens.weight", TIED)}
    # Published fields that would change what is computed, and the values for which they don't.
    supported_config_values: ClassVar = {
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "is_causal": (True, None),
    }
    is_decoder = True

    config: GPT2Config

    def build(self, config: GPT2Config) -> None:
        """Token and position embedding, the blocks, and the norm behind them."""
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = LayerNorm(config.d_model, config.eps)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights; projections into the stream are scaled by 1/√(2 n_layer), as the GPT-2 paper says."""
        super().initialize()
        for block in self.layers:
            assert isinstance(block, Block)
            for linear in (block.o, block.down):
                linear.weight.div_((2 * self.config.n_layer) ** 0.5)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `length` positions."""
        c = self.config
        return KVCache(c.n_layer, batch, length, c.n_head, c.width, self.embed.tokens.weight)

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
        """
        past = cache.length if cache is not None else 0
        check_length(input_ids, cu_seqlens, max_seqlen, self.config.max_positions, past)

        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, cu_seqlens, past)  # (B or 1, T)

        x = hidden_states
        if x is None:
            x = self.embed.tokens(input_ids) + self.embed.positions(position_ids)  # (B, T, D)
            if token_type_ids is not None:
                # GPT-2 has no table for these: transformers looks them up among the tokens.
                x = x + self.embed.tokens(token_type_ids)
            x = self.embed.dropout(x)

        bias = key_bias(attention_mask)  # (B, 1, 1, S) or None
        # As a tuple: a slice of a ModuleList would build a new module in each pass.
        for block in tuple(self.layers)[layer_range]:
            # Below the last layer every position is a key of the next one.
            returned = positions_to_return if block is self.layers[-1] else None
            x = block(x, bias, cu_seqlens, max_seqlen, keys, cache, returned)

        if layer_range.stop is not None:
            return x
        return self.norm(x)

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones; projections are stored as Conv1D, (in, out)."""

        def conv1d(name: str) -> CheckpointKey:
            return CheckpointKey((name,), transposed=True)

        return {
            "embed.tokens": "wte",
            "embed.positions": "wpe",
            "layers.{i}.norm1": "h.{i}.ln_1",
            "layers.{i}.qkv": conv1d("h.{i}.attn.c_attn"),
            "layers.{i}.o": conv1d("h.{i}.attn.c_proj"),
            "layers.{i}.norm2": "h.{i}.ln_2",
            "layers.{i}.up": conv1d("h.{i}.mlp.c_fc"),
            "layers.{i}.down": conv1d("h.{i}.mlp.c_proj"),
            "norm": "ln_f",
        }

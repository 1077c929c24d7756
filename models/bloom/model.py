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
front. Dropout is not applied; adapters have theirs.

Shapes: B rows, T tokens, S cached and new tokens, D width, H heads of width hd, V vocabulary, C classes, n positions
that are asked for. Packed, B is 1 and T all tokens.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, attention, feed_forward, norm_linear
from ..layers.config_fields import overridden
from ..layers.heads import BY_TEXT, decoder_head, last_unpadded, pool_tokens
from ..layers.initialization import initialize
from ..layers.inputs import ALL_LAYERS, key_bias
from ..layers.key_map import TIED, CheckpointKey, head_key_map
from ..layers.kv_cache import KVCache
from ..tokenizer.special_tokens import SpecialTokens
from .config import PRESETS, BloomConfig, read_config, write_config


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

    # A row has a hole where real tokens begin more than once: a 1 behind a 0, or in the first column.
    real = attention_mask.long()  # (B, S)
    n_runs = real.diff(dim=1).clamp(min=0).sum(1) + real[:, 0]  # (B,)
    if not bool((n_runs > 1).any()):
        return visible

    shift = real.cumsum(1) - torch.arange(real.shape[1], device=real.device)  # (B, S)
    bias = slopes[:, None, None] * shift[:, None, None]  # (B, H, 1, S)
    return bias.masked_fill(~visible, torch.finfo(slopes.dtype).min)


class Embed(nn.Module):
    """Token embedding and its norm."""

    def __init__(self, config: BloomConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.norm = LayerNorm(config.d_model, config.eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.tokens(input_ids))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm and added to the stream."""

    def __init__(self, config: BloomConfig, index: int):
        super().__init__()
        d = config.d_model
        self.index = index
        self.n_head = config.n_head
        self.norm1 = LayerNorm(d, config.eps)
        self.norm2 = LayerNorm(d, config.eps)
        self.qkv = Linear(d, 3 * d)
        self.o = Linear(d, d)
        self.up = Linear(d, 4 * d)
        self.down = Linear(4 * d, d)
        self.recompute = False  # see kernels/mlp.py

    def forward(
        self,
        x: Tensor,
        slopes: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: KVCache | None,
        positions_to_return: Tensor | None = None,
    ) -> Tensor:
        """The stream x (B, T, D) after this layer; `slopes` are ALiBi's (H,), `bias` as `attention` takes it."""
        qkv = norm_linear(x, self.norm1, self.qkv)  # (B, T, 3·D)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).unbind(2)  # (B, T, H, hd) each
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, S, H, hd) each

        out = attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, bias=bias, alibi=slopes)
        out = out.flatten(2)  # (B, T, D)

        # Every position was a key, but nobody reads what becomes of most of them behind the last layer.
        if positions_to_return is not None:
            x = x[:, positions_to_return]  # (B, n, D)
            out = out[:, positions_to_return]  # (B, n, D)

        x = x + self.o(out)  # (B, T or n, D)
        return x + feed_forward(x, self.norm2, self.up, "gelu_tanh", self.down, self.recompute)


class Bloom(nn.Module):
    """BLOOM with the head of a task (see `forward` for shapes).

    `head_layers` counts the layers of a head that classifies; `pooling` and `normalize` are for embeddings.
    """

    presets: ClassVar = PRESETS
    # What stands in front of the base model's tensors in a checkpoint with a head.
    base_prefix = "transformer."
    # Methods of training that mean another objective here than for most models.
    objectives: ClassVar[dict[str, str]] = {}
    # Modules that see positions or distances, and no rows.
    position_modules: ClassVar[tuple[str, ...]] = ()
    # What "attention" and "mlp" mean as targets of adapters.
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    # transformers' class for each task, as config.json names it.
    architectures: ClassVar = {
        "causal-lm": "BloomForCausalLM",
        "sequence-classification": "BloomForSequenceClassification",
        "reward": "BloomForSequenceClassification",
        "token-classification": "BloomForTokenClassification",
        "question-answering": "BloomForQuestionAnswering",
        "embedding": "BloomModel",
    }
    # Constants that some checkpoints carry.
    ignored_keys = ("*.self_attention.scale_mask_softmax.causal_mask",)
    # The tasks that a stored head is for; the heads of other tasks are left out.
    head_keys: ClassVar = {
        "lm_head.*": ("causal-lm",),
        "score.*": ("sequence-classification", "reward"),
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
    }
    # What may be stored a second time: of which parameter it must be a copy, and what to say where it isn't.
    tied_keys: ClassVar = {"lm_head.weight": ("embed.tokens.weight", TIED)}
    # Published fields that would change what is computed, and the values for which they don't.
    supported_config_values: ClassVar = {
        "apply_residual_connection_post_layernorm": (False,),
        "is_causal": (True, None),
    }

    def __init__(
        self,
        config: BloomConfig,
        task: str = "causal-lm",
        labels: tuple[str, ...] = (),
        head_layers: int = 1,
        pooling: str = "mean",
        normalize: bool = False,
    ):
        super().__init__()
        if task not in self.architectures:
            raise ValueError(f"task {task!r}: BLOOM can do {', '.join(self.architectures)}")

        self.config = config
        self.task = task
        self.labels = labels
        self.head_layers = head_layers
        self.pooling = pooling
        self.tokens = SpecialTokens()
        self.source: str | None = None  # the folder or hub id that it was loaded from
        self.head_is_new = True  # until a checkpoint fills it

        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = LayerNorm(config.d_model, config.eps)
        self.head = decoder_head(config, task, labels, head_layers, normalize)
        self.tie()

    @classmethod
    def from_name(
        cls, name: str, *, task: str = "causal-lm", labels: tuple[str, ...] = (), **overrides: Any
    ) -> "Bloom":
        """A freshly initialised model of a published size: `Bloom.from_name("bloom-560m", n_layer=2)`.

        `overrides` are fields of `BloomConfig`. ValueError for an unknown name or field.
        """
        settings = overridden(PRESETS, name, overrides, BloomConfig)
        model = cls(BloomConfig(**settings), task, labels)
        model.initialize()
        return model

    def initialize(self) -> None:
        """Fresh weights: N(0, 0.02²), as published configurations say."""
        initialize(self)

    def initialize_head(self) -> None:
        """Fresh weights for a head that a checkpoint may lack."""
        if self.task != "causal-lm" or not self.config.tied:
            initialize(self.head)

    def tie(self) -> None:
        """Make the token embedding the output matrix, where the configuration says so."""
        if isinstance(self.head, Linear) and self.config.tied:
            self.head.weight = self.embed.tokens.get_parameter("weight")

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
        for block in tuple(self.layers)[layer_range]:
            # Below the last layer every position is a key of the next one.
            returned = positions_to_return if block is self.layers[-1] else None
            x = block(x, slopes, bias, cu_seqlens, max_seqlen, cache, returned)

        if cache is not None:
            cache.length += input_ids.shape[1]
        if layer_range.stop is not None:
            return x
        return self.norm(x)

    def pool(
        self,
        states: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What the head reads: every position (B, T, D), or one vector a row (B, D)."""
        if self.task in BY_TEXT:
            return last_unpadded(states, input_ids, self.tokens.skipped_id, attention_mask, cu_seqlens)
        if self.task == "embedding":
            return pool_tokens(self.pooling, states, attention_mask, cu_seqlens)
        return states

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """The output of the task's head; `inputs` are further arguments of `hidden`.

        causal-lm (B, T, V); token-classification (B, T, C); question-answering (B, T, 2); embedding (B, D);
        sequence-classification (B, C) and reward (B,), both read at the last token (`last_unpadded`).
        """
        states = self.hidden(input_ids, attention_mask, **inputs)
        return self.head(self.pool(states, input_ids, attention_mask, inputs.get("cu_seqlens")))

    def key_map(self) -> dict[str, CheckpointKey]:
        """Our parameter names → their names in published checkpoints of this task."""
        base = "" if self.task == "embedding" else self.base_prefix
        table = {"embed.tokens.weight": CheckpointKey((f"{base}word_embeddings.weight",))}
        modules = {"embed.norm": "word_embeddings_layernorm", "norm": "ln_f"}
        for i in range(len(self.layers)):
            modules |= {
                f"layers.{i}.norm1": f"h.{i}.input_layernorm",
                f"layers.{i}.qkv": f"h.{i}.self_attention.query_key_value",
                f"layers.{i}.o": f"h.{i}.self_attention.dense",
                f"layers.{i}.norm2": f"h.{i}.post_attention_layernorm",
                f"layers.{i}.up": f"h.{i}.mlp.dense_h_to_4h",
                f"layers.{i}.down": f"h.{i}.mlp.dense_4h_to_h",
            }

        for ours, theirs in modules.items():
            by_head = (self.config.n_head, 3) if ours.endswith(".qkv") else None
            for tensor in ("weight", "bias"):
                table[f"{ours}.{tensor}"] = CheckpointKey((f"{base}{theirs}.{tensor}",), interleaved=by_head)

        if self.task == "causal-lm" and self.config.tied:
            return table
        return table | head_key_map(self.head, self.task, self.head_keys)

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> BloomConfig:
        """The configuration in a published config.json."""
        return read_config(published)

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return write_config(self.config)

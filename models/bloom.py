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
map and the adapter files sort them. They leave out the tied `lm_head`, come with or without `transformer.` in front,
and spell sizes in two ways (`hidden_size`, `n_embed`; `n_head`, `num_attention_heads`). `pretraining_tp` tells how the
training was spread over GPUs and changes nothing, but with `slow_but_exact`: transformers then leaves two biases out.
`n_inner`, `offset_alibi`, `seq_length` and the names of fused kernels (`masked_softmax_fusion`, …) have no effect there
either. Dropout is not applied; adapters have theirs.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import LayerNorm, Linear, attention, feed_forward, norm_linear
from .layers.config_fields import overridden, own_spelling, read_fields
from .layers.heads import BY_TEXT, EmbeddingHead, MLPHead, last_unpadded, n_outputs, pool_tokens
from .layers.initialization import initialize
from .layers.inputs import ALL, key_bias
from .layers.key_map import TIED, CheckpointKey
from .layers.kv_cache import KVCache
from .tokenizer.special_tokens import SpecialTokens


@dataclass(frozen=True)
class BloomConfig:
    """Sizes in the project's vocabulary; the feed-forward is 4 d_model wide."""

    vocab_size: int = 250880
    n_layer: int = 24
    n_head: int = 16
    d_model: int = 1024
    eps: float = 1e-5
    tied: bool = True
    max_positions: ClassVar[None] = None  # distances have no end

    def __post_init__(self) -> None:
        if self.d_model % self.n_head:
            raise ValueError(f"hidden_size {self.d_model} is not a multiple of n_head {self.n_head}")


PRESETS: dict[str, dict[str, Any]] = {
    "bloom-560m": {},
    "bloom-1b1": {"d_model": 1536},
    "bloom-1b7": {"d_model": 2048},
    "bloom-3b": {"n_layer": 30, "n_head": 32, "d_model": 2560},
    "bloom-7b1": {"n_layer": 30, "n_head": 32, "d_model": 4096},
    "bloom-176b": {"n_layer": 70, "n_head": 112, "d_model": 14336},  # the hub calls it bloom
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "hidden_size": "d_model",
    "layer_norm_epsilon": "eps",
    "tie_word_embeddings": "tied",
}
ALIASES = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
# What transformers takes where config.json is silent, if that is not what BloomConfig takes.
SILENT = {"n_layer": 2, "n_head": 8, "hidden_size": 64}


def alibi_slopes(n_head: int, device: torch.device | None = None) -> Tensor:
    """How steeply the scores of each head fall with the distance, (H,) fp32; see above."""
    power = 2 ** (n_head.bit_length() - 1)
    regular = torch.arange(1, power + 1, device=device) / power
    between = (2 * torch.arange(n_head - power, device=device) + 1) / (2 * power)
    return torch.exp2(-8 * torch.cat((regular, between)))


def mask_bias(attention_mask: Tensor | None, slopes: Tensor) -> Tensor | None:
    """What a mask (B, S) adds to scores with ALiBi by column: which keys may be seen (B, 1, 1, S), or None where all.

    Published models count the real tokens of a row instead of columns. With padding on one side, or on both, the two
    differ by the same number for all real keys of a row; that adds a constant to the scores of a query, and softmax
    doesn't see it. Only where padding stands between real tokens is there something to correct: (B, H, 1, S), float.
    """
    seen = key_bias(attention_mask)
    if seen is None or attention_mask is None:
        return None
    real = attention_mask.long()
    if not bool((real.diff(dim=1).clamp(min=0).sum(1) + real[:, 0] > 1).any()):
        return seen
    shift = real.cumsum(1) - torch.arange(real.shape[1], device=real.device)  # (B, S)
    return (slopes[:, None, None] * shift[:, None, None]).masked_fill(~seen, torch.finfo(slopes.dtype).min)


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
        self.index, self.n_head = index, config.n_head
        self.norm1, self.norm2 = LayerNorm(d, config.eps), LayerNorm(d, config.eps)
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
        read: Tensor | None = None,
    ) -> Tensor:
        qkv = norm_linear(x, self.norm1, self.qkv)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).unbind(2)  # (B, T, H, hd)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        out = attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, bias=bias, alibi=slopes)
        out = out.flatten(2)
        if read is not None:
            x, out = x[:, read], out[:, read]
        x = x + self.o(out)
        return x + feed_forward(x, self.norm2, self.up, "gelu_tanh", self.down, self.recompute)


class Bloom(nn.Module):
    """BLOOM with the head of a task (see `forward` for shapes)."""

    presets: ClassVar = PRESETS
    base_prefix = "transformer."
    # Methods of training that mean another objective here than for most models.
    objectives: ClassVar[dict[str, str]] = {}
    position_modules: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    architectures: ClassVar = {
        "causal-lm": "BloomForCausalLM",
        "sequence-classification": "BloomForSequenceClassification",
        "reward": "BloomForSequenceClassification",
        "token-classification": "BloomForTokenClassification",
        "question-answering": "BloomForQuestionAnswering",
        "embedding": "BloomModel",
    }
    ignored_keys = ("*.self_attention.scale_mask_softmax.causal_mask",)
    head_keys: ClassVar = {
        "lm_head.*": ("causal-lm",),
        "score.*": ("sequence-classification", "reward"),
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
    }
    tied_keys: ClassVar = {"lm_head.weight": ("embed.tokens.weight", TIED)}
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
        self.config, self.task, self.labels, self.head_layers = config, task, labels, head_layers
        self.pooling = pooling
        self.tokens = SpecialTokens()
        self.source: str | None = None  # the folder or hub id that it was loaded from
        self.head_is_new = True  # until a checkpoint fills it
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = LayerNorm(config.d_model, config.eps)
        self.head: nn.Module
        if task == "causal-lm":
            self.head = Linear(config.d_model, config.vocab_size, bias=False)
        elif task == "embedding":
            self.head = EmbeddingHead(normalize)
        else:
            bias = task in ("token-classification", "question-answering")
            width = n_outputs(task, labels)
            self.head = MLPHead(config.d_model, width, head_layers, bias, scalar=task == "reward")
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
        c, like = self.config, self.embed.tokens.weight
        return KVCache(c.n_layer, batch, length, c.n_head, c.d_model // c.n_head, like)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
        entering: Tensor | None = None,
        layers: slice = ALL,
        read: Tensor | None = None,
    ) -> Tensor:
        """States before the head (B, T, D) for token ids (B, T); `attention_mask` is (B, S), S counting the cache.

        Only `layers`, where given, on the states (B, T, D) `entering` them; up to one, the states that enter it.
        Only the states at the positions `read` (n,), where given, (B, n, D): the last layer feeds forward no others.

        BLOOM knows neither token types nor positions: `token_type_ids` and `position_ids` are ignored. Distances count
        the real tokens between two.
        """
        slopes = alibi_slopes(self.config.n_head, input_ids.device)
        bias = mask_bias(attention_mask, slopes)
        x = self.embed(input_ids) if entering is None else entering
        for block in tuple(self.layers)[layers]:
            x = block(x, slopes, bias, cu_seqlens, max_seqlen, cache, read if block is self.layers[-1] else None)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x) if layers.stop is None else x

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
        """causal-lm (B, T, V); token-classification (B, T, C); question-answering (B, T, 2);

        sequence-classification (B, C) and reward (B,), read at the last token (`last_unpadded`); embedding (B, D).
        `inputs`: of `hidden`.
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
            for kind in ("weight", "bias"):
                table[f"{ours}.{kind}"] = CheckpointKey((f"{base}{theirs}.{kind}",), interleaved=by_head)
        if self.task == "causal-lm":
            if not self.config.tied:
                table["head.weight"] = CheckpointKey(("lm_head.weight",))
            return table
        name = {"token-classification": "classifier", "question-answering": "qa_outputs"}.get(self.task, "score")
        for key, _ in self.head.named_parameters():
            table[f"head.{key}"] = CheckpointKey((f"{name}.{key.removeprefix('out.')}",))
        return table

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> BloomConfig:
        """The configuration in a published config.json. ValueError where that can't be, or is contradictory."""
        given = {key: value for key, value in published.items() if value is not None}
        if given.get("slow_but_exact") and given.get("pretraining_tp", 1) != 1:
            raise ValueError(
                f"slow_but_exact = true is not implemented with pretraining_tp = {given['pretraining_tp']!r}: it leaves"
                " biases out; set it to false, as in the published checkpoints"
            )
        given = own_spelling(given, ALIASES)
        return BloomConfig(**read_fields(BloomConfig, {**SILENT, **given}, CONFIG_KEYS))

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        ours = asdict(self.config)
        return {"model_type": "bloom", **{theirs: ours[name] for theirs, name in CONFIG_KEYS.items()}}

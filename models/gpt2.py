"""GPT-2 and GPT-3: pre-norm decoders with learned positions.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Brown et al. 2020, arXiv:2005.14165.

    x₀ = E[token] + P[position]
    x  = x + O attention(QKV norm₁(x))
    x  = x + D gelu(U norm₂(x))            gelu in its tanh form
    logits = E norm(x)                     the output matrix is the token embedding

GPT-3 is the same block; its odd layers attend in a band of `window` positions (Child et al. 2019, arXiv:1904.10509; the
paper says "alternating dense and locally banded", without the width: 256 here, as in GPT-Neo, which follows it).

Published GPT-2 checkpoints store projections as Conv1D, (in, out), so they are transposed on the way; leave out the
tied `lm_head`; come with or without `transformer.` in front; and carry the constants `attn.bias`, `attn.masked_bias`.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import LayerNorm, Linear, attention, feed_forward, norm_linear
from .heads import EmbeddingHead, MLPHead, n_outputs, pool_tokens
from .layers import (
    ALL,
    TIED,
    KVCache,
    Published,
    initialize,
    key_bias,
    overridden,
    own_spelling,
    positions,
    read_fields,
    refuse_longer,
)
from .tokens import SpecialTokens

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


@dataclass(frozen=True)
class GPT2Config:
    """Sizes in the project's vocabulary. `head_width` is d_model / n_head where None; `window` bands the odd layers."""

    vocab_size: int = 50257
    max_positions: int = 1024
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    d_ff: int | None = None
    head_width: int | None = None
    activation: str = "gelu_new"
    eps: float = 1e-5
    tied: bool = True
    scale_attention: bool = True
    scale_by_layer: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation_function {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.head_width is None and self.d_model % self.n_head:
            raise ValueError(f"n_embd {self.d_model} is not a multiple of n_head {self.n_head}")


def _gpt3(n_layer: int, d_model: int, n_head: int, head_width: int) -> dict[str, Any]:
    return {
        "n_layer": n_layer, "d_model": d_model, "n_head": n_head, "head_width": head_width,
        "max_positions": 2048, "window": 256,
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "d_model": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "d_model": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "d_model": 1600},
    # Table 2.1 of the GPT-3 paper, odd rows included: XL has 24 heads of 128 on a width of 2048, 13B a width of 5140.
    "gpt3-small": _gpt3(12, 768, 12, 64),
    "gpt3-medium": _gpt3(24, 1024, 16, 64),
    "gpt3-large": _gpt3(24, 1536, 16, 96),
    "gpt3-xl": _gpt3(24, 2048, 24, 128),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
    "gpt3-13b": _gpt3(40, 5140, 40, 128),
    "gpt3-175b": _gpt3(96, 12288, 96, 128),
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "n_positions": "max_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "d_model",
    "n_inner": "d_ff",
    "head_width": "head_width",
    "activation_function": "activation",
    "layer_norm_epsilon": "eps",
    "tie_word_embeddings": "tied",
    "scale_attn_weights": "scale_attention",
    "scale_attn_by_inverse_layer_idx": "scale_by_layer",
    "local_window": "window",
}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


class Embed(nn.Module):
    """Token and position embedding."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_positions, config.d_model)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm and added to the stream."""

    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.index, self.n_head = index, config.n_head
        self.head_width = config.head_width or config.d_model // config.n_head
        d, inner = config.d_model, self.n_head * self.head_width
        d_ff = config.d_ff or 4 * d
        self.norm1, self.norm2 = LayerNorm(d, config.eps), LayerNorm(d, config.eps)
        self.qkv = Linear(d, 3 * inner)
        self.o = Linear(inner, d)
        self.up = Linear(d, d_ff)
        self.down = Linear(d_ff, d)
        self.activation = ACTIVATIONS[config.activation]
        self.scale = self.head_width**-0.5 if config.scale_attention else 1.0
        if config.scale_by_layer:
            self.scale /= index + 1
        self.window = config.window if index % 2 else None
        self.recompute = False  # see kernels/mlp.py

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: KVCache | None,
        read: Tensor | None = None,
    ) -> Tensor:
        qkv = norm_linear(x, self.norm1, self.qkv)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, self.head_width)).unbind(2)  # (B, T, H, hd)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        out = attention(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, window=self.window, bias=bias, scale=self.scale
        )
        out = out.flatten(2)
        if read is not None:
            x, out = x[:, read], out[:, read]
        x = x + self.o(out)
        return x + feed_forward(x, self.norm2, self.up, self.activation, self.down, self.recompute)


class GPT2(nn.Module):
    """GPT-2 or GPT-3 with the head of a task (see `forward` for shapes)."""

    presets: ClassVar = PRESETS
    base_prefix = "transformer."
    of_positions: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    architectures: ClassVar = {
        "causal-lm": "GPT2LMHeadModel",
        "sequence-classification": "GPT2ForSequenceClassification",
        "reward": "GPT2ForSequenceClassification",
        "token-classification": "GPT2ForTokenClassification",
        "question-answering": "GPT2ForQuestionAnswering",
        "embedding": "GPT2Model",
    }
    ignored = ("*.attn.bias", "*.attn.masked_bias")
    heads: ClassVar = {
        "lm_head.*": ("causal-lm",),
        "score.*": ("sequence-classification", "reward"),
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
    }
    copies: ClassVar = {"lm_head.weight": ("embed.tokens.weight", TIED)}
    required: ClassVar = {"add_cross_attention": (False,), "is_encoder_decoder": (False,), "is_causal": (True, None)}

    def __init__(
        self,
        config: GPT2Config,
        task: str = "causal-lm",
        labels: tuple[str, ...] = (),
        head_layers: int = 1,
        pooling: str = "mean",
        normalize: bool = False,
    ):
        super().__init__()
        if task not in self.architectures:
            raise ValueError(f"task {task!r}: GPT-2 can do {', '.join(self.architectures)}")
        self.config, self.task, self.labels, self.head_layers = config, task, labels, head_layers
        self.pooling = pooling if task == "embedding" else "last"
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
    def from_name(cls, name: str, *, task: str = "causal-lm", labels: tuple[str, ...] = (), **overrides: Any) -> "GPT2":
        """A freshly initialised model of a published size: `GPT2.from_name("gpt2", n_layer=2)`.

        `overrides` are fields of `GPT2Config`. ValueError for an unknown name or field.
        """
        settings = overridden(PRESETS, name, overrides, {field.name for field in fields(GPT2Config)})
        model = cls(GPT2Config(**settings), task, labels)
        model.initialize()
        return model

    def initialize(self) -> None:
        """Fresh weights; projections into the stream are scaled by 1/√(2 n_layer), as the GPT-2 paper says."""
        initialize(self)
        with torch.no_grad():
            for block in self.layers:
                assert isinstance(block, Block)
                for linear in (block.o, block.down):
                    linear.weight.div_((2 * self.config.n_layer) ** 0.5)

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
        return KVCache(c.n_layer, batch, length, c.n_head, c.head_width or c.d_model // c.n_head, like)

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
        """
        past = cache.length if cache is not None else 0
        refuse_longer(input_ids, cu_seqlens, max_seqlen, self.config.max_positions, past)
        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, cu_seqlens, past)
        if entering is None:
            entering = self.embed.tokens(input_ids) + self.embed.positions(position_ids)
            if token_type_ids is not None:
                entering = entering + self.embed.tokens(token_type_ids)
        x = entering
        bias = key_bias(attention_mask)
        for block in tuple(self.layers)[layers]:
            x = block(x, bias, cu_seqlens, max_seqlen, cache, read if block is self.layers[-1] else None)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x) if layers.stop is None else x

    def pool(self, states: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """What the head reads: every position (B, T, D), or one vector a row (B, D)."""
        if self.task in ("sequence-classification", "reward", "embedding"):
            return pool_tokens(self.pooling, states, attention_mask, cu_seqlens)
        return states

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """causal-lm (B, T, V); token-classification (B, T, C); question-answering (B, T, 2);

        sequence-classification (B, C) and reward (B,), read at the last token; embedding (B, D). `inputs`: of `hidden`.
        """
        states = self.hidden(input_ids, attention_mask, **inputs)
        return self.head(self.pool(states, attention_mask, inputs.get("cu_seqlens")))

    def key_map(self) -> dict[str, Published]:
        """Our parameter names → their names in published checkpoints of this task."""
        base = "" if self.task == "embedding" else self.base_prefix
        table = {
            "embed.tokens.weight": Published((f"{base}wte.weight",)),
            "embed.positions.weight": Published((f"{base}wpe.weight",)),
            "norm.weight": Published((f"{base}ln_f.weight",)),
            "norm.bias": Published((f"{base}ln_f.bias",)),
        }
        modules = {
            "norm1": "ln_1",
            "qkv": "attn.c_attn",
            "o": "attn.c_proj",
            "norm2": "ln_2",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        }
        for i in range(len(self.layers)):
            for ours, theirs in modules.items():
                conv = not ours.startswith("norm")
                table[f"layers.{i}.{ours}.weight"] = Published((f"{base}h.{i}.{theirs}.weight",), transposed=conv)
                table[f"layers.{i}.{ours}.bias"] = Published((f"{base}h.{i}.{theirs}.bias",))
        if self.task == "causal-lm":
            if not self.config.tied:
                table["head.weight"] = Published(("lm_head.weight",))
            return table
        name = {"token-classification": "classifier", "question-answering": "qa_outputs"}.get(self.task, "score")
        for key, _ in self.head.named_parameters():
            table[f"head.{key}"] = Published((f"{name}.{key.removeprefix('out.')}",))
        return table

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> GPT2Config:
        """The configuration in a published config.json."""
        return GPT2Config(**read_fields(GPT2Config, own_spelling(published, ALIASES), CONFIG_KEYS))

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it. A banded model is "gpt3", which transformers refuses to mistake."""
        ours = asdict(self.config)
        out = {theirs: ours[name] for theirs, name in CONFIG_KEYS.items() if name not in ("window", "head_width")}
        extra = {"local_window": ours["window"], "head_width": ours["head_width"]}
        if any(extra.values()):
            return {"model_type": "gpt3", **out, **extra}
        return {"model_type": "gpt2", **out}

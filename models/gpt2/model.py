"""GPT-2 and GPT-3: pre-norm decoders with learned positions.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Brown et al. 2020, arXiv:2005.14165.

    x₀ = E[token] + P[position]
    x  = x + O attention(QKV norm₁(x))
    x  = x + D gelu(U norm₂(x))            gelu in its tanh form
    logits = E norm(x)                     the output matrix is the token embedding

GPT-3 is the same block; its odd layers attend in a band of `window` positions.

Published GPT-2 checkpoints store projections as Conv1D, (in, out), so they are transposed on the way; leave out the
tied `lm_head`; come with or without `transformer.` in front; and carry the constants `attn.bias`, `attn.masked_bias`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, attention, feed_forward, norm_linear
from ..layers.config_fields import ACTIVATIONS, overridden
from ..layers.heads import BY_TEXT, EmbeddingHead, MLPHead, last_unpadded, n_outputs, pool_tokens
from ..layers.initialization import initialize
from ..layers.inputs import ALL, check_length, key_bias, positions
from ..layers.key_map import TIED, CheckpointKey
from ..layers.kv_cache import KVCache
from ..tokenizer.special_tokens import SpecialTokens
from .config import PRESETS, GPT2Config, read_config, write_config


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
    # Methods of training that mean another objective here than for most models.
    objectives: ClassVar[dict[str, str]] = {}
    position_modules: ClassVar[tuple[str, ...]] = ()
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
    ignored_keys = ("*.attn.bias", "*.attn.masked_bias")
    head_keys: ClassVar = {
        "lm_head.*": ("causal-lm",),
        "score.*": ("sequence-classification", "reward"),
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
    }
    tied_keys: ClassVar = {"lm_head.weight": ("embed.tokens.weight", TIED)}
    supported_config_values: ClassVar = {
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "is_causal": (True, None),
    }

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
    def from_name(cls, name: str, *, task: str = "causal-lm", labels: tuple[str, ...] = (), **overrides: Any) -> "GPT2":
        """A freshly initialised model of a published size: `GPT2.from_name("gpt2", n_layer=2)`.

        `overrides` are fields of `GPT2Config`. ValueError for an unknown name or field.
        """
        settings = overridden(PRESETS, name, overrides, GPT2Config)
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
        check_length(input_ids, cu_seqlens, max_seqlen, self.config.max_positions, past)
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
        table = {
            "embed.tokens.weight": CheckpointKey((f"{base}wte.weight",)),
            "embed.positions.weight": CheckpointKey((f"{base}wpe.weight",)),
            "norm.weight": CheckpointKey((f"{base}ln_f.weight",)),
            "norm.bias": CheckpointKey((f"{base}ln_f.bias",)),
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
                table[f"layers.{i}.{ours}.weight"] = CheckpointKey((f"{base}h.{i}.{theirs}.weight",), transposed=conv)
                table[f"layers.{i}.{ours}.bias"] = CheckpointKey((f"{base}h.{i}.{theirs}.bias",))
        if self.task == "causal-lm":
            if not self.config.tied:
                table["head.weight"] = CheckpointKey(("lm_head.weight",))
            return table
        name = {"token-classification": "classifier", "question-answering": "qa_outputs"}.get(self.task, "score")
        for key, _ in self.head.named_parameters():
            table[f"head.{key}"] = CheckpointKey((f"{name}.{key.removeprefix('out.')}",))
        return table

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> GPT2Config:
        """The configuration in a published config.json."""
        return read_config(published)

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return write_config(self.config)

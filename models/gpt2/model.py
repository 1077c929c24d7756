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

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, attention, feed_forward, norm_linear
from ..layers.config_fields import ACTIVATIONS, overridden
from ..layers.heads import BY_TEXT, decoder_head, last_unpadded, pool_tokens
from ..layers.initialization import initialize
from ..layers.inputs import ALL_LAYERS, check_length, key_bias, positions
from ..layers.key_map import TIED, CheckpointKey, head_key_map
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

        # Some checkpoints leave the division of the scores by √hd out, or divide by the depth, too.
        self.scale = 1.0
        if config.scale_attention:
            self.scale = self.head_width**-0.5
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
        positions_to_return: Tensor | None = None,
    ) -> Tensor:
        """The stream x (B, T, D) after this layer; `bias` as `attention` takes it."""
        qkv = norm_linear(x, self.norm1, self.qkv)  # (B, T, 3·H·hd)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, self.head_width)).unbind(2)  # (B, T, H, hd) each
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, S, H, hd) each

        out = attention(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, window=self.window, bias=bias, scale=self.scale
        )
        out = out.flatten(2)  # (B, T, H·hd)

        # Every position was a key, but nobody reads what becomes of most of them behind the last layer.
        if positions_to_return is not None:
            x = x[:, positions_to_return]  # (B, n, D)
            out = out[:, positions_to_return]  # (B, n, H·hd)

        x = x + self.o(out)  # (B, T or n, D)
        return x + feed_forward(x, self.norm2, self.up, self.activation, self.down, self.recompute)


class GPT2(nn.Module):
    """GPT-2 or GPT-3 with the head of a task (see `forward` for shapes).

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
        "causal-lm": "GPT2LMHeadModel",
        "sequence-classification": "GPT2ForSequenceClassification",
        "reward": "GPT2ForSequenceClassification",
        "token-classification": "GPT2ForTokenClassification",
        "question-answering": "GPT2ForQuestionAnswering",
        "embedding": "GPT2Model",
    }
    # Constants that some checkpoints carry.
    ignored_keys = ("*.attn.bias", "*.attn.masked_bias")
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
        c = self.config
        return KVCache(c.n_layer, batch, length, c.n_head, c.width, self.embed.tokens.weight)

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
        """
        past = cache.length if cache is not None else 0
        check_length(input_ids, cu_seqlens, max_seqlen, self.config.max_positions, past)

        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, cu_seqlens, past)  # (B or 1, T)

        x = hidden_states
        if x is None:
            x = self.embed.tokens(input_ids) + self.embed.positions(position_ids)  # (B, T, D)
            if token_type_ids is not None:  # which GPT-2 looks up among the tokens
                x = x + self.embed.tokens(token_type_ids)

        bias = key_bias(attention_mask)  # (B, 1, 1, S) or None
        for block in tuple(self.layers)[layer_range]:
            # Below the last layer every position is a key of the next one.
            returned = positions_to_return if block is self.layers[-1] else None
            x = block(x, bias, cu_seqlens, max_seqlen, cache, returned)

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
                conv1d = not ours.startswith("norm")
                table[f"layers.{i}.{ours}.weight"] = CheckpointKey((f"{base}h.{i}.{theirs}.weight",), transposed=conv1d)
                table[f"layers.{i}.{ours}.bias"] = CheckpointKey((f"{base}h.{i}.{theirs}.bias",))

        if self.task == "causal-lm" and self.config.tied:
            return table
        return table | head_key_map(self.head, self.task, self.head_keys)

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> GPT2Config:
        """The configuration in a published config.json."""
        return read_config(published)

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return write_config(self.config)

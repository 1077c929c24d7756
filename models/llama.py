"""Llama: pre-norm decoders with rotary positions, grouped key/value heads and a gated feed-forward.

Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Llama Team 2024, arXiv:2407.21783. Norms are RMSNorm.

    x₀ = E[token]
    q, k, v = QKV norm₁(x),  q and k turned by their positions
    x  = x + O attention(q, k, v)          H query heads share K key/value heads
    x  = x + D (silu(G norm₂(x)) ⊙ U norm₂(x))
    logits = H norm(x)                     H is E in the tied ones

q, k, v are one product here, and so are gate and up; published checkpoints store them one by one. The order of the
entries in a head is that of the Hugging Face layout: a pair that turns together lies hd/2 apart.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..kernels import Linear, RMSNorm, attention, feed_forward, norm_linear, rope
from .heads import EmbeddingHead, MLPHead, n_outputs, pool_tokens
from .layers import KVCache, Published, initialize, key_bias, overridden, positions, read_fields, refuse_longer
from .rope import Rope, read_rope, write_rope
from .tokens import SpecialTokens


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes in the project's vocabulary. `n_kv_head` is n_head and `head_width` d_model / n_head where None."""

    vocab_size: int = 32000
    max_positions: int = 2048
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None
    d_model: int = 4096
    d_ff: int = 11008
    head_width: int | None = None
    eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.head_width is None and self.d_model % self.n_head:
            raise ValueError(f"hidden_size {self.d_model} is not a multiple of num_attention_heads {self.n_head}")
        if (width := self.head_width or self.d_model // self.n_head) % 2:
            raise ValueError(f"head_dim {width} is odd, but rotary positions turn pairs of entries")
        if self.n_head % (self.n_kv_head or self.n_head):
            raise ValueError(
                f"num_attention_heads {self.n_head} is not a multiple of num_key_value_heads {self.n_kv_head}"
            )


def _smol(n_layer: int, d_model: int, n_head: int, n_kv_head: int, d_ff: int) -> dict[str, Any]:
    return {
        "vocab_size": 49152, "max_positions": 8192, "n_layer": n_layer, "n_head": n_head, "n_kv_head": n_kv_head,
        "d_model": d_model, "d_ff": d_ff, "eps": 1e-5, "rope": Rope(100000.0), "tied": True,
    }  # fmt: skip


def _llama3(n_layer: int, d_model: int, n_head: int, d_ff: int, factor: float, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": 128256, "max_positions": 131072, "n_layer": n_layer, "n_head": n_head, "n_kv_head": 8,
        "d_model": d_model, "d_ff": d_ff, "eps": 1e-5, "rope": Rope(500000.0, factor), "tied": tied,
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _smol(30, 576, 9, 3, 1536),
    "SmolLM2-360M": _smol(32, 960, 15, 5, 2560),
    "SmolLM2-1.7B": {**_smol(24, 2048, 32, 32, 8192), "rope": Rope(130000.0)},
    "TinyLlama-1.1B": {"n_layer": 22, "n_kv_head": 4, "d_model": 2048, "d_ff": 5632, "eps": 1e-5},
    "Llama-2-7B": {"max_positions": 4096, "eps": 1e-5},
    "Llama-3.2-1B": _llama3(16, 2048, 32, 8192, 32.0, True),
    "Llama-3.2-3B": _llama3(28, 3072, 24, 8192, 32.0, True),
    "Llama-3.1-8B": _llama3(32, 4096, 32, 14336, 8.0, False),
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "head_dim": "head_width",
    "rms_norm_eps": "eps",
    "tie_word_embeddings": "tied",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}


class Embed(nn.Module):
    """Token embedding."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm and added to the stream."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        d, f, hd = config.d_model, config.d_ff, config.head_width or config.d_model // config.n_head
        self.index, self.head_width = index, hd
        self.heads = (config.n_head, config.n_kv_head or config.n_head, config.n_kv_head or config.n_head)
        q, k, v = (h * hd for h in self.heads)
        self.norm1, self.norm2 = RMSNorm(d, config.eps), RMSNorm(d, config.eps)
        self.qkv = Linear(d, q + k + v, config.attention_bias, parts=(("q_proj", q), ("k_proj", k), ("v_proj", v)))
        self.o = Linear(q, d, config.attention_bias)
        self.gate_up = Linear(d, 2 * f, config.mlp_bias, parts=(("gate_proj", f), ("up_proj", f)))
        self.down = Linear(f, d, config.mlp_bias)
        self.recompute = False  # see kernels/mlp.py

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: KVCache | None,
    ) -> Tensor:
        qkv = norm_linear(x, self.norm1, self.qkv).unflatten(-1, (-1, self.head_width))  # (B, T, H + 2K, hd)
        q, k, v = qkv.split(self.heads, dim=2)
        q, k = rope(q, k, *tables)
        v = v.contiguous()  # or attention, which keeps v, would keep the q and k from before the rotation with it
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        out = attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, bias=bias)
        x = x + self.o(out.flatten(2))
        return x + feed_forward(x, self.norm2, self.gate_up, "swiglu", self.down, self.recompute)


class Llama(nn.Module):
    """Llama with the head of a task (see `forward` for shapes)."""

    presets: ClassVar = PRESETS
    base_prefix = ("model.", "transformer.")  # the second is transformers' under question answering
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.gate_up", "layers.*.down"),
    }
    architectures: ClassVar = {
        "causal-lm": "LlamaForCausalLM",
        "sequence-classification": "LlamaForSequenceClassification",
        "reward": "LlamaForSequenceClassification",
        "token-classification": "LlamaForTokenClassification",
        "question-answering": "LlamaForQuestionAnswering",
        "embedding": "LlamaModel",
    }
    ignored = ("*rotary_emb.inv_freq",)
    other_heads = ("lm_head.*", "score.*", "qa_outputs.*")
    required: ClassVar = {"hidden_act": ("silu",), "pretraining_tp": (1,)}

    def __init__(
        self,
        config: LlamaConfig,
        task: str = "causal-lm",
        labels: tuple[str, ...] = (),
        head_layers: int = 1,
        pooling: str = "mean",
        normalize: bool = False,
    ):
        super().__init__()
        if task not in self.architectures:
            raise ValueError(f"task {task!r}: Llama can do {', '.join(self.architectures)}")
        self.config, self.task, self.labels, self.head_layers = config, task, labels, head_layers
        self.pooling = pooling if task == "embedding" else "last"
        self.tokens = SpecialTokens()
        self.head_is_new = True  # until a checkpoint fills it
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.eps)
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
    ) -> "Llama":
        """A freshly initialised model of a published size: `Llama.from_name("Llama-3.2-1B", n_layer=2)`.

        `overrides` are fields of `LlamaConfig`. ValueError for an unknown name or field.
        """
        settings = overridden(PRESETS, name, overrides, {field.name for field in fields(LlamaConfig)})
        model = cls(LlamaConfig(**settings), task, labels)
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
        width = c.head_width or c.d_model // c.n_head
        return KVCache(c.n_layer, batch, length, c.n_kv_head or c.n_head, width, like)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """States before the head (B, T, D) for token ids (B, T); `attention_mask` is (B, S), S counting the cache.

        Llama knows no token types: `token_type_ids` are ignored. No table ends at `max_positions`, so that longer rows,
        or packed segments, would give states without meaning: they are refused (ValueError).
        """
        past = cache.length if cache is not None else 0
        refuse_longer(input_ids, cu_seqlens, max_seqlen, self.config.max_positions, past)
        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, cu_seqlens, past)
        width = self.config.head_width or self.config.d_model // self.config.n_head
        x, bias = self.embed(input_ids), key_bias(attention_mask)
        tables = self.config.rope.tables(position_ids, width)
        for block in self.layers:
            x = block(x, tables, bias, cu_seqlens, max_seqlen, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)

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
        base = {"embedding": "", "question-answering": self.base_prefix[1]}.get(self.task, self.base_prefix[0])
        table = {
            "embed.tokens.weight": Published((f"{base}embed_tokens.weight",)),
            "norm.weight": Published((f"{base}norm.weight",)),
        }
        for i in range(len(self.layers)):
            layer = f"{base}layers.{i}"
            table[f"layers.{i}.norm1.weight"] = Published((f"{layer}.input_layernorm.weight",))
            table[f"layers.{i}.norm2.weight"] = Published((f"{layer}.post_attention_layernorm.weight",))
            for kind in ("weight", "bias"):
                for ours, theirs, linear in self._projections(i):
                    if kind == "weight" or linear.bias is not None:
                        rows = tuple(part.size for part in linear.parts) if len(theirs) > 1 else ()
                        names = tuple(f"{layer}.{name}.{kind}" for name in theirs)
                        table[f"layers.{i}.{ours}.{kind}"] = Published(names, rows)
        if self.task == "causal-lm":
            if not self.config.tied:
                table["head.weight"] = Published(("lm_head.weight",))
            return table
        name = "qa_outputs" if self.task == "question-answering" else "score"
        for key, _ in self.head.named_parameters():
            table[f"head.{key}"] = Published((f"{name}.{key.removeprefix('out.')}",))
        return table

    def _projections(self, index: int) -> list[tuple[str, tuple[str, ...], Linear]]:
        """Our name, the published modules and the module of each projection of a block."""
        block: Any = self.layers[index]
        return [
            ("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), block.qkv),
            ("o", ("self_attn.o_proj",), block.o),
            ("gate_up", ("mlp.gate_proj", "mlp.up_proj"), block.gate_up),
            ("down", ("mlp.down_proj",), block.down),
        ]

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> LlamaConfig:
        """The configuration in a published config.json."""
        given = {key: value for key, value in published.items() if value is not None}
        return LlamaConfig(**read_fields(LlamaConfig, given, CONFIG_KEYS), rope=read_rope(published))

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        ours = asdict(self.config)
        out = {theirs: ours[name] for theirs, name in CONFIG_KEYS.items() if ours[name] is not None}
        return {"model_type": "llama", **out, "hidden_act": "silu", **write_rope(self.config.rope)}

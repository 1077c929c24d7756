"""T5, T5 1.1 and Flan-T5: an encoder and a decoder, pre-norm, with relative positions. Norms are RMSNorm; no biases.

Raffel et al. 2020, arXiv:1910.10683; 1.1's gated feed-forward: Shazeer 2020, arXiv:2002.05202; Chung et al. 2022,
arXiv:2210.11416.

    x = E[token]                                       one embedding for source and target
    x = x + O attention(QKV norm₁(x) + positions)      q · k is not divided by √hd
    x = x + O attention(Q norm(x), KV encoded source)  in the decoder
    x = x + D relu(U norm₂(x))                         1.1: D (gelu(G h) ⊙ U h), h = norm₂(x)
    logits = H norm(x)

The position bias (`relative.py`) is one table a stack, shared by its blocks. Blocks are `encoder.layers.N` and
`decoder.layers.N`; the glob `*layers.N.*` means both.

Published checkpoints need care in two places. The head is the embedding if and only if `lm_head.weight` is missing:
`tie_word_embeddings` doesn't say, because transformers 5 always writes it as true. And a head that is an embedding
wants smaller states: they are multiplied by d_model^-½ if `scale_decoder_outputs` says so; where that is absent, unless
`tie_word_embeddings` is false. The two are independent. Published too, and unused: an EncDecAttention bias table in
decoder block 0. In float16 T5's feed-forwards overflow: it is refused; bfloat16 and float32 are fine.

The bias depends on row and column, so that rows can't be laid end to end (`attention` takes no bias with segments):
packed rows are accepted, but computed padded. Dropout, which T5 was trained with, is not applied; adapters have theirs.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import Linear
from .heads import EmbeddingHead, MLPHead, n_outputs, pool_tokens
from .layers import KVCache, Published, initialize, overridden, read_fields, unpacked
from .t5_blocks import FEED_FORWARDS, Block, Cache, Embed, Stack, shifted
from .tokens import SpecialTokens


@dataclass(frozen=True)
class T5Config:
    """Sizes in the project's vocabulary. `n_decoder_layer` is n_layer where None; `start_id` begins every target.

    `tied`: the head is the embedding. `scaled`: states are multiplied by d_model^-½ before the head.
    """

    vocab_size: int = 32128
    n_layer: int = 6
    n_decoder_layer: int | None = None
    n_head: int = 8
    head_width: int = 64
    d_model: int = 512
    d_ff: int = 2048
    feed_forward: str = "relu"
    n_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    start_id: int = 0
    tied: bool = True
    scaled: bool = True

    max_positions: ClassVar[None] = None  # relative positions have no end

    def __post_init__(self) -> None:
        if self.feed_forward not in FEED_FORWARDS:
            known = ", ".join(FEED_FORWARDS)
            raise ValueError(f"feed_forward_proj = {self.feed_forward!r} is not implemented; known: {known}")
        if self.n_buckets < 4 or self.max_distance <= self.n_buckets // 2:
            raise ValueError(
                f"relative_attention_num_buckets {self.n_buckets} and relative_attention_max_distance "
                f"{self.max_distance}: expected at least 4 buckets, and a distance greater than half of them"
            )
        if not 0 <= self.start_id < self.vocab_size:
            raise ValueError(f"decoder_start_token_id = {self.start_id}: expected one of {self.vocab_size} tokens")


def _t5(n_layer: int, d_model: int, d_ff: int, n_head: int, head_width: int = 64) -> dict[str, Any]:
    return {"n_layer": n_layer, "d_model": d_model, "d_ff": d_ff, "n_head": n_head, "head_width": head_width}


_1_1 = {"feed_forward": "gated-gelu", "tied": False, "scaled": False}
_SIZES_1_1 = {
    "small": {**_t5(8, 512, 1024, 6), **_1_1},
    "base": {**_t5(12, 768, 2048, 12), **_1_1},
    "large": {**_t5(24, 1024, 2816, 16), **_1_1},
    "xl": {**_t5(24, 2048, 5120, 32), **_1_1},
    "xxl": {**_t5(24, 4096, 10240, 64), **_1_1},
}

PRESETS: dict[str, dict[str, Any]] = {
    "t5-small": {},
    "t5-base": _t5(12, 768, 3072, 12),
    "t5-large": _t5(24, 1024, 4096, 16),
    "t5-3b": _t5(24, 1024, 16384, 32, 128),
    "t5-11b": _t5(24, 1024, 65536, 128, 128),
    **{f"t5-v1_1-{size}": sizes for size, sizes in _SIZES_1_1.items()},
    **{f"flan-t5-{size}": sizes for size, sizes in _SIZES_1_1.items()},
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "n_layer",
    "num_decoder_layers": "n_decoder_layer",
    "num_heads": "n_head",
    "d_kv": "head_width",
    "d_model": "d_model",
    "d_ff": "d_ff",
    "feed_forward_proj": "feed_forward",
    "relative_attention_num_buckets": "n_buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "eps",
}


class T5(nn.Module):
    """T5 with the head of a task (see `forward` for shapes).

    Tagging and embedding read the encoder. Classification and question answering read the decoder, which is then given
    the source itself, shifted by one.
    """

    presets: ClassVar = PRESETS
    base_prefix = "transformer."
    objectives: ClassVar = {"sft": "seq2seq", "pretrain": "span-corruption"}
    # An encoder alone has no cross_q, cross_kv and cross_o, so that no glob may be for them only.
    lora_targets: ClassVar = {
        "attention": ("*.layers.*.*[qv]", "*.layers.*.*o"),
        "mlp": ("*.layers.*.*up", "*.layers.*.down"),
    }
    architectures: ClassVar = {
        "seq2seq-lm": "T5ForConditionalGeneration",
        "sequence-classification": "T5ForSequenceClassification",
        "reward": "T5ForSequenceClassification",
        "token-classification": "T5ForTokenClassification",
        "question-answering": "T5ForQuestionAnswering",
        "embedding": "T5EncoderModel",
    }
    ignored = ("*coder.embed_tokens.weight", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
    other_heads: tuple[str, ...] = ("lm_head.*", "classification_head.*", "classifier.*", "qa_outputs.*")
    required: ClassVar = {"is_decoder": (False,)}

    def __init__(
        self,
        config: T5Config,
        task: str = "seq2seq-lm",
        labels: tuple[str, ...] = (),
        head_layers: int = 1,
        pooling: str = "mean",
        normalize: bool = False,
    ):
        super().__init__()
        if task not in self.architectures:
            raise ValueError(f"task {task!r}: T5 can do {', '.join(self.architectures)}")
        self.config, self.task, self.labels, self.head_layers = config, task, labels, head_layers
        self.pooling = pooling if task == "embedding" else "last"
        self.tokens = SpecialTokens()
        self.head_is_new = True  # until a checkpoint fills it
        self.embed = Embed(config)
        self.encoder = Stack(config, config.n_layer, decoder=False)
        self.decoder: Stack | None = None
        if task not in ("embedding", "token-classification"):
            self.decoder = Stack(config, config.n_decoder_layer or config.n_layer, decoder=True)
        else:
            self.other_heads = (*self.other_heads, "decoder.*")
        self.head: nn.Module
        if task == "seq2seq-lm":
            self.head = Linear(config.d_model, config.vocab_size, bias=False)
        elif task == "embedding":
            self.head = EmbeddingHead(normalize)
        else:
            pooler = task in ("sequence-classification", "reward")
            width = n_outputs(task, labels)
            self.head = MLPHead(config.d_model, width, head_layers, pooler=pooler, scalar=task == "reward")
        self.tie()

    @classmethod
    def from_name(cls, name: str, *, task: str = "seq2seq-lm", labels: tuple[str, ...] = (), **overrides: Any) -> "T5":
        """A freshly initialised model of a published size: `T5.from_name("flan-t5-small", n_layer=2)`.

        `overrides` are fields of `T5Config`. ValueError for an unknown name or field.
        """
        settings = overridden(PRESETS, name, overrides, {field.name for field in fields(T5Config)})
        model = cls(T5Config(**settings), task, labels)
        model.initialize()
        return model

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights as Mesh TensorFlow draws them: N(0, 1 / inputs); q is divided by √hd, as attention here isn't.

        An embedding is N(0, 1), unless it is a head whose states are not scaled; a head of its own and the position
        bias are N(0, 1/D).
        """
        c, inner = self.config, self.config.n_head * self.config.head_width
        initialize(self, c.d_model**-0.5)
        if c.scaled or not c.tied:
            self.embed.tokens.weight.normal_()
        for block in self.layers:
            for q, o in block.attentions():
                q.weight[:inner].div_(c.head_width**0.5)
                o.weight.normal_(0.0, inner**-0.5)
            block.down.weight.normal_(0.0, c.d_ff**-0.5)

    def initialize_head(self) -> None:
        """Fresh weights for a head that a checkpoint may lack."""
        if self.task != "seq2seq-lm" or not self.config.tied:
            initialize(self.head, self.config.d_model**-0.5)

    def tie(self) -> None:
        """Make the token embedding the output matrix, where the checkpoint has no other."""
        if isinstance(self.head, Linear) and self.config.tied:
            self.head.weight = self.embed.tokens.get_parameter("weight")

    @property
    def layers(self) -> list[Block]:
        """All blocks, the encoder's first."""
        stacks = [self.encoder] if self.decoder is None else [self.encoder, self.decoder]
        return [block for stack in stacks for block in stack.layers if isinstance(block, Block)]

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of up to `length` target positions."""
        c, like = self.config, self.embed.tokens.weight
        return Cache(KVCache(c.n_decoder_layer or c.n_layer, batch, length, c.n_head, c.head_width, like))

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The encoder's states (B, S, D) for token ids and mask (B, S), padded on either side."""
        if self.embed.tokens.weight.dtype == torch.float16:
            raise ValueError('T5 overflows in float16; load it with dtype="bfloat16" or "float32" (model.dtype)')
        return self.encoder(self.embed.tokens(input_ids), attention_mask)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """States before the head (B, T, D): the decoder's for `decoder_input_ids` (B, T), or the encoder's (B, S, D).

        `input_ids` and `attention_mask` (B, S) are the source, which is encoded unless the `cache` has it already.
        `decoder_attention_mask` is (B, T), with a cache (B, past + T), and needed for left-padded targets only. Token
        types and position ids are ignored: T5 knows no types, and distances need no numbers.

        Raises ValueError where a language model gets no `decoder_input_ids`, or packed ones.
        """
        if cu_seqlens is not None:
            if decoder_input_ids is not None:
                raise ValueError("cu_seqlens: source and target in packed rows are not implemented; pad them")
            ids, mask, place = unpacked(input_ids, cu_seqlens, max_seqlen)
            return self.hidden(ids, mask).flatten(0, 1)[place][None]
        known = cache is not None and len(cache.source) > 0
        source = None if known else self.encode(input_ids, attention_mask)
        if self.decoder is None:
            assert source is not None  # an encoder has no cache
            return source
        if decoder_input_ids is None:
            if self.task == "seq2seq-lm":
                raise ValueError("decoder_input_ids: a seq2seq-lm needs them, the target behind the start token")
            decoder_input_ids = shifted(input_ids, attention_mask, self.config.start_id)
            decoder_attention_mask = attention_mask
        x = self.embed.tokens(decoder_input_ids)
        x = self.decoder(x, decoder_attention_mask, source, attention_mask, cache)
        return x * self.config.d_model**-0.5 if self.task == "seq2seq-lm" and self.config.scaled else x

    def pool(self, states: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """What the head reads: every position (B, T, D), or one vector a row (B, D)."""
        if self.task in ("sequence-classification", "reward", "embedding"):
            return pool_tokens(self.pooling, states, attention_mask, cu_seqlens)
        return states

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """seq2seq-lm (B, T, V) over `decoder_input_ids`; token-classification (B, S, C); question-answering (B, S, 2);

        sequence-classification (B, C) and reward (B,), read at the last token; embedding (B, D). `inputs`: of `hidden`.
        """
        states = self.hidden(input_ids, attention_mask, **inputs)
        return self.head(self.pool(states, attention_mask, inputs.get("cu_seqlens")))

    def key_map(self) -> dict[str, Published]:
        """Our parameter names → their names in published checkpoints of this task."""
        nested = ("sequence-classification", "reward", "token-classification")
        base = self.base_prefix if self.task in nested else ""
        table = {"embed.tokens.weight": Published((f"{base}shared.weight",))}
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            if stack is not None:
                table |= {f"{name}.{key}": published for key, published in stack.key_map(base + name).items()}
        if self.task == "seq2seq-lm":
            if not self.config.tied:
                table["head.weight"] = Published(("lm_head.weight",))
            return table
        plain = {"token-classification": "classifier", "question-answering": "qa_outputs"}
        for key, _ in self.head.named_parameters():
            if self.task in plain:
                theirs = f"{plain[self.task]}.{key.removeprefix('out.')}"
            else:
                theirs = f"classification_head.{key}".replace(".out.", ".out_proj.").replace(".pooler.", ".dense.")
            table[f"head.{key}"] = Published((theirs,))
        return table

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> T5Config:
        """The configuration in a published config.json, to which `load` adds `own_head`: is there an lm_head.weight."""
        given = {key: value for key, value in published.items() if value is not None}
        found = read_fields(T5Config, given, CONFIG_KEYS)
        scaled = bool(given.get("scale_decoder_outputs", given.get("tie_word_embeddings") is not False))
        start = given.get("decoder_start_token_id", given.get("pad_token_id", 0))
        config = T5Config(**found, tied=not given.get("own_head", False), scaled=scaled, start_id=start)
        for field, expected in _derived(config).items():
            if field in given and given[field] != expected:
                raise ValueError(f"{field} = {given[field]!r} contradicts feed_forward_proj = {config.feed_forward!r}")
        return config

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it; version 4 reads the scale from `tie_word_embeddings`."""
        ours = asdict(self.config)
        out = {theirs: ours[name] for theirs, name in CONFIG_KEYS.items() if ours[name] is not None}
        return {
            "model_type": "t5",
            **out,
            **_derived(self.config),
            "is_encoder_decoder": self.decoder is not None,
            "decoder_start_token_id": self.config.start_id,
            "tie_word_embeddings": self.config.tied,
            "scale_decoder_outputs": self.config.scaled,
        }


def _derived(config: T5Config) -> dict[str, Any]:
    """The fields that transformers writes beside feed_forward_proj, and that follow from it."""
    gate, _, name = config.feed_forward.rpartition("-")
    return {"is_gated_act": bool(gate), "dense_act_fn": "gelu_new" if gate and name == "gelu" else name}

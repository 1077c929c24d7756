"""T5, T5 1.1 and Flan-T5: an encoder and a decoder, pre-norm, with relative positions. Norms are RMSNorm; no biases.

Raffel et al. 2020, arXiv:1910.10683; 1.1's gated feed-forward: Shazeer 2020, arXiv:2002.05202; Chung et al. 2022,
arXiv:2210.11416.

    x = E[token]                                       one embedding for source and target
    x = x + O attention(QKV norm₁(x) + positions)      q · k is not divided by √hd
    x = x + O attention(Q norm(x), KV encoded source)  in the decoder
    x = x + D relu(U norm₂(x))                         1.1: D (gelu(G h) ⊙ U h), h = norm₂(x)
    logits = H norm(x)

Shapes: B rows, S source tokens, T target tokens, D = d_model, V = vocab_size, C labels.

The position bias (`relative_positions.py`) is one table for each stack, shared by its blocks. Blocks are named
`encoder.layers.N` and `decoder.layers.N`; the glob `*layers.N.*` means both.

How a published checkpoint tells whether the head is the embedding, and whether its states are scaled, is explained in
`config.py`. Checkpoints also hold an EncDecAttention bias table in decoder block 0, which nothing uses. In float16 the
feed-forwards of T5 overflow, so that it is refused; bfloat16 and float32 are fine.

The bias depends on row and column, so that rows can't be laid end to end (`attention` takes no bias with segments):
packed rows are accepted, but computed padded.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers.heads import TEXT_TASKS, last_position
from ..layers.initialization import initialize
from ..layers.inputs import unpacked
from ..layers.key_map import CheckpointKey
from ..layers.kv_cache import KVCache
from ..model import PretrainedModel
from .blocks import Block, Cache, Embed, Stack, shift_right
from .config import PRESETS, T5Config


def stack_keys(stack: str, last: int) -> dict[str, str | CheckpointKey]:
    """The modules of the encoder or decoder → the published ones; `last` is the number of a block's last sublayer."""
    ours = f"{stack}.layers.{{i}}"
    layer = f"{stack}.block.{{i}}.layer"
    attention = f"{layer}.0.SelfAttention"
    cross = f"{layer}.1.EncDecAttention"  # in the decoder alone
    dense = f"{layer}.{last}.DenseReluDense"
    return {
        f"{ours}.norm1": f"{layer}.0.layer_norm",
        f"{ours}.qkv": CheckpointKey((f"{attention}.q", f"{attention}.k", f"{attention}.v")),
        f"{ours}.o": f"{attention}.o",
        f"{ours}.norm_cross": f"{layer}.1.layer_norm",
        f"{ours}.cross_q": f"{cross}.q",
        f"{ours}.cross_kv": CheckpointKey((f"{cross}.k", f"{cross}.v")),
        f"{ours}.cross_o": f"{cross}.o",
        f"{ours}.norm2": f"{layer}.{last}.layer_norm",
        f"{ours}.up": f"{dense}.wi",
        f"{ours}.gate_up": CheckpointKey((f"{dense}.wi_0", f"{dense}.wi_1")),
        f"{ours}.down": f"{dense}.wo",
        f"{stack}.positions.table": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{stack}.norm": f"{stack}.final_layer_norm",
    }


class T5(PretrainedModel):
    """T5 with the head of a task; see `PretrainedModel` for what it has from there.

    Tagging and embedding read the encoder. Classification and question answering read the decoder, which is then given
    the source itself, shifted by one.
    """

    title = "T5"
    model_types: ClassVar = {"t5": "T5"}
    config_class = T5Config
    presets = PRESETS
    architectures: ClassVar = {
        "seq2seq-lm": "T5ForConditionalGeneration",
        "sequence-classification": "T5ForSequenceClassification",
        "reward": "T5ForSequenceClassification",
        "token-classification": "T5ForTokenClassification",
        "question-answering": "T5ForQuestionAnswering",
        "embedding": "T5EncoderModel",
    }
    base_prefix = ("transformer.",)
    objectives: ClassVar = {"sft": "seq2seq", "pretrain": "span-corruption"}
    # It is looked up once for all rows.
    position_modules = ("*.positions.table",)
    # No glob is for cross_q, cross_kv and cross_o only, because an encoder alone has none of them.
    lora_targets: ClassVar = {
        "attention": ("*.layers.*.*[qv]", "*.layers.*.*o"),
        "mlp": ("*.layers.*.*up", "*.layers.*.down"),
    }
    head_keys: ClassVar = {
        "lm_head.*": ("seq2seq-lm",),
        "classification_head.*": ("sequence-classification", "reward"),
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
        "decoder.*": ("seq2seq-lm", "sequence-classification", "reward", "question-answering"),
    }
    text_head: ClassVar = {"pooler": "tanh", "drop_input": True}
    published_dropout = True
    tasks_with_dropout = (*TEXT_TASKS, "token-classification")
    # Where a row has no eos: see `pool`.
    text_pooling = "last"
    # A table in the first block of the decoder, which nothing uses.
    ignored_keys = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
    tied_keys: ClassVar = {
        "encoder.embed_tokens.weight": ("embed.tokens.weight", "shared.weight; two embeddings are not implemented"),
        "decoder.embed_tokens.weight": ("embed.tokens.weight", "shared.weight; two embeddings are not implemented"),
        "lm_head.weight": ("embed.tokens.weight", "shared.weight"),  # where it is stored at all, it is a matrix apart
    }
    supported_config_values: ClassVar = {"is_decoder": (False,), "is_causal": (True, None)}

    config: T5Config

    def build(self, config: T5Config) -> None:
        """One embedding, the encoder, and for tasks that need it the decoder."""
        self.embed = Embed(config)
        self.encoder = Stack(config, config.n_layer, decoder=False)
        # Vectors and tags are read from the source's own states, without a decoder.
        self.decoder: Stack | None = None
        if self.task not in ("embedding", "token-classification"):
            self.decoder = Stack(config, config.n_decoder_layer or config.n_layer, decoder=True)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights as Mesh TensorFlow draws them: N(0, 1 / inputs); q is divided by √hd, as attention here isn't.

        The embedding is N(0, 1), unless it is also a head whose states are not scaled; a separate head and the position
        bias are N(0, 1/D).
        """
        c = self.config
        inner = c.n_head * c.head_width  # H·hd
        initialize(self, c.d_model**-0.5)
        if c.scaled or not c.tied:
            self.embed.tokens.weight.normal_()

        for block in self.layers:
            block.qkv.weight[:inner].div_(c.head_width**0.5)
            block.o.weight.normal_(0.0, inner**-0.5)
            if block.decoder:
                block.cross_q.weight.div_(c.head_width**0.5)
                block.cross_o.weight.normal_(0.0, inner**-0.5)
            block.down.weight.normal_(0.0, c.d_ff**-0.5)

    def initialize_head(self) -> None:
        """Fresh weights for a head that a checkpoint may lack; a tied output matrix is the embedding's, and stays."""
        initialize(self.head, self.config.d_model**-0.5, excluded=self.tied_weight)

    @property
    def layers(self) -> list[Block]:
        """All blocks, the encoder's first."""
        modules = [*self.encoder.layers]
        if self.decoder is not None:
            modules += self.decoder.layers
        return [block for block in modules if isinstance(block, Block)]

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of up to `length` target positions."""
        c = self.config
        n_layer = c.n_decoder_layer or c.n_layer
        return Cache(KVCache(n_layer, batch, length, c.n_head, c.head_width, like=self.embed.tokens.weight))

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
        # Packed rows are unpacked and padded, since the position bias needs a row for each text.
        if cu_seqlens is not None:
            if decoder_input_ids is not None:
                raise ValueError("cu_seqlens: source and target in packed rows are not implemented; pad them")
            ids, mask, flat_index = unpacked(input_ids, cu_seqlens, max_seqlen)  # (n, T), (n, T), (N,)
            return self.hidden(ids, mask).flatten(0, 1)[flat_index][None]  # (1, N, D)
        if self.decoder is None:
            return self.encode(input_ids, attention_mask)

        # After the first call a cache holds the source's keys and values in every block; its states are not needed.
        source = None
        if cache is None or not cache.source:
            source = self.encode(input_ids, attention_mask)  # (B, S, D)

        if decoder_input_ids is None:
            if self.task == "seq2seq-lm":
                raise ValueError("decoder_input_ids: a seq2seq-lm needs them, the target behind the start token")
            decoder_input_ids = shift_right(input_ids, attention_mask, self.config.start_id)
            decoder_attention_mask = attention_mask

        x = self.embed.tokens(decoder_input_ids)  # (B, T, D)
        x = self.decoder(x, decoder_attention_mask, source, attention_mask, cache)
        if self.task == "seq2seq-lm" and self.config.scaled:
            x = x * self.config.d_model**-0.5
        return x

    def pool(
        self,
        states: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What the head reads: every position (B, T, D), or one vector a row (B, D).

        A text's class is read where transformers reads it, at the row's last eos. A row without one, because it was cut
        say, is refused by transformers; here it is read at its last token.
        """
        if self.task in TEXT_TASKS and self.tokens.eos_id is not None:
            is_eos = input_ids == self.tokens.eos_id  # (B, T)
            last_eos = last_position(is_eos, attention_mask, cu_seqlens)  # (B,), counted in (B·T,)
            last_token = last_position(torch.ones_like(is_eos), attention_mask, cu_seqlens)
            # A row without eos has its first token as `last_eos`.
            position = torch.where(is_eos.flatten()[last_eos], last_eos, last_token)
            return states.flatten(0, 1)[position]  # (B, D)
        return super().pool(states, input_ids, attention_mask, cu_seqlens)

    @property
    def checkpoint_prefix(self) -> str:
        """transformers' classifiers hold the model as `transformer`; its other classes are the model themselves."""
        return self.base_prefix[0] if self.task in (*TEXT_TASKS, "token-classification") else ""

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones; a block has two sublayers in the encoder, and three in the decoder."""
        keys = {"embed.tokens": "shared", **stack_keys("encoder", 1), **stack_keys("decoder", 2)}
        if self.task in TEXT_TASKS:
            keys |= {"head.pooler": "classification_head.dense", "head.out": "classification_head.out_proj"}
        return keys

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {**super().write_config(), "is_encoder_decoder": self.decoder is not None}

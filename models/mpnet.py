"""MPNet: an encoder that knows distances as well as positions; sentence-transformers' all-mpnet-base-v2 is one.

Song et al. 2020, arXiv:2004.09297. The blocks are BERT's; positions and heads are RoBERTa's, but that they count from
behind id 1 whatever the pad token is. It differs from RoBERTa in

    attention        softmax(q kᵀ / √hd + b), where b is a learned number for each head and bucket of distances, as
                     T5 has them (`layers/relative_positions.py`), the same in all layers
    segments         none

Shapes: B rows, T tokens, D width, H heads of width hd, V vocabulary. Packed, B is 1 and T all tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .encoder import FairseqEncoder
from .layers.inputs import check_length, key_bias, unpacked
from .layers.key_map import CheckpointKey
from .layers.post_norm import Block, Embed, EncoderConfig, positions_behind_pad
from .layers.relative_positions import RelativeBias
from .tokenizer.special_tokens import SpecialTokens

PAD = 1  # positions count from behind it
N_BUCKETS = 32  # of distances, in both directions together
MAX_DISTANCE = 128  # from which on all share a bucket


@dataclass(frozen=True)
class MPNetConfig(EncoderConfig):
    """Sizes in the project's vocabulary; `max_positions` is what the position table leaves for a row."""

    vocab_size: int = 30527
    max_positions: int = 510

    # A head for labels has the dropout of the blocks.
    keys: ClassVar[dict[str, str]] = {
        theirs: ours for theirs, ours in EncoderConfig.keys.items() if ours != "head_dropout"
    }

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> "MPNetConfig":
        """The configuration in a published config.json."""
        n_positions = published.get("max_position_embeddings", 512)
        if type(n_positions) is int:
            if n_positions <= PAD + 1:
                raise ValueError(f"max_position_embeddings {n_positions} leaves no position behind {PAD}")
            published = {**published, "max_position_embeddings": n_positions - PAD - 1}
        return super().from_published(published)

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        sizes = {"max_position_embeddings": self.max_positions + PAD + 1, "relative_attention_num_buckets": N_BUCKETS}
        return {"model_type": "mpnet", **super().to_published(), **sizes}


PRESETS: dict[str, dict[str, Any]] = {"mpnet-base": {"max_positions": 512, "eps": 1e-5}}


class MPNet(FairseqEncoder):
    """MPNet with the head of a task; see `PretrainedModel` for what it has from there."""

    title = "MPNet"
    model_types: ClassVar = {"mpnet": "MPNet"}
    config_class = MPNetConfig
    presets = PRESETS
    base_prefix = ("mpnet.",)
    position_modules = ("distances.table",)
    supported_config_values: ClassVar = {
        **FairseqEncoder.supported_config_values, "relative_attention_num_buckets": (N_BUCKETS,),
    }  # fmt: skip

    config: MPNetConfig

    @classmethod
    def fields_for(cls, tokens: SpecialTokens) -> dict[str, Any]:
        """Nothing. ValueError for a pad token that isn't the one whose id takes no position."""
        if tokens.pad_id not in (None, PAD):
            raise ValueError(f"the tokenizer pads with id {tokens.pad_id}, and MPNet takes id {PAD} for its pad token")
        return {}

    def build(self, config: MPNetConfig) -> None:
        """The embeddings with their norm, the table of distances, and the blocks, each of which ends with a norm."""
        self.embed = Embed(config, config.max_positions + PAD + 1)
        self.distances = RelativeBias(N_BUCKETS, MAX_DISTANCE, config.n_head, bidirectional=True)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """States before the head (B, T, D) for token ids (B, T) and a mask (B, T) of ones and zeros.

        MPNet has no segments, and its positions follow from the ids: `token_type_ids`, `position_ids` are ignored.
        """
        # Packed rows are unpacked and padded, since the bias needs a row for each text.
        if cu_seqlens is not None:
            ids, mask, flat_index = unpacked(input_ids, cu_seqlens, max_seqlen)  # (n, T), (n, T), (N,)
            return self.hidden(ids, mask).flatten(0, 1)[flat_index][None]  # (1, N, D)
        check_length(input_ids, None, None, self.config.max_positions)

        # The same bias serves all blocks: by distance, and the least finite number at padding.
        t = input_ids.shape[1]
        bias = self.distances(t, t)  # (1, H, T, T)
        visible = key_bias(attention_mask)  # (B, 1, 1, T) or None
        if visible is not None:
            bias = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)  # (B, H, T, T)

        x = self.embed(input_ids, positions_behind_pad(input_ids, attention_mask, None, PAD))  # (B, T, D)
        for block in self.layers:
            x = block(x, bias, None, None)
        return x

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones."""
        layer = "encoder.layer.{i}"
        attention = "encoder.layer.{i}.attention"
        return {
            "embed.tokens": "embeddings.word_embeddings",
            "embed.positions": "embeddings.position_embeddings",
            "embed.norm": "embeddings.LayerNorm",
            "distances.table": "encoder.relative_attention_bias",
            "layers.{i}.qkv": CheckpointKey((f"{attention}.attn.q", f"{attention}.attn.k", f"{attention}.attn.v")),
            "layers.{i}.o": f"{attention}.attn.o",
            "layers.{i}.norm1": f"{attention}.LayerNorm",
            "layers.{i}.up": f"{layer}.intermediate.dense",
            "layers.{i}.down": f"{layer}.output.dense",
            "layers.{i}.norm2": f"{layer}.output.LayerNorm",
            **self.published_heads,
        }

"""RoBERTa, and what was made after it: XLM-RoBERTa, CamemBERT, the E5 and BGE-M3 embedders.

Liu et al. 2019, arXiv:1907.11692; Conneau et al. 2020, arXiv:1911.02116. The blocks are BERT's. It differs in

    positions        of a row's n-th token: pad + n, where pad is the pad token's id; a token with that id is not
                     counted, and has position pad itself, so that a table of 514 serves rows of 512
    segments         none: every token is of type 0, whatever the tokenizer says
    masked LM        E norm(gelu(W x)) + b, with gelu also where the blocks have another activation
    classification   C tanh(W x[<s>]), with dropout in front of W, too

Shapes: B rows, T tokens, D width, V vocabulary. Packed, B is 1 and T all tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .encoder import BERT_KEYS, FairseqEncoder
from .layers.key_map import CheckpointKey
from .layers.post_norm import Block, Embed, EncoderConfig, positions_behind_pad
from .tokenizer.special_tokens import SpecialTokens

# What transformers' classes of a model_type begin with.
CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}


@dataclass(frozen=True)
class RobertaConfig(EncoderConfig):
    """Sizes in the project's vocabulary; `max_positions` is what the position table leaves for a row."""

    max_positions: int = 510
    n_types: int = 2  # rows of a table of which the first is used
    pad_id: int = 1  # positions count from behind it
    model_type: str = "roberta"  # a key of CLASSES

    keys: ClassVar[dict[str, str]] = {
        **EncoderConfig.keys, "type_vocab_size": "n_types", "pad_token_id": "pad_id", "model_type": "model_type",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type not in CLASSES:
            raise ValueError(f"model_type {self.model_type!r} is unknown; known: {', '.join(CLASSES)}")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_id}: expected one of {self.vocab_size} tokens")
        if self.max_positions < 1:
            raise ValueError(
                f"max_position_embeddings {self.n_positions} leaves no position behind pad_token_id {self.pad_id}"
            )

    @property
    def n_positions(self) -> int:
        """Rows of the position table."""
        return self.max_positions + self.pad_id + 1

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> Self:
        """The configuration in a published config.json."""
        config = super().from_published({"max_position_embeddings": 512, **published})
        return replace(config, max_positions=config.max_positions - config.pad_id - 1)

    def to_published(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {**super().to_published(), "max_position_embeddings": self.n_positions}


BASE = {"vocab_size": 50265, "max_positions": 512, "n_types": 1, "eps": 1e-5}
LARGE = {**BASE, "n_layer": 24, "n_head": 16, "d_model": 1024, "d_ff": 4096}
PRESETS: dict[str, dict[str, Any]] = {
    "roberta-base": BASE,
    "roberta-large": LARGE,
    "distilroberta-base": {**BASE, "n_layer": 6},
    "xlm-roberta-base": {**BASE, "vocab_size": 250002, "model_type": "xlm-roberta"},
    "xlm-roberta-large": {**LARGE, "vocab_size": 250002, "model_type": "xlm-roberta"},
    "camembert-base": {**BASE, "vocab_size": 32005, "model_type": "camembert"},
}


class Roberta(FairseqEncoder):
    """RoBERTa with the head of a task; see `PretrainedModel` for what it has from there."""

    title = "RoBERTa"
    model_types = CLASSES
    config_class = RobertaConfig
    presets = PRESETS
    base_prefix = ("roberta.",)

    config: RobertaConfig

    @classmethod
    def fields_for(cls, tokens: SpecialTokens) -> dict[str, Any]:
        """The pad token, from behind which a fresh model counts positions."""
        return {} if tokens.pad_id is None else {"pad_id": tokens.pad_id}

    def build(self, config: RobertaConfig) -> None:
        """The embeddings with their norm, and the blocks, each of which ends with one."""
        self.embed = Embed(config, config.n_positions, config.n_types)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))

    def embedded(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None,
        position_ids: Tensor | None, cu_seqlens: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """What the first block reads (B, T, D).

        RoBERTa has no segments, and its positions follow from the ids: `token_type_ids`, `position_ids` are ignored.
        """
        return self.embed(input_ids, positions_behind_pad(input_ids, attention_mask, cu_seqlens, self.config.pad_id))

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules → the published ones."""
        return {**BERT_KEYS, **self.published_heads}

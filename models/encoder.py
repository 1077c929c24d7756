"""What encoders have in common besides their blocks: tasks, targets of adapters, heads.

    masked LM        E norm(activation(W x)) + b, where E is the token embedding
    classification   C f(W x[first]), where f is tanh, or relu in DistilBERT
    all others       one projection of what they read

Shapes: B rows, T tokens, D width, V vocabulary, C classes. Packed, B is 1 and T all tokens.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from .layers.config_fields import ACTIVATIONS
from .layers.heads import TEXT_TASKS, MaskedLMHead
from .layers.inputs import check_length, key_bias, positions
from .layers.key_map import CheckpointKey
from .model import PretrainedModel

TOKENS = "embed.tokens.weight"
# BERT's modules → the published ones, as RoBERTa has them, too.
_ATTENTION = "encoder.layer.{i}.attention"
BERT_KEYS: dict[str, str | CheckpointKey] = {
    "embed.tokens": "embeddings.word_embeddings",
    "embed.positions": "embeddings.position_embeddings",
    "embed.types": "embeddings.token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm",
    "layers.{i}.qkv": CheckpointKey(tuple(f"{_ATTENTION}.self.{name}" for name in ("query", "key", "value"))),
    "layers.{i}.o": f"{_ATTENTION}.output.dense",
    "layers.{i}.norm1": f"{_ATTENTION}.output.LayerNorm",
    "layers.{i}.up": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.down": "encoder.layer.{i}.output.dense",
    "layers.{i}.norm2": "encoder.layer.{i}.output.LayerNorm",
}


class Encoder(PretrainedModel):
    """An encoder with the head of a task; see `PretrainedModel` for what it has from there."""

    architectures: ClassVar = {
        "masked-lm": "{}ForMaskedLM",
        "sequence-classification": "{}ForSequenceClassification",
        "reward": "{}ForSequenceClassification",
        "token-classification": "{}ForTokenClassification",
        "question-answering": "{}ForQuestionAnswering",
        "embedding": "{}Model",
    }
    lora_targets: ClassVar = {
        "attention": ("layers.*.qkv", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    # A text is scored by its first token, [CLS] or <s>, behind a pooler.
    text_head: ClassVar = {"pooler": "tanh"}
    text_pooling = "first"
    published_dropout = True
    tasks_with_dropout: ClassVar[tuple[str, ...]] = (*TEXT_TASKS, "token-classification")
    # Constants that some checkpoints carry.
    ignored_keys = ("*embeddings.position_ids",)
    supported_config_values: ClassVar = {
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }

    config: Any  # with `activation`, `eps` and `max_positions`
    embed: nn.Module
    layers: nn.ModuleList

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """States before the head (B, T, D) for token ids (B, T) and a mask (B, T) of ones and zeros."""
        check_length(input_ids, cu_seqlens, max_seqlen, self.config.max_positions)
        x = self.embedded(input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens)  # (B, T, D)
        bias = key_bias(attention_mask)  # (B, 1, 1, T) or None
        for block in self.layers:
            x = block(x, bias, cu_seqlens, max_seqlen)
        return x

    def embedded(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None,
        position_ids: Tensor | None, cu_seqlens: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """What the first block reads (B, T, D). An encoder without segments ignores `token_type_ids`."""
        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, cu_seqlens)  # (B or 1, T)
        return self.embed(input_ids, position_ids, token_type_ids)

    def build_language_head(self) -> nn.Module:
        """The masked-LM head, whose output matrix is the token embedding."""
        return MaskedLMHead(self.get_parameter(TOKENS), ACTIVATIONS[self.config.activation], self.config.eps)


def tied_output(name: str, bias: str) -> dict[str, tuple[str, str]]:
    """`tied_keys` of a masked-LM head whose output matrix may be stored as `name`, and its `bias` beside it."""
    return {
        f"{name}.weight": (
            TOKENS,
            "the token embedding; a masked-LM output matrix of its own is not implemented",
        ),
        f"{name}.bias": ("head.bias", f"{bias}; take one of them out"),
    }


class FairseqEncoder(Encoder):
    """An encoder with the heads of fairseq: RoBERTa's and MPNet's."""

    head_keys: ClassVar = {
        "lm_head.*": ("masked-lm",),
        "classifier.out_proj.*": TEXT_TASKS,
        "classifier.dense.*": TEXT_TASKS,
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
        "pooler.*": (),  # of the base model, whose embeddings don't read it
    }
    text_head: ClassVar = {"pooler": "tanh", "drop_input": True}
    tied_keys: ClassVar = tied_output("lm_head.decoder", "lm_head.bias")
    # Our modules → the published ones.
    published_heads: ClassVar[dict[str, str | CheckpointKey]] = {
        "head.pooler": "classifier.dense",
        "head.dense": "lm_head.dense",
        "head.norm": "lm_head.layer_norm",
        "head.bias": CheckpointKey(("lm_head.bias",), also=("lm_head.decoder.bias",)),
    }

    def build_language_head(self) -> nn.Module:
        """The masked-LM head, with gelu also where the blocks have another activation."""
        return MaskedLMHead(self.get_parameter(TOKENS), "gelu", self.config.eps)

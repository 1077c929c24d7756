"""What encoders have in common besides their blocks: tasks, targets of adapters, heads.

    masked LM        E norm(activation(W x)) + b, where E is the token embedding
    classification   C f(W x[first]), where f is tanh, or relu in DistilBERT
    all others       one projection of what they read

Shapes: D width, V vocabulary, C classes.
"""

from typing import Any, ClassVar

from torch import nn

from .layers.config_fields import ACTIVATIONS
from .layers.heads import TEXT_TASKS, MaskedLMHead
from .layers.key_map import CheckpointKey
from .model import PretrainedModel

TOKENS = "embed.tokens.weight"


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

    config: Any  # with an `activation` and `eps`

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

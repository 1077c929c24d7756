"""BERT: a bidirectional encoder, normalised after each addition.

Devlin et al. 2018, arXiv:1810.04805.

    x = norm(E[token] + P[position] + S[segment])
    x = norm₁(x + O attention(QKV x))
    x = norm₂(x + D gelu(U x))
    masked LM: E norm(gelu(W x)) + b        classification: C tanh(W x[CLS])

Published checkpoints come with or without `bert.` in front; old ones call a norm's weight and bias `gamma` and `beta`;
of the masked-LM head's output only the bias is stored (as `cls.predictions.bias`, sometimes `.decoder.bias` too), its
matrix being the token embedding; tagging and question answering have no pooler.

Shapes: B rows, T tokens, D width, H heads of width hd, F feed-forward width, V vocabulary, C classes. Packed, B is 1
and T all tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..kernels import LayerNorm, Linear, activation_linear, attention
from .layers.config_fields import ACTIVATIONS, overridden, read_fields, write_fields
from .layers.heads import BY_TEXT, EmbeddingHead, MaskedLMHead, MLPHead, n_outputs, pool_tokens
from .layers.initialization import initialize
from .layers.inputs import check_length, key_bias, positions
from .layers.key_map import CheckpointKey, head_key_map
from .tokenizer.special_tokens import SpecialTokens


@dataclass(frozen=True)
class BertConfig:
    """Sizes in the project's vocabulary; the defaults are those of bert-base-uncased."""

    vocab_size: int = 30522
    max_positions: int = 512  # tokens of a row; the position table ends there
    n_types: int = 2  # segment ids
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    d_ff: int = 3072
    activation: str = "gelu"  # by its published name
    eps: float = 1e-12  # of the norms
    tied: bool = True  # the masked-LM output matrix is the token embedding; no other is implemented

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.d_model % self.n_head:
            raise ValueError(f"hidden_size {self.d_model} is not a multiple of num_attention_heads {self.n_head}")


PRESETS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {},
    "bert-base-cased": {"vocab_size": 28996},
    "bert-large-uncased": {"n_layer": 24, "n_head": 16, "d_model": 1024, "d_ff": 4096},
    "bert-large-cased": {"vocab_size": 28996, "n_layer": 24, "n_head": 16, "d_model": 1024, "d_ff": 4096},
    "minilm-l6": {"n_layer": 6, "d_model": 384, "d_ff": 1536},
}

# published field -> ours
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "n_types",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "hidden_act": "activation",
    "layer_norm_eps": "eps",
    "tie_word_embeddings": "tied",
}


class Embed(nn.Module):
    """Sum of token, position and segment embedding, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_positions, config.d_model)
        self.types = nn.Embedding(config.n_types, config.d_model)
        self.norm = LayerNorm(config.d_model, config.eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor) -> Tensor:
        if token_type_ids is None:
            token_type_ids = input_ids.new_zeros(1, 1)
        types = self.types(token_type_ids)  # (B or 1, T or 1, D)
        return self.norm(self.tokens(input_ids) + types + self.positions(position_ids))  # (B, T, D)


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to its input and then normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.qkv = Linear(d, 3 * d, parts=(("query", d), ("key", d), ("value", d)))
        self.o = Linear(d, d)
        self.up = Linear(d, config.d_ff)
        self.down = Linear(config.d_ff, d)
        self.norm1 = LayerNorm(d, config.eps)
        self.norm2 = LayerNorm(d, config.eps)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
        """The stream x (B, T, D) after this layer; `bias` as `attention` takes it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).unbind(2)  # (B, T, H, hd) each
        out = attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, bias=bias, causal=False)
        out = out.flatten(2)  # (B, T, D)

        x = self.norm1(self.o(out), residual=x)
        return self.norm2(activation_linear(self.up(x), self.activation, self.down), residual=x)  # through (B, T, F)


class Bert(nn.Module):
    """BERT with the head of a task (see `forward` for shapes).

    `head_layers` counts the layers of a head that classifies; `pooling` and `normalize` are for embeddings.
    """

    presets: ClassVar = PRESETS
    # What stands in front of the base model's tensors in a checkpoint with a head.
    base_prefix = "bert."
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
        "masked-lm": "BertForMaskedLM",
        "sequence-classification": "BertForSequenceClassification",
        "reward": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
        "embedding": "BertModel",
    }
    # Constants that some checkpoints carry.
    ignored_keys = ("*embeddings.position_ids",)
    # The tasks that a stored head is for; the heads of other tasks are left out.
    head_keys: ClassVar = {
        "cls.predictions.*": ("masked-lm",),
        "cls.seq_relationship.*": (),  # the next-sentence head of pretraining
        "classifier.*": ("sequence-classification", "reward", "token-classification"),
        "qa_outputs.*": ("question-answering",),
        "pooler.*": ("sequence-classification", "reward"),
    }
    # What may be stored a second time: of which parameter it must be a copy, and what to say where it isn't.
    tied_keys: ClassVar = {
        "cls.predictions.decoder.weight": (
            "embed.tokens.weight",
            "the token embedding; a masked-LM output matrix of its own is not implemented",
        ),
        "cls.predictions.decoder.bias": ("head.bias", "cls.predictions.bias; take one of them out"),
    }
    # Published fields that would change what is computed, and the values for which they don't.
    supported_config_values: ClassVar = {
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }

    def __init__(
        self,
        config: BertConfig,
        task: str = "masked-lm",
        labels: tuple[str, ...] = (),
        head_layers: int = 1,
        pooling: str = "mean",
        normalize: bool = False,
    ):
        super().__init__()
        if task not in self.architectures:
            raise ValueError(f"task {task!r}: BERT can do {', '.join(self.architectures)}")

        self.config = config
        self.task = task
        self.labels = labels
        self.head_layers = head_layers
        self.pooling = pooling if task == "embedding" else "first"
        self.tokens = SpecialTokens()
        self.source: str | None = None  # the folder or hub id that it was loaded from
        self.head_is_new = True  # until a checkpoint fills it

        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head: nn.Module
        if task == "masked-lm":
            self.head = MaskedLMHead(self.embed.tokens.weight, ACTIVATIONS[config.activation], config.eps)
        elif task == "embedding":
            self.head = EmbeddingHead(normalize)
        else:
            pooler = task in ("sequence-classification", "reward")
            width = n_outputs(task, labels)
            self.head = MLPHead(config.d_model, width, head_layers, pooler=pooler, scalar=task == "reward")

    @classmethod
    def from_name(cls, name: str, *, task: str = "masked-lm", labels: tuple[str, ...] = (), **overrides: Any) -> "Bert":
        """A freshly initialised model of a published size: `Bert.from_name("bert-base-uncased", n_layer=2)`.

        `overrides` are fields of `BertConfig`. ValueError for an unknown name or field.
        """
        settings = overridden(PRESETS, name, overrides, BertConfig)
        model = cls(BertConfig(**settings), task, labels)
        model.initialize()
        return model

    def initialize(self) -> None:
        """Fresh weights: N(0, 0.02²), as the paper says."""
        initialize(self)

    def initialize_head(self) -> None:
        """Fresh weights for a head that a checkpoint may lack; the tied output matrix is none of them."""
        for child in self.head.children():
            initialize(child)
        if isinstance(self.head, MaskedLMHead):
            nn.init.zeros_(self.head.bias)

    def tie(self) -> None:
        """Make the token embedding the masked-LM head's output matrix."""
        if isinstance(self.head, MaskedLMHead):
            self.head.weight = self.embed.tokens.weight

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
        if position_ids is None:
            position_ids = positions(input_ids, attention_mask, cu_seqlens)  # (B or 1, T)

        x = self.embed(input_ids, token_type_ids, position_ids)  # (B, T, D)
        bias = key_bias(attention_mask)  # (B, 1, 1, T) or None
        for block in self.layers:
            x = block(x, bias, cu_seqlens, max_seqlen)
        return x

    def pool(
        self,
        states: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What the head reads: every position (B, T, D), or one vector a row (B, D)."""
        if self.task in (*BY_TEXT, "embedding"):
            return pool_tokens(self.pooling, states, attention_mask, cu_seqlens)
        return states

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """The output of the task's head; `inputs` are further arguments of `hidden`.

        masked-lm (B, T, V); token-classification (B, T, C); question-answering (B, T, 2); embedding (B, D);
        sequence-classification (B, C) and reward (B,), both read at [CLS].
        """
        states = self.hidden(input_ids, attention_mask, **inputs)
        return self.head(self.pool(states, input_ids, attention_mask, inputs.get("cu_seqlens")))

    def key_map(self) -> dict[str, CheckpointKey]:
        """Our parameter names → their names in published checkpoints of this task."""
        base = "" if self.task == "embedding" else self.base_prefix
        d = self.config.d_model
        table = {
            "embed.tokens.weight": CheckpointKey((f"{base}embeddings.word_embeddings.weight",)),
            "embed.positions.weight": CheckpointKey((f"{base}embeddings.position_embeddings.weight",)),
            "embed.types.weight": CheckpointKey((f"{base}embeddings.token_type_embeddings.weight",)),
        }

        modules = {
            "o": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "norm2": "output.LayerNorm",
        }
        for tensor in ("weight", "bias"):
            table[f"embed.norm.{tensor}"] = CheckpointKey((f"{base}embeddings.LayerNorm.{tensor}",))
            for i in range(len(self.layers)):
                layer = f"{base}encoder.layer.{i}"
                names = tuple(f"{layer}.attention.self.{part}.{tensor}" for part in ("query", "key", "value"))
                table[f"layers.{i}.qkv.{tensor}"] = CheckpointKey(names, (d, d, d))
                for ours, theirs in modules.items():
                    table[f"layers.{i}.{ours}.{tensor}"] = CheckpointKey((f"{layer}.{theirs}.{tensor}",))

        if self.task == "masked-lm":
            for tensor in ("weight", "bias"):
                table[f"head.dense.{tensor}"] = CheckpointKey((f"cls.predictions.transform.dense.{tensor}",))
                table[f"head.norm.{tensor}"] = CheckpointKey((f"cls.predictions.transform.LayerNorm.{tensor}",))
            table["head.bias"] = CheckpointKey(("cls.predictions.bias",), also=("cls.predictions.decoder.bias",))
            return table

        table |= head_key_map(self.head, self.task, self.head_keys)
        # The pooler is published beside the encoder, not under the head's name.
        if "head.pooler.weight" in table:
            for tensor in ("weight", "bias"):
                table[f"head.pooler.{tensor}"] = CheckpointKey((f"{self.base_prefix}pooler.dense.{tensor}",))
        return table

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> BertConfig:
        """The configuration in a published config.json."""
        return BertConfig(**read_fields(BertConfig, published, CONFIG_KEYS))

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return {"model_type": "bert", **write_fields(self.config, CONFIG_KEYS)}

"""What all families of models have in common. What one of them computes stands in its own file: see `gpt2/model.py`.

A model is `head(pool(hidden(...)))`: the states before the head, those of them that the task needs, and what the head
makes of these. A family is a subclass of `PretrainedModel` and provides

    build             its modules: `embed`, `layers`, the norm behind them; the head is added here
    hidden            its forward pass up to the head, from ids and mask (B, T) to states (B, T, D)
    checkpoint_keys   how its tensors are published: the templates that `expand_keys` makes the key map of
    new_cache         what it keeps while it generates, if it does
    config_class      a frozen dataclass of its sizes that reads and writes published ones: `from_published`,
                      `to_published`; its `d_model` is the width of the states, `tied` says whether the output matrix is
                      the token embedding

and the facts that stand at the beginning of the class. Where it differs in one of the other methods, it overrides it.

Shapes: B rows, T tokens, D width of the states, V vocabulary, C classes.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ..kernels import Linear
from .layers.config_fields import overridden
from .layers.heads import MEAN, TEXT_TASKS, EmbeddingHead, MLPHead, Pooling, last_unpadded, n_outputs, pool_tokens
from .layers.image_processor import ImageProcessor
from .layers.initialization import initialize
from .layers.key_map import CheckpointKey, expand_keys
from .tokenizer.special_tokens import SpecialTokens


class PretrainedModel(nn.Module):
    """A model with the head of a task (see `forward` for shapes)."""

    # Facts that every family states, beginning with its name in errors.
    title: ClassVar[str]
    # config.json's model_type, of each kind if there are several, and what transformers' classes of it begin with.
    model_types: ClassVar[dict[str, str]]
    config_class: ClassVar[Any]
    # Published sizes: fields of `config_class`.
    presets: ClassVar[dict[str, dict[str, Any]]]
    # transformers' class for each task, {} for its beginning. The first task is the one of the published models.
    architectures: ClassVar[dict[str, str]]
    # What stands in front of the base model's tensors in a checkpoint with a head; several where tasks differ.
    base_prefix: ClassVar[tuple[str, ...]]
    # What "attention" and "mlp" mean as targets of adapters.
    lora_targets: ClassVar[dict[str, tuple[str, ...]]]
    # The tasks that a stored head is for; the heads of other tasks are left out.
    head_keys: ClassVar[dict[str, tuple[str, ...]]]

    # Facts with a default. First, how a head that scores texts differs from one for tokens: arguments of `MLPHead`.
    text_head: ClassVar[dict[str, Any]] = {}
    # The token that a head for texts reads: "first", "last", or "unpadded", the last one that isn't the pad token.
    text_pooling: ClassVar[str] = "unpadded"
    # Whether a run applies the dropout that the configuration publishes where nothing else is asked for; and the tasks
    # with dropout in front of the head, whose probability is the configuration's `head_rate`.
    published_dropout: ClassVar[bool] = False
    tasks_with_dropout: ClassVar[tuple[str, ...]] = ("token-classification",)
    # Whether it reads images, not tokens, and how these are prepared: by its `build`, or as the checkpoint says.
    reads_images: ClassVar[bool] = False
    pixels: ImageProcessor
    image_size: int | None = None  # pixels a side that it reads alone; None: any size
    # Methods of training that mean another objective here than for most models.
    objectives: ClassVar[dict[str, str]] = {}
    # Whether it is a causal decoder, whose `hidden` takes `keys` and `positions_to_return`: what PPO trains.
    is_decoder: ClassVar[bool] = False
    # Modules whose input is positions or distances, the same for all rows: they can't take an adapter for each row.
    position_modules: ClassVar[tuple[str, ...]] = ()
    # Stored tensors that nothing reads.
    ignored_keys: ClassVar[tuple[str, ...]] = ()
    # Tensors that may be stored a second time: the parameter that each must equal, and how the error goes on if not.
    tied_keys: ClassVar[dict[str, tuple[str, str]]] = {}
    # Published fields that would change what is computed, and the values for which they don't.
    supported_config_values: ClassVar[dict[str, tuple[Any, ...]]] = {}

    # What each family defines as methods (see the top), declared for the type checker.
    build: Callable[[Any], None]
    hidden: Callable[..., Tensor]
    checkpoint_keys: Callable[[], dict[str, str | CheckpointKey]]

    def __init__(
        self, config: Any, task: str | None = None, labels: tuple[str, ...] = (), head_layers: int = 1,
        pooling: Pooling = MEAN,
    ):  # fmt: skip
        """A model whose parameters have no values yet: `initialize`, or a checkpoint, gives them.

        `labels` name the outputs of a head that classifies, and `head_layers` counts its layers; `pooling` is for
        embeddings. The task None is the first of `architectures`.

        Raises ValueError for a task that the family can't do.
        """
        super().__init__()
        if task is None:
            task = next(iter(self.architectures))
        if task not in self.architectures:
            raise ValueError(f"task {task!r}: {self.title} can do {', '.join(self.architectures)}")

        self.config = config
        self.task = task
        self.labels = labels
        self.head_layers = head_layers
        self.pooling = self.text_pooling if task in TEXT_TASKS else pooling.mode
        self.tokens = SpecialTokens()  # with the chat template and the tokenizer's settings
        self.prompts: dict[str, str] = {}  # what an embedder has in front of a "query", a "document", another "text"
        self.source: str | None = None  # the folder or hub id that it was loaded from
        self.head_is_new = True  # until a checkpoint fills it

        self.build(config)
        self.head = self.build_head(pooling)
        self.tie()

    @classmethod
    def from_name(
        cls, name: str, *, task: str | None = None, labels: tuple[str, ...] = (), head_layers: int = 1, **overrides: Any
    ) -> Self:
        """A freshly initialised model of a published size: `GPT2.from_name("gpt2", n_layer=2)`.

        `head_layers` as for the constructor; `overrides` are fields of the configuration. ValueError for an unknown
        name or field.
        """
        settings = overridden(cls.presets, name, overrides, cls.config_class)
        model = cls(cls.config_class(**settings), task, labels, head_layers)
        model.initialize()
        return model

    def build_head(self, pooling: Pooling) -> nn.Module:
        """The head of the task, without values."""
        if self.task == "embedding":
            return EmbeddingHead(self.config.d_model, pooling)
        if self.task.endswith("-lm"):
            return self.build_language_head()

        options = self.text_head if self.task in TEXT_TASKS else {}
        n_out = n_outputs(self.task, self.labels)
        scalar = self.task == "reward"
        return MLPHead(self.config.d_model, n_out, self.head_layers, scalar=scalar, dropout=self.head_rate, **options)

    @classmethod
    def fields_for(cls, tokens: SpecialTokens) -> dict[str, Any]:
        """Fields of a fresh model's configuration that follow from its tokenizer's special tokens."""
        return {}

    @property
    def head_rate(self) -> float | None:
        """The published dropout in front of the head, where there is one."""
        return self.config.head_rate if self.task in self.tasks_with_dropout else None

    def build_language_head(self) -> nn.Module:
        """The output matrix (V, D)."""
        return Linear(self.config.d_model, self.config.vocab_size, bias=False)

    def initialize(self) -> None:
        """Fresh weights: N(0, 0.02²), as published configurations say."""
        initialize(self)

    def initialize_head(self) -> None:
        """Fresh weights for a head that a checkpoint may lack; a tied output matrix is the embedding's, and stays."""
        initialize(self.head, excluded=self.tied_weight)

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The token embedding (V, D) where it is the output matrix, too."""
        if self.task.endswith("-lm") and self.config.tied:
            return self.get_parameter("embed.tokens.weight")
        return None

    def tie(self) -> None:
        """Make the token embedding the output matrix, where the configuration says so."""
        if self.tied_weight is not None:
            self.head.weight = self.tied_weight

    def pool(
        self,
        states: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What the head reads: every position (B, T, D), or one vector a row (B, D)."""
        if self.task not in (*TEXT_TASKS, "embedding"):
            return states
        if self.pooling == "unpadded":
            return last_unpadded(states, input_ids, self.tokens.config_pad_id, attention_mask, cu_seqlens)
        return pool_tokens(self.pooling, states, attention_mask, cu_seqlens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """The output of the task's head; `inputs` are further arguments of `hidden`.

        causal-lm, masked-lm and seq2seq-lm (B, T, V); token-classification (B, T, C); question-answering (B, T, 2);
        embedding (B, D); sequence-classification (B, C) and reward (B,), both read at one token (`text_pooling`).
        """
        states = self.hidden(input_ids, attention_mask, **inputs)
        return self.head(self.pool(states, input_ids, attention_mask, inputs.get("cu_seqlens")))

    def key_map(self) -> dict[str, CheckpointKey]:
        """Our names of parameters and running statistics → their names in published checkpoints of this task."""
        # The head's last layer goes by the name of the head; hidden layers are in no published checkpoint.
        name = next((glob.removesuffix(".*") for glob, tasks in self.head_keys.items() if self.task in tasks), "")
        head = {"head": name, "head.out": name, "head.hidden.{i}": f"{name}.hidden.{{i}}"}
        if isinstance(self.head, EmbeddingHead):
            head |= {f"head.dense.{i}": f"{layer.folder}.linear" for i, layer in enumerate(self.head.pooling.dense)}
        table = expand_keys(self, {**head, **self.checkpoint_keys()}, self.checkpoint_prefix)
        if self.tied_weight is not None:
            del table["head.weight"]
        return table

    @property
    def checkpoint_prefix(self) -> str:
        """What stands in front of the base model's tensors in a checkpoint of this task."""
        return "" if self.task == "embedding" else self.base_prefix[0]

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> Any:
        """The configuration in a published config.json."""
        return cls.config_class.from_published(published)

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return self.config.to_published()

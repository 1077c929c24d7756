"""XLNet: a two-way encoder that is trained to predict the next token in any order, and its memory.

Yang et al. 2019, arXiv:1906.08237; relative positions and memory: Dai et al. 2019, arXiv:1901.02860.

    h = E[token]                                    content stream: what stands at a position
    g = m, one learned vector                       query stream: a position whose token is to be predicted
    g = layer(g, seeing h),  h = layer(h, seeing h) the same weights; `blocks.py` has the attention
    layer(x) = norm₂(y + D gelu(U y)),  y = norm₁(x + O attention(x))
    logits = E g + b

Shapes: B rows, T tokens, n predictions in each row, D = d_model, V = vocab_size, C labels.

`perm_mask` (B, T, T) is 1 where token t may not see token s: it spells an order of the tokens. A token of the content
stream always sees itself; of the query stream it doesn't, or it would read off what it should predict. `target_mapping`
says where the predictions stand; without it there is no query stream, and h goes to the head. Where there is a g,
nothing reads h after the last layer, and it is not computed there. Fine-tuning on labels uses h alone.

Positions are distances between columns, without an end: there is no longest row. `memory` carries what the layers read
in one segment of a text into the next, where its states are constants. With `bi_data` the second half of the batch is
read backwards. `causal` (attn_type "uni") is Transformer-XL; with `same_length`, each of its tokens sees as many as the
memory is long, and itself.

Published checkpoints hold q, k, v, o, r as raw tensors (D, H, hd), without ".weight"; the tied output matrix may be
there or not. `untie_r` (each layer has its own u, v, w) is always true in them. Texts end in <sep> <cls> and are padded
on the left: a row's class is read from its last token, where transformers takes the last column whatever it holds. The
types of a pair are 0 and 1, and are only compared; memory is of type 0. Dropout is not applied; adapters have theirs.

Distances give a bias for each pair, so that rows can't be laid end to end (`attention` takes no bias with segments):
packed rows are accepted, but computed padded.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import Linear
from ..layers.config_fields import overridden
from ..layers.heads import BY_TEXT, EmbeddingHead, MLPHead, n_outputs, pool_tokens
from ..layers.initialization import initialize
from ..layers.inputs import unpacked
from ..layers.key_map import TIED, CheckpointKey
from ..tokenizer.special_tokens import SpecialTokens
from .blocks import Block, Memory, sinusoids, target_positions, views
from .config import PRESETS, XLNetConfig, read_config, write_config


class Embed(nn.Module):
    """Token embedding, and the vector `mask` (1, D) that every prediction starts from."""

    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.mask = nn.Parameter(torch.zeros(1, config.d_model))


class XLNet(nn.Module):
    """XLNet with the head of a task (see `forward` for shapes)."""

    presets: ClassVar = PRESETS
    base_prefix = "transformer."
    # Methods of training that mean another objective here than for most models.
    objectives: ClassVar[dict[str, str]] = {"pretrain": "permutation-lm", "sft": "ordered-lm"}
    # Modules that see distances rather than rows: no adapter that is for some rows of a batch may be on them.
    position_modules: ClassVar[tuple[str, ...]] = ("layers.*.r",)
    # What the names of groups mean as LoRA targets.
    lora_targets: ClassVar = {
        "attention": ("layers.*.q", "layers.*.kv", "layers.*.r", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    # The tasks, and the class of transformers for each, which config.json names.
    architectures: ClassVar = {
        "causal-lm": "XLNetLMHeadModel",
        "sequence-classification": "XLNetForSequenceClassification",
        "reward": "XLNetForSequenceClassification",
        "token-classification": "XLNetForTokenClassification",
        "question-answering": "XLNetForQuestionAnsweringSimple",
        "embedding": "XLNetModel",
    }
    ignored_keys = ()
    # Published heads, and the tasks that each is for.
    head_keys: ClassVar = {
        "lm_loss.*": ("causal-lm",),
        "sequence_summary.*": ("sequence-classification", "reward"),
        "logits_proj.*": ("sequence-classification", "reward"),
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
    }
    # What may be stored a second time: the parameter it must equal, and how an error calls that.
    tied_keys: ClassVar = {"lm_loss.weight": ("embed.tokens.weight", TIED)}
    # Fields of config.json that change the model, and the values that are implemented.
    supported_config_values: ClassVar = {
        "untie_r": (True,),
        "summary_type": ("last",),
        "summary_use_proj": (True,),
        "summary_activation": ("tanh",),
    }

    def __init__(
        self,
        config: XLNetConfig,
        task: str = "causal-lm",
        labels: tuple[str, ...] = (),
        head_layers: int = 1,
        pooling: str = "mean",
        normalize: bool = False,
    ):
        super().__init__()
        if task not in self.architectures:
            raise ValueError(f"task {task!r}: XLNet can do {', '.join(self.architectures)}")
        self.config = config
        self.task = task
        self.labels = labels
        self.head_layers = head_layers
        self.pooling = pooling if task == "embedding" else "last"
        self.tokens = SpecialTokens()
        self.source: str | None = None  # the folder or hub id that it was loaded from
        self.head_is_new = True  # until a checkpoint fills it

        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))

        self.head: nn.Module
        if task == "causal-lm":
            self.head = Linear(config.d_model, config.vocab_size)
        elif task == "embedding":
            self.head = EmbeddingHead(normalize)
        else:
            n = n_outputs(task, labels)
            self.head = MLPHead(config.d_model, n, head_layers, pooler=task in BY_TEXT, scalar=task == "reward")
        self.tie()

    @classmethod
    def from_name(
        cls, name: str, *, task: str = "causal-lm", labels: tuple[str, ...] = (), **overrides: Any
    ) -> "XLNet":
        """A freshly initialised model of a published size: `XLNet.from_name("xlnet-base-cased", n_layer=2)`.

        `overrides` are fields of `XLNetConfig`. ValueError for an unknown name or field.
        """
        settings = overridden(PRESETS, name, overrides, XLNetConfig)
        model = cls(XLNetConfig(**settings), task, labels)
        model.initialize()
        return model

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights: N(0, 0.02²), for the vectors added to queries and the one of predictions, too."""
        initialize(self)
        self.embed.mask.normal_(0.0, 0.02)
        for block in self.layers:
            assert isinstance(block, Block)
            for parameter in (block.content_bias, block.distance_bias, block.text_bias, block.texts):
                parameter.normal_(0.0, 0.02)

    def initialize_head(self) -> None:
        """Fresh weights for a head that a checkpoint may lack; a tied output matrix is the embedding's and stays."""
        if isinstance(self.head, Linear) and self.config.tied:
            nn.init.zeros_(self.head.get_parameter("bias"))
        else:
            initialize(self.head)

    def tie(self) -> None:
        """Make the token embedding the output matrix, where the configuration says so."""
        if isinstance(self.head, Linear) and self.config.tied:
            self.head.weight = self.embed.tokens.get_parameter("weight")

    def new_memory(self) -> Memory:
        """An empty memory, to be passed to `forward` with one segment of a text after the other."""
        return Memory(self.config.n_layer, self.config.mem_len, self.config.reuse_len)

    def new_cache(self, batch: int, length: int) -> Memory:
        """What `hidden` needs to continue a text token by token. It grows as it is used: the sizes are not needed."""
        return Memory(self.config.n_layer, self.config.mem_len)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        memory: Memory | None = None,
        cache: Memory | None = None,
    ) -> Tensor:
        """States before the head: (B, T, D) of the tokens, or (B, n, D) of the predictions at `target_mapping`.

        `attention_mask` is (B, T), or longer by what came before; where it is not, all of the memory may be seen. The
        target mapping is (B, n), the positions, or as in transformers (B, n, T), zeros with a one in each row. With a
        `cache`, tokens continue those of the call before, and (B, 1, D) is the prediction of the one behind them.
        Position ids are ignored: distances need no numbers.

        Raises ValueError where packed rows come with a memory or orders, and where a batch to read backwards is odd.
        """
        # Packed rows are unpacked and padded, since the bias of distances needs a row for each text.
        if cu_seqlens is not None:
            if any(extra is not None for extra in (perm_mask, target_mapping, memory, cache)) or self.config.bi_data:
                raise ValueError("cu_seqlens: packed rows have no perm_mask, target_mapping, memory, cache or bi_data")
            ids, mask, flat_index = unpacked(input_ids, cu_seqlens, max_seqlen)  # (n, T), (n, T), (N,)
            types = token_type_ids
            if types is not None:
                types = ids.new_zeros(ids.numel()).index_copy(0, flat_index, types[0]).view_as(ids)  # (n, T)
            return self.hidden(ids, mask, types).flatten(0, 1)[flat_index][None]  # (1, N, D)
        if cache is not None:
            if any(extra is not None for extra in (token_type_ids, perm_mask, target_mapping, memory)):
                raise ValueError("cache: it goes on with a text of one type, in its own order; leave out the rest")
            return self._predict_next(input_ids, attention_mask, cache)
        if target_mapping is not None and self.task != "causal-lm":
            raise ValueError(f"target_mapping: it is for predicting tokens, and this model's task is {self.task}")
        b, t = input_ids.shape
        if self.config.bi_data and b % 2:
            raise ValueError(f"bi_data reads half of the rows backwards; a batch of {b} has no half")

        # The two streams at their beginning, and the distances that every layer attends by.
        c = self.config
        past = 0 if memory is None else memory.length
        h = self.embed.tokens(input_ids)  # (B, T, D)
        table = sinusoids(t, past + t, c.d_model, c.clamp_len, c.bi_data, h)  # (G, P, D), see `blocks.py`
        g = positions = None
        if target_mapping is not None:
            positions = target_positions(target_mapping)  # (B, n)
            g = self.embed.mask.expand(b, positions.shape[1], -1)  # (B, n, D)
        content, query = views(c, t, past, attention_mask, token_type_ids, perm_mask, positions, h.device)

        for i, block in enumerate(self.layers):
            assert isinstance(block, Block)
            keys = block.keys(h if memory is None else memory.extend(i, h), table)
            if g is None or i + 1 < c.n_layer:
                h = block(h, keys, content)
            if g is not None:
                g = block(g, keys, query)
        return h if g is None else g

    def _predict_next(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Memory) -> Tensor:
        """The prediction (B, 1, D) behind the tokens (B, T) of a text of which `cache` remembers what came before.

        It stands at a position of its own at the end, which no token sees. The newest token is not remembered but read
        once more with those that follow, and so sees one of them, as in transformers.
        """
        tokens = input_ids if cache.last_token is None else torch.cat((cache.last_token, input_ids), 1)

        # One more position, where the prediction stands. Its token is arbitrary: nothing sees it but itself.
        tokens = F.pad(tokens, (0, 1))
        b, t = tokens.shape
        unseen = torch.zeros(1, t, t, dtype=torch.bool, device=tokens.device)
        unseen[:, :, -1] = True
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        last = tokens.new_full((b, 1), t - 1)
        states = self.hidden(tokens, attention_mask, perm_mask=unseen, target_mapping=last, memory=cache)

        cache.forget(2)  # the position of the prediction, and the newest token
        cache.last_token = input_ids[:, -1:]
        return states

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
        """What the head makes of the states: causal-lm gives (B, T, V), or (B, n, V) at a target mapping.

        token-classification gives (B, T, C); question-answering (B, T, 2); sequence-classification (B, C) and reward
        (B,), read at the last token; embedding (B, D). `inputs` are further arguments of `hidden`.
        """
        states = self.hidden(input_ids, attention_mask, **inputs)
        return self.head(self.pool(states, input_ids, attention_mask, inputs.get("cu_seqlens")))

    def key_map(self) -> dict[str, CheckpointKey]:
        """Our parameter names → their names in published checkpoints of this task."""
        base = "" if self.task == "embedding" else self.base_prefix
        table = {
            "embed.tokens.weight": CheckpointKey((f"{base}word_embedding.weight",)),
            "embed.mask": CheckpointKey((f"{base}mask_emb",), shape=(1, 1, self.config.d_model)),
        }
        for i, block in enumerate(self.layers):
            assert isinstance(block, Block)
            table |= {f"layers.{i}.{key}": source for key, source in block.key_map(f"{base}layer.{i}").items()}
        return table | self._head_keys()

    def _head_keys(self) -> dict[str, CheckpointKey]:
        if self.task == "causal-lm":
            names = ("bias",) if self.config.tied else ("weight", "bias")
            return {f"head.{name}": CheckpointKey((f"lm_loss.{name}",)) for name in names}
        out = {"token-classification": "classifier", "question-answering": "qa_outputs"}.get(self.task, "logits_proj")
        table = {}
        for key, _ in self.head.named_parameters():
            theirs = f"{out}.{key.removeprefix('out.')}"
            if key.startswith("pooler."):
                theirs = f"sequence_summary.summary.{key.removeprefix('pooler.')}"
            table[f"head.{key}"] = CheckpointKey((theirs,))
        return table

    @classmethod
    def read_config(cls, published: dict[str, Any]) -> XLNetConfig:
        """The configuration in a published config.json."""
        return read_config(published)

    def write_config(self) -> dict[str, Any]:
        """config.json as transformers writes it."""
        return write_config(self.config)

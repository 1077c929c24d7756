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
types of a pair are 0 and 1, and are only compared; memory is of type 0. Dropout of the distances has one mask for all
rows, in transformers one for each.

Distances give a bias for each pair, so that rows can't be laid end to end (`attention` takes no bias with segments):
packed rows are accepted, but computed padded.
"""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import Linear
from ...kernels.dropout import Dropout
from ..layers.inputs import unpacked
from ..layers.key_map import TIED, CheckpointKey
from ..model import PretrainedModel
from .blocks import Block, Memory, sinusoids, target_positions, views
from .config import PRESETS, XLNetConfig


class Embed(nn.Module):
    """Token embedding, and the vector `mask` (1, D) that every prediction starts from."""

    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.mask = nn.Parameter(torch.zeros(1, config.d_model))


class XLNet(PretrainedModel):
    """XLNet with the head of a task; see `PretrainedModel` for what it has from there.

    As a language model it gives (B, T, V), or with a target mapping (B, n, V).
    """

    title = "XLNet"
    model_types: ClassVar = {"xlnet": "XLNet"}
    config_class = XLNetConfig
    presets = PRESETS
    architectures: ClassVar = {
        "causal-lm": "XLNetLMHeadModel",
        "sequence-classification": "XLNetForSequenceClassification",
        "reward": "XLNetForSequenceClassification",
        "token-classification": "XLNetForTokenClassification",
        "question-answering": "XLNetForQuestionAnsweringSimple",
        "embedding": "XLNetModel",
    }
    base_prefix = ("transformer.",)
    objectives: ClassVar = {"pretrain": "permutation-lm", "sft": "ordered-lm"}
    # One table of distances serves all rows.
    position_modules = ("layers.*.r",)
    lora_targets: ClassVar = {
        "attention": ("layers.*.q", "layers.*.kv", "layers.*.r", "layers.*.o"),
        "mlp": ("layers.*.up", "layers.*.down"),
    }
    head_keys: ClassVar = {
        "lm_loss.*": ("causal-lm",),
        "logits_proj.*": ("sequence-classification", "reward"),
        "sequence_summary.*": ("sequence-classification", "reward"),
        "classifier.*": ("token-classification",),
        "qa_outputs.*": ("question-answering",),
    }
    # Texts end in <cls>, which is read.
    text_head: ClassVar = {"pooler": "tanh"}
    text_pooling = "last"
    published_dropout = True
    tasks_with_dropout = ("sequence-classification", "reward")
    tied_keys: ClassVar = {"lm_loss.weight": ("embed.tokens.weight", TIED)}
    supported_config_values: ClassVar = {
        "untie_r": (True,),
        "summary_type": ("last",),
        "summary_use_proj": (True,),
        "summary_activation": ("tanh",),
    }

    config: XLNetConfig

    def build(self, config: XLNetConfig) -> None:
        """The embedding and the blocks, each of which ends with a norm."""
        self.embed = Embed(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.dropout = Dropout(config.dropout)

    def build_language_head(self) -> nn.Module:
        """The output matrix (V, D), with a bias."""
        return Linear(self.config.d_model, self.config.vocab_size)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fresh weights: N(0, 0.02²), for the vectors added to queries and the one of predictions, too."""
        super().initialize()
        self.embed.mask.normal_(0.0, 0.02)
        for block in self.layers:
            assert isinstance(block, Block)
            for parameter in (block.content_bias, block.distance_bias, block.text_bias, block.texts):
                parameter.normal_(0.0, 0.02)

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
        h = self.dropout(self.embed.tokens(input_ids))  # (B, T, D)
        table = self.dropout(sinusoids(t, past + t, c.d_model, c.clamp_len, c.bi_data, h))  # (G, P, D), see `blocks.py`
        g = positions = None
        if target_mapping is not None:
            positions = target_positions(target_mapping)  # (B, n)
            g = self.dropout(self.embed.mask.expand(b, positions.shape[1], -1))  # (B, n, D)
        content, query = views(c, t, past, attention_mask, token_type_ids, perm_mask, positions, h.device)

        for i, block in enumerate(self.layers):
            assert isinstance(block, Block)
            keys = block.keys(h if memory is None else memory.extend(i, h), table)
            if g is None or i + 1 < c.n_layer:
                h = block(h, keys, content)
            if g is not None:
                g = block(g, keys, query)
        return self.dropout(h if g is None else g)

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

    def checkpoint_keys(self) -> dict[str, str | CheckpointKey]:
        """Our modules and parameters → the published ones, of which the projections are raw tensors (D, H, hd)."""
        d = self.config.d_model
        n_head = self.config.n_head
        attention = "layer.{i}.rel_attn"
        raw = partial(CheckpointKey, shape=(d, n_head, d // n_head))
        return {
            "embed.tokens": "word_embedding",
            "embed.mask": CheckpointKey(("mask_emb",), shape=(1, 1, d)),
            "layers.{i}.q.weight": raw((f"{attention}.q",), transposed=True),
            "layers.{i}.kv.weight": raw((f"{attention}.k", f"{attention}.v"), transposed=True),
            "layers.{i}.r.weight": raw((f"{attention}.r",), transposed=True),
            "layers.{i}.o.weight": raw((f"{attention}.o",)),
            "layers.{i}.content_bias": f"{attention}.r_w_bias",
            "layers.{i}.distance_bias": f"{attention}.r_r_bias",
            "layers.{i}.text_bias": f"{attention}.r_s_bias",
            "layers.{i}.texts": f"{attention}.seg_embed",
            "layers.{i}.norm1": f"{attention}.layer_norm",
            "layers.{i}.up": "layer.{i}.ff.layer_1",
            "layers.{i}.down": "layer.{i}.ff.layer_2",
            "layers.{i}.norm2": "layer.{i}.ff.layer_norm",
            "head.pooler": "sequence_summary.summary",
        }

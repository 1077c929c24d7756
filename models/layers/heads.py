"""Task heads and the pooling in front of them.

A model is `head(pool(hidden(...)))`. `hidden` gives (B, T, D); `pool` picks what the head reads: every position, the
first one (BERT's [CLS]), the last one (GPT-2), or their mean; `head` turns it into logits. Rows come padded with
an attention mask (B, T), or packed end to end in one row with bounds `cu_seqlens` (n + 1,).

Which token of a text is the last one is not for us to choose: transformers' classifiers of decoders look for the last
id that isn't config.json's `pad_token_id`, whatever the mask says. Where eos pads, too, that is the token before the
text's eos. So it is here, padded or packed, in training as in use: `last_unpadded`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, activate
from ...kernels.activations import soft_capped
from ...kernels.dropout import Dropout

TASKS = (
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "embedding",
    "reward",
)
LABELLED = ("sequence-classification", "token-classification", "image-classification")
MAX_LAYERS = 100  # of a head
TEXT_TASKS = ("sequence-classification", "reward")  # tasks whose head reads one state of a text


def n_outputs(task: str, labels: tuple[str, ...]) -> int:
    """Width of the task's output; ValueError where the task needs labels and has none."""
    if task in LABELLED:
        if not labels:
            raise ValueError(f"task {task!r} needs labels: pass labels=[...] (names) or their number")
        return len(labels)
    return {"question-answering": 2, "reward": 1}[task]


def pool_tokens(pooling: str, states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """One vector a row (B, D) from states (B, T, D), or (1, N, D) packed; `pooling`: "first", "last", "mean", "max"."""
    all_tokens = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)  # (B, T)
    if pooling in ("first", "last"):
        chosen = all_tokens if pooling == "last" else ~all_tokens
        return states.flatten(0, 1)[last_position(chosen, attention_mask, cu_seqlens)]  # (B, D)

    sum_dtype = torch.promote_types(states.dtype, torch.float32)  # a sum over a row in half precision would be rough
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().long()  # (B,)
        return torch.segment_reduce(states[0].to(sum_dtype), pooling, lengths=lengths).to(states.dtype)  # (B, D)

    mask = all_tokens if attention_mask is None else attention_mask.bool()
    if pooling == "max":
        return states.masked_fill(~mask[..., None], torch.finfo(states.dtype).min).amax(1)  # (B, D)
    weights = mask[..., None].to(sum_dtype)  # (B, T, 1)
    return ((states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)).to(states.dtype)  # (B, D)


def last_position(chosen: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Where each row's last token among the `chosen` (B, T), or packed (1, N), stands in them laid end to end: (B,).

    It is the row's first token where none is chosen.
    """
    b, t = chosen.shape
    columns = torch.arange(t, device=chosen.device)
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].long()  # (B,)
        lengths = cu_seqlens.diff().long()
        rows = torch.arange(len(starts), device=chosen.device).repeat_interleave(lengths, output_size=t)  # (N,)
        # The highest column of each segment's chosen tokens. `starts` holds what counts where there are none.
        return starts.scatter_reduce(0, rows, columns * chosen[0], "amax")  # (B,)

    mask = torch.ones_like(chosen) if attention_mask is None else attention_mask.bool()
    first = mask.int().argmax(1)  # (B,); of equals argmax gives the first
    last = (columns * (chosen & mask)).amax(1)  # (B,); 0 where none is chosen
    return torch.arange(b, device=chosen.device) * t + torch.maximum(first, last)


def last_unpadded(
    states: Tensor, input_ids: Tensor, pad_id: int | None, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The state (B, D) of each row's last token that isn't `pad_id`, as transformers' classifiers of decoders read it.

    Of a row of nothing else, the first state. Without a pad id it is the last token.
    """
    if pad_id is None:
        return pool_tokens("last", states, attention_mask, cu_seqlens)
    index = last_position(input_ids != pad_id, attention_mask, cu_seqlens)  # (B,)
    return states.flatten(0, 1)[index]  # (B, D)


class MLPHead(nn.Module):
    """(..., D) → (..., C): `layers` − 1 hidden layers with GELU, then a projection.

    `pooler`: the activation of a projection (D, D) in front of it all, where there is one, as in BERT.
    `scalar`: the one output of a reward is given as (...,). `dropout` is the published one in front of the projection,
    where there is one, and, if `drop_input`, of the whole head.
    """

    def __init__(
        self,
        d_model: int,
        n_out: int,
        layers: int = 1,
        bias: bool = True,
        pooler: str | None = None,
        scalar: bool = False,
        dropout: float | None = None,
        drop_input: bool = False,
    ):
        super().__init__()
        if not 1 <= layers <= MAX_LAYERS:
            raise ValueError(f"head_layers: expected a number from 1 to {MAX_LAYERS}, got {layers}")
        self.scalar = scalar
        self.pooler = Linear(d_model, d_model) if pooler else None
        self.pooler_activation = pooler or ""
        self.hidden = nn.ModuleList(Linear(d_model, d_model) for _ in range(layers - 1))
        self.out = Linear(d_model, n_out, bias=bias)
        self.dropout = None if dropout is None else Dropout(dropout)
        self.input_dropout = None if dropout is None or not drop_input else Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_dropout is not None:
            x = self.input_dropout(x)
        if self.pooler is not None:
            x = activate(self.pooler(x), self.pooler_activation)
        for layer in self.hidden:
            x = activate(layer(x), "gelu")
        if self.dropout is not None:
            x = self.dropout(x)
        x = self.out(x)  # (..., C)

        if self.scalar:
            return x.squeeze(-1)  # (...,)
        return x


class CappedLinear(Linear):
    """An output matrix (V, D) without a bias, whose logits stay within ±softcap, as in Gemma 2."""

    def __init__(self, d_model: int, vocab_size: int, softcap: float):
        super().__init__(d_model, vocab_size, bias=False)
        self.softcap = softcap

    def forward(self, x: Tensor) -> Tensor:
        return soft_capped(super().forward(x), self.softcap)  # (..., V)


class MaskedLMHead(nn.Module):
    """BERT's masked-LM head: dense, activation, norm, then the token embedding as output matrix, with a bias (V,).

    `weight` is the embedding's parameter; `bias` and `norm_bias`: whether dense and norm have one. A loss applies
    `transform` to the masked positions alone and does the rest with `linear_cross_entropy`.
    """

    def __init__(self, weight: Tensor, activation: str, eps: float, bias: bool = True, norm_bias: bool = True):
        super().__init__()
        vocab_size, d_model = weight.shape
        self.dense = Linear(d_model, d_model, bias)
        self.norm = LayerNorm(d_model, eps, norm_bias)
        self.activation = activation
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def transform(self, x: Tensor) -> Tensor:
        """What the output matrix is applied to, (..., D)."""
        return self.norm(activate(self.dense(x), self.activation))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.transform(x), self.weight, self.bias)  # (..., V)


class DenseLayer(NamedTuple):
    """A projection of pooled vectors, as sentence-transformers stores it in a folder of its own."""

    folder: str  # its name, "2_Dense" for example
    n_in: int
    n_out: int
    bias: bool
    activation: str | None  # a name that `activate` knows


class Pooling(NamedTuple):
    """How an embedder makes a vector of a text's states."""

    mode: str = "mean"  # as `pool_tokens` takes it
    dense: tuple[DenseLayer, ...] = ()
    normalize: bool = False  # at unit length


MEAN = Pooling()


class EmbeddingHead(nn.Module):
    """The pooled vector (B, D) behind its projections, where there are any, at unit length if it is normalised."""

    def __init__(self, d_model: int, pooling: Pooling):
        super().__init__()
        self.pooling = pooling
        for layer, width in zip(pooling.dense, (d_model, *(layer.n_out for layer in pooling.dense)), strict=False):
            if layer.n_in != width:
                raise ValueError(f"{layer.folder}: in_features = {layer.n_in}, but what it reads has {width} entries")
        self.dense = nn.ModuleList(Linear(layer.n_in, layer.n_out, layer.bias) for layer in pooling.dense)

    def forward(self, x: Tensor) -> Tensor:
        for linear, layer in zip(self.dense, self.pooling.dense, strict=True):
            x = linear(x)
            if layer.activation is not None:
                x = activate(x, layer.activation)
        return F.normalize(x, dim=-1) if self.pooling.normalize else x

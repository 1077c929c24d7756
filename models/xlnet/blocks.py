"""XLNet's layer: attention by relative distance for either of two streams, and the memory of earlier segments.

Dai et al. 2019 (Transformer-XL), arXiv:1901.02860, section 3; Yang et al. 2019 (XLNet), arXiv:1906.08237, 2.2 to 2.5.
With a query at position i, a key at j, and R the sinusoids of a distance:

    score(i, j) = (q + u) · k  +  (q + v) · W R(i − j)  +  (q + w) · s          all divided by √hd
    s = s₀ where i and j are in one text, s₁ where they are in two; no such term where no types are given

u, v, w (H, hd) are learned, in each layer anew. The first term is left to the attention kernel; the other two are its
`bias` (B, H, T, S). In the second, q meets one vector for each distance rather than for each pair: (q + v) Wᵀ R is
(B, H, T, P) for P = S + T distances from S down to 1 − T, whose row i holds the scores of its keys in S neighbouring
columns, from T − i on. `by_distance` moves them to where they belong.

Shapes: B rows, T tokens of this segment, M remembered ones, S = M + T keys, n predictions, D = d_model, H heads, hd the
width of one, P distances, G tables of distances (two where half of the batch is read backwards, else one).
"""

from dataclasses import dataclass
from functools import reduce
from operator import and_

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, activate, activation_linear, attention
from ...kernels.dropout import Dropout
from ..layers.config_fields import ACTIVATIONS
from ..layers.inputs import hides_nothing
from .config import XLNetConfig


class Memory:
    """What each layer read in earlier segments (B, M, D), so that the next one can attend to it; no gradient enters.

    `max_length`: keep the last so many positions, None all. `reuse_length`: of each segment keep only the first so
    many, None all.
    """

    def __init__(self, n_layer: int, max_length: int | None = None, reuse_length: int | None = None):
        self.states: list[Tensor | None] = [None] * n_layer
        self.max_length = max_length
        self.reuse_length = reuse_length
        self.last_token: Tensor | None = None  # the newest of a text that is being generated, (B, 1)

    @property
    def length(self) -> int:
        """M, the positions remembered."""
        return 0 if self.states[0] is None else self.states[0].shape[1]

    def extend(self, layer: int, h: Tensor) -> Tensor:
        """Remember h (B, T, D) too; gives what was there before with h behind it, (B, M + T, D)."""
        past = self.states[layer]
        context = h if past is None else torch.cat((past, h), 1)  # (B, M + T, D)
        remembered = context.detach()
        if self.reuse_length is not None:
            past_length = context.shape[1] - h.shape[1]
            remembered = remembered[:, : past_length + self.reuse_length]
        if self.max_length is not None:
            remembered = remembered[:, -self.max_length :]
        self.states[layer] = remembered
        return context

    def forget(self, count: int) -> None:
        """Drop the newest `count` positions."""
        self.states = [None if state is None else state[:, :-count] for state in self.states]

    def rewind(self, n_cached: int, length: int) -> int:
        """Begin anew; gives 0, the positions that stay: what was read together has seen what followed it."""
        self.states = [None] * len(self.states)
        self.last_token = None
        return 0

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows (B,) instead of the present ones; a row may be taken several times."""
        self.states = [None if state is None else state[rows] for state in self.states]
        if self.last_token is not None:
            self.last_token = self.last_token[rows]


@dataclass(frozen=True)
class View:
    """What the queries of a stream may see, and how they stand to the keys."""

    # bool, broadcastable to (B, 1, T, S); None where every key may be seen
    allowed: Tensor | None
    # bool (B, T, S), whether the key is of another text than the query; None where no types are given
    other_text: Tensor | None
    # (B, T, S), which of the P distances lies between each pair; None where the queries are the last T of the S
    # positions in order
    distance_index: Tensor | None = None


def views(
    config: XLNetConfig,
    t: int,
    past: int,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    perm_mask: Tensor | None,
    positions: Tensor | None,
    device: torch.device,
) -> tuple[View, View]:
    """What T tokens behind `past` remembered ones may see, and what the predictions at `positions` (B, n) of them."""
    s = past + t
    key = torch.arange(s, device=device)  # (S,)
    query = key[past:, None]  # (T, 1)

    # What holds for both streams: each rule is (B or 1, T or 1, S), and all of them must allow a pair.
    rules = []
    if attention_mask is not None and not hides_nothing(attention_mask):
        mask = attention_mask.bool()[:, None, -s:]
        rules.append(F.pad(mask, (s - mask.shape[-1], 0), value=True))  # memory counts as real where the mask is short
    if perm_mask is not None:
        rules.append(F.pad(~perm_mask.bool(), (past, 0), value=True))
    if config.causal:
        rules.append((key <= query)[None])
        if config.same_length:
            rules.append((key >= query - past)[None])
    other_text = None
    if token_type_ids is not None:
        key_types = F.pad(token_type_ids, (past, 0))  # (B, S); memory is of type 0
        other_text = token_type_ids[:, :, None] != key_types[:, None]  # (B, T, S)

    # A token of the content stream always sees itself; in the query stream it would read off what it should predict.
    visible = content_allowed = None
    if rules:
        visible = reduce(and_, rules)  # (B or 1, T or 1, S)
        content_allowed = (visible | (key == query))[:, None]  # (B or 1, 1, T, S)
    content = View(content_allowed, other_text)
    if positions is None:
        return content, content

    query_allowed = None
    if visible is not None:
        query_allowed = _rows_at(visible, positions, t)[:, None]  # (B, 1, n, S)
    if other_text is not None:
        other_text = _rows_at(other_text, positions, t)  # (B, n, S)
    return content, View(query_allowed, other_text, distance_index=t - positions[..., None] + key)


def _rows_at(pairs: Tensor, positions: Tensor, t: int) -> Tensor:
    """Of (B or 1, T or 1, S), the rows at the positions (B, n): (B, n, S)."""
    batch = torch.arange(len(positions), device=pairs.device)[:, None]
    return pairs.expand(len(positions), t, -1)[batch, positions]


def target_positions(target_mapping: Tensor) -> Tensor:
    """Positions (B, n) of a target mapping, which may be positions already."""
    if target_mapping.dim() == 2:
        return target_mapping
    if not bool(((target_mapping != 0).sum(-1) == 1).all()):
        raise ValueError("target_mapping: expected a single one in each row; a prediction stands at one position")
    return target_mapping.argmax(-1)


def sinusoids(t: int, s: int, d_model: int, clamp_len: int | None, mirrored: bool, like: Tensor) -> Tensor:
    """R (1, P, D) for the distances S, S − 1, ..., 1 − T, at most `clamp_len` either way; sines, then cosines.

    `mirrored`: (2, P, D), the second for rows that are read backwards, with the distances' signs turned.
    """
    distance = torch.arange(s, -t, -1, device=like.device).float()  # (P,)
    if clamp_len is not None:
        distance = distance.clamp(-clamp_len, clamp_len)
    signed = torch.stack((distance, -distance)) if mirrored else distance[None]  # (G, P)
    frequency = 10000 ** (-torch.arange(0, d_model, 2, device=like.device).float() / d_model)  # (D/2,)
    angle = signed[..., None] * frequency  # (G, P, D/2)
    return torch.cat((angle.sin(), angle.cos()), -1).to(like.dtype)  # (G, P, D)


def by_distance(scores: Tensor, s: int, distance_index: Tensor | None) -> Tensor:
    """Scores of each query and key (B, H, T, S) from those of each query and distance (B, H, T, P).

    Queries in order: pair (i, j) is at column T − i + j. In the flattened rows, which are P long, that is index
    T + i(P − 1) + j: without the first T numbers, and cut into rows of P − 1, the scores stand in their columns.
    """
    if distance_index is not None:
        n_head = scores.shape[1]
        return scores.gather(-1, distance_index[:, None].expand(-1, n_head, -1, -1))  # (B, H, T, S)
    t, p = scores.shape[-2:]
    flat = scores.flatten(-2)[..., t:]  # (B, H, T·(P − 1))
    return flat.unflatten(-1, (t, p - 1))[..., :s]  # (B, H, T, S)


class Block(nn.Module):
    """One layer, with the same weights for both streams: attention and feed-forward, each added and then normalised."""

    def __init__(self, config: XLNetConfig):
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        hd = d // self.n_head

        self.q = Linear(d, d, bias=False)
        self.kv = Linear(d, 2 * d, bias=False, parts=(("k", d), ("v", d)))  # these read the memory too, q doesn't
        self.r = Linear(d, d, bias=False)  # W of the distances
        self.o = Linear(d, d, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(self.n_head, hd))  # u
        self.distance_bias = nn.Parameter(torch.zeros(self.n_head, hd))  # v
        self.text_bias = nn.Parameter(torch.zeros(self.n_head, hd))  # w
        self.texts = nn.Parameter(torch.zeros(2, self.n_head, hd))  # s₀ and s₁

        self.up = Linear(d, config.d_ff)
        self.down = Linear(config.d_ff, d)
        self.norm1 = LayerNorm(d, config.eps)
        self.norm2 = LayerNorm(d, config.eps)
        self.activation = ACTIVATIONS[config.activation]
        self.scale = hd**-0.5
        self.dropout = Dropout(config.dropout)

    def keys(self, context: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k and v (B, S, H, hd) of the states (B, S, D) that may be seen, and the projected distances (G, P, H, hd)."""
        k, v = self.kv(context).unflatten(-1, (2, self.n_head, -1)).unbind(2)  # (B, S, H, hd)
        r = self.r(table[None])[0]  # (G, P, D); one table for all rows, which adapters by row can't be on
        return k, v, r.unflatten(-1, (self.n_head, -1))  # (G, P, H, hd)

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor, Tensor], view: View) -> Tensor:
        """The next states of one stream (B, T, D)."""
        k, v, r = keys
        q = self.q(x).unflatten(-1, (self.n_head, -1))  # (B, T, H, hd)
        bias = self.bias(q, r, k.shape[1], view)  # (B, H, T, S)
        out = attention(
            q + self.content_bias, k, v, bias=bias, causal=False, scale=self.scale, dropout=self.dropout.rate
        )  # (B, T, H, hd)
        x = self.norm1(self.dropout(self.o(out.flatten(2))), residual=x)  # (B, T, D)
        return self.norm2(self.dropout(self.feed_forward(x)), residual=x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, T, D) from states (B, T, D), with dropout in front of the last projection."""
        u = self.up(x)  # (B, T, F)
        if not self.dropout.rate:
            return activation_linear(u, self.activation, self.down)
        return self.down(self.dropout(activate(u, self.activation)))

    def bias(self, q: Tensor, r: Tensor, s: int, view: View) -> Tensor:
        """The scores of distance and text (B, H, T, S), with what is not allowed at the least finite number."""
        # Each part of the batch has its own table of distances, where the second half is read backwards.
        q_distance = (q + self.distance_bias).unflatten(0, (len(r), -1))  # (G, B/G, T, H, hd)
        scores = torch.einsum("gbthd,gphd->gbhtp", q_distance, r).flatten(0, 1)  # (B, H, T, P)
        bias = by_distance(scores, s, view.distance_index)  # (B, H, T, S)

        if view.other_text is not None:
            same, other = torch.einsum("bthd,nhd->nbht", q + self.text_bias, self.texts)[..., None]  # (B, H, T, 1)
            bias = bias + torch.where(view.other_text[:, None], other, same)
        bias = bias * self.scale
        if view.allowed is not None:
            bias = bias.masked_fill(~view.allowed, torch.finfo(bias.dtype).min)
        return bias

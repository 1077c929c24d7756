"""XLNet's layer: attention by relative distance for either of two streams, and the memory of earlier segments.

Dai et al. 2019 (Transformer-XL), arXiv:1901.02860, section 3; Yang et al. 2019 (XLNet), arXiv:1906.08237, 2.2 to 2.5.
With a query at position i, a key at j, and R the sinusoids of a distance:

    score(i, j) = (q + u) · k  +  (q + v) · W R(i − j)  +  (q + w) · s          all divided by √hd
    s = s₀ where i and j are in one text, s₁ where they are in two; no such term where no types are given

u, v, w (H, hd) are learned, in each layer anew. The first term is left to the attention kernel; the other two are its
`bias` (B, H, T, S). In the second, q meets one vector for each distance rather than for each pair: (q + v) Wᵀ R is
(B, H, T, P) for P = S + T distances from S down to 1 − T, whose row i holds the scores of its keys in S neighbouring
columns, from T − i on. `by_distance` moves them to where they belong.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import LayerNorm, Linear, activation_linear, attention
from ..layers.config_fields import ACTIVATIONS
from ..layers.key_map import CheckpointKey
from .config import XLNetConfig


class Memory:
    """What each layer read in earlier segments (B, M, D), so that the next one can attend to it; no gradient enters.

    `longest`: keep the last so many positions, None all. `reuse`: of a segment, keep the first so many, None all.
    """

    def __init__(self, n_layer: int, longest: int | None = None, reuse: int | None = None):
        self.states: list[Tensor | None] = [None] * n_layer
        self.longest, self.reuse = longest, reuse
        self.last: Tensor | None = None  # of a text that is being generated, the newest token (B, 1)

    @property
    def length(self) -> int:
        """M, the positions remembered."""
        return 0 if self.states[0] is None else self.states[0].shape[1]

    def extend(self, layer: int, h: Tensor) -> Tensor:
        """Remember h (B, T, D) too; gives what was there before with h behind it, (B, M + T, D)."""
        past = self.states[layer]
        before = 0 if past is None else past.shape[1]
        whole = h if past is None else torch.cat((past, h), 1)
        stop = whole.shape[1] if self.reuse is None else before + self.reuse
        kept = whole[:, :stop].detach()
        self.states[layer] = kept if self.longest is None else kept[:, -self.longest :]
        return whole

    def forget(self, count: int) -> None:
        """Drop the newest `count` positions."""
        self.states = [None if state is None else state[:, :-count] for state in self.states]

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows (B,) in the place of the present ones; a row may be taken several times."""
        self.states = [None if state is None else state[rows] for state in self.states]
        self.last = None if self.last is None else self.last[rows]


@dataclass(frozen=True)
class View:
    """What the queries of a stream may see, and how they stand to the keys.

    `allowed`: bool, broadcastable to (B, 1, T, S); None is everything. `other`: bool (B, T, S), where the key is of
    another text than the query; None where no types are given. `columns` (B, T, S): where in the P distances each pair
    finds its own; None where the queries are the last T of the S positions in order.
    """

    allowed: Tensor | None
    other: Tensor | None
    columns: Tensor | None = None


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
    column = torch.arange(s, device=device)
    place = column[past:, None]
    rules = []
    if attention_mask is not None and not bool(attention_mask.all()):
        mask = attention_mask.bool()[:, None, -s:]
        rules.append(F.pad(mask, (s - mask.shape[-1], 0), value=True))
    if perm_mask is not None:
        rules.append(F.pad(~perm_mask.bool(), (past, 0), value=True))
    if config.causal:
        rules.append((column <= place)[None])
        if config.same_length:
            rules.append((column >= place - past)[None])
    seen = None
    for rule in rules:
        seen = rule if seen is None else seen & rule
    other = None
    if token_type_ids is not None:
        other = token_type_ids[:, :, None] != F.pad(token_type_ids, (past, 0))[:, None]
    content = View(None if seen is None else (seen | (column == place))[:, None], other)
    if positions is None:
        return content, content
    rows = _rows(seen, positions, t)
    return content, View(
        None if rows is None else rows[:, None], _rows(other, positions, t), t - positions[..., None] + column
    )


def _rows(pairs: Tensor | None, positions: Tensor, t: int) -> Tensor | None:
    """Of (B or 1, T or 1, S), the rows at the positions (B, n): (B, n, S)."""
    if pairs is None:
        return None
    batch = torch.arange(len(positions), device=pairs.device)[:, None]
    return pairs.expand(len(positions), t, -1)[batch, positions]


def target_positions(target_mapping: Tensor) -> Tensor:
    """Positions (B, n) of a target mapping, which may be positions already."""
    if target_mapping.dim() == 2:
        return target_mapping
    if not bool(((target_mapping != 0).sum(-1) == 1).all()):
        raise ValueError("target_mapping: expected a single one in each row; a prediction stands at one position")
    return target_mapping.argmax(-1)


def sinusoids(t: int, s: int, d_model: int, clamp: int | None, mirrored: bool, like: Tensor) -> Tensor:
    """R (1, P, D) for the distances S, S − 1, ..., 1 − T, at most `clamp` either way; sines, then cosines.

    `mirrored`: (2, P, D), the second for rows that are read backwards, with the distances' signs turned.
    """
    distance = torch.arange(s, -t, -1, device=like.device).float()
    if clamp is not None:
        distance = distance.clamp(-clamp, clamp)
    signed = torch.stack((distance, -distance)) if mirrored else distance[None]
    frequency = 10000 ** (-torch.arange(0, d_model, 2, device=like.device).float() / d_model)
    angle = signed[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), -1).to(like.dtype)


def by_distance(scores: Tensor, s: int, columns: Tensor | None) -> Tensor:
    """Scores of each query and key (B, H, T, S) from those of each query and distance (B, H, T, P).

    Queries in order: pair (i, j) is at column T − i + j. In the flattened rows, which are P long, that is place
    T + i(P − 1) + j: without the first T numbers, and cut into rows of P − 1, they stand as wanted.
    """
    if columns is not None:
        return scores.gather(-1, columns[:, None].expand(-1, scores.shape[1], -1, -1))
    t, p = scores.shape[-2:]
    return scores.flatten(-2)[..., t:].unflatten(-1, (t, p - 1))[..., :s]


class Block(nn.Module):
    """One layer, with the same weights for both streams: attention and feed-forward, each added and then normalised."""

    def __init__(self, config: XLNetConfig):
        super().__init__()
        d, self.n_head = config.d_model, config.n_head
        hd = d // self.n_head
        self.q = Linear(d, d, bias=False)
        self.kv = Linear(d, 2 * d, bias=False, parts=(("k", d), ("v", d)))  # these read the memory too, q doesn't
        self.r = Linear(d, d, bias=False)
        self.o = Linear(d, d, bias=False)
        self.content_bias, self.distance_bias, self.text_bias = (
            nn.Parameter(torch.zeros(self.n_head, hd)) for _ in range(3)
        )
        self.texts = nn.Parameter(torch.zeros(2, self.n_head, hd))
        self.up = Linear(d, config.d_ff)
        self.down = Linear(config.d_ff, d)
        self.norm1, self.norm2 = LayerNorm(d, config.eps), LayerNorm(d, config.eps)
        self.activation = ACTIVATIONS[config.activation]
        self.scale = hd**-0.5

    def keys(self, context: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k and v (B, S, H, hd) of the states that may be seen, and the projected distances (1 or 2, P, H, hd)."""
        k, v = self.kv(context).unflatten(-1, (2, self.n_head, -1)).unbind(2)
        r = self.r(table[None])[0]  # one table for all rows, which adapters by row can't be on
        return k, v, r.unflatten(-1, (self.n_head, -1))

    def key_map(self, theirs: str) -> dict[str, CheckpointKey]:
        """Our parameter names → their names in the published layer `theirs`."""
        d = self.q.in_features
        raw = (d, self.n_head, d // self.n_head)
        tensors = {"q": ("q",), "kv": ("k", "v"), "r": ("r",), "o": ("o",)}
        biases = {"content": "r_w_bias", "distance": "r_r_bias", "text": "r_s_bias"}
        modules = {"norm1": "rel_attn.layer_norm", "up": "ff.layer_1", "down": "ff.layer_2", "norm2": "ff.layer_norm"}
        table = {"texts": CheckpointKey((f"{theirs}.rel_attn.seg_embed",))}
        for ours, name in biases.items():
            table[f"{ours}_bias"] = CheckpointKey((f"{theirs}.rel_attn.{name}",))
        for ours, names in tensors.items():
            parts = tuple(f"{theirs}.rel_attn.{name}" for name in names)
            rows = (d, d) if len(names) > 1 else ()
            table[f"{ours}.weight"] = CheckpointKey(parts, rows, transposed=ours != "o", shape=raw)
        for ours, name in modules.items():
            for kind in ("weight", "bias"):
                table[f"{ours}.{kind}"] = CheckpointKey((f"{theirs}.{name}.{kind}",))
        return table

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor, Tensor], view: View) -> Tensor:
        """The next states of one stream (B, T, D)."""
        k, v, r = keys
        q = self.q(x).unflatten(-1, (self.n_head, -1))  # (B, T, H, hd)
        bias = self.bias(q, r, k.shape[1], view)
        out = attention(q + self.content_bias, k, v, bias=bias, causal=False, scale=self.scale)
        x = self.norm1(self.o(out.flatten(2)), residual=x)
        return self.norm2(activation_linear(self.up(x), self.activation, self.down), residual=x)

    def bias(self, q: Tensor, r: Tensor, s: int, view: View) -> Tensor:
        """The scores of distance and text (B, H, T, S), with what is not allowed at the least finite number."""
        halves = (q + self.distance_bias).unflatten(0, (len(r), -1))
        scores = torch.einsum("gbthd,gphd->gbhtp", halves, r).flatten(0, 1)
        bias = by_distance(scores, s, view.columns)
        if view.other is not None:
            same, other = torch.einsum("bthd,nhd->nbht", q + self.text_bias, self.texts)[..., None]
            bias = bias + torch.where(view.other[:, None], other, same)
        bias = bias * self.scale
        return bias if view.allowed is None else bias.masked_fill(~view.allowed, torch.finfo(bias.dtype).min)

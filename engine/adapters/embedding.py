"""Adapters on an embedding: the layer that carries them, and an adapter's factors.

Shapes: ids (B, T) of a vocabulary of V, vectors of width D, rank R. y = W[ids] + s Aᵀ[ids] Bᵀ
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.lora.dora import rescale, row_norms
from ...kernels.lora.factors import Merged
from ...kernels.lora.per_row import AdapterRows


class LoRAEmbeddingWeights(nn.Module):
    """An adapter on an embedding: `a` (R, V), zero, and `b` (D, R), N(0, 1), as PEFT starts them. fp32 masters."""

    def __init__(self, vocab: int, d_model: int, rank: int, scale: float, device: torch.device | None = None):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, vocab, device=device))
        self.b = nn.Parameter(torch.randn(d_model, rank, device=device))
        self.scale = scale
        self.m: nn.Parameter | None = None  # DoRA's magnitudes of the columns (D,)
        self.lr_ratio = 1.0  # of B's learning rate to A's
        self.paused: tuple[str, ...] = ()  # the parameters that train when it is the adapter in use

    @torch.no_grad()
    def add_magnitudes(self, weight: Tensor) -> None:
        """Train the magnitudes of the columns of the weight (V, D), too; they start as they are."""
        self.m = nn.Parameter(self._norms(weight))

    def _norms(self, weight: Tensor) -> Tensor:
        return row_norms(weight.T, self.a, self.b, self.scale)  # (D,)

    def gain(self, weight: Tensor) -> Tensor:
        """DoRA's g (D,) for the weight (V, D)."""
        assert self.m is not None
        return self.m / self._norms(weight)

    def merged(self, weight: Tensor) -> Tensor:
        """What the weight (V, D) becomes, in fp32."""
        fp32 = weight.to(torch.promote_types(weight.dtype, torch.float32))
        value = fp32 + self.scale * (self.b @ self.a).T  # (V, D)
        return value if self.m is None else value * self.gain(weight)


class LoRAEmbedding(nn.Module):
    """An embedding that can carry adapters; it holds the wrapped embedding's own weight (V, D)."""

    def __init__(self, base: nn.Embedding):
        super().__init__()
        self.weight = base.weight
        self.padding_idx = base.padding_idx
        self.num_embeddings = base.num_embeddings
        self.embedding_dim = base.embedding_dim

        self.lora = nn.ModuleDict()
        self.active: str | AdapterRows | None = None
        self.merged: Merged | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.active, AdapterRows):
            return self.active.apply(ids, ids.dim(), self.active.on(self.lora), self._look_up)
        return self._look_up(ids, self.active)

    def _look_up(self, ids: Tensor, adapter: str | None) -> Tensor:
        y = F.embedding(ids, self.weight, self.padding_idx)  # (B, T, D)
        if adapter is None:
            return y

        factors: LoRAEmbeddingWeights = self.lora[adapter]  # type: ignore[assignment]
        low_rank = F.embedding(ids, factors.a.T.to(y.dtype))  # (B, T, R)
        y = y + factors.scale * (low_rank @ factors.b.T.to(y.dtype))  # (B, T, D)
        return y if factors.m is None else rescale(y, factors.gain(self.weight), None)

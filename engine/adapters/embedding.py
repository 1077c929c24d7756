"""`LoRAEmbedding`: an embedding that can carry adapters.

Shapes: ids (B, T) of a vocabulary of V, vectors of width D, rank R. y = W[ids] + s Aᵀ[ids] Bᵀ
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.lora.dora import rescale
from ...kernels.lora.factors import LinearPart, Merged
from ...kernels.lora.matrix_factors import LoRAMatrixWeights
from ...kernels.lora.per_row import AdapterRows


class LoRAEmbedding(nn.Module):
    """An embedding that can carry adapters; it holds the wrapped embedding's own weight (V, D)."""

    def __init__(self, base: nn.Embedding):
        super().__init__()
        self.weight = base.weight
        self.padding_idx = base.padding_idx
        self.num_embeddings = base.num_embeddings
        self.embedding_dim = base.embedding_dim
        self.parts = (LinearPart("", 0, base.embedding_dim),)

        self.lora = nn.ModuleDict()
        self.active: str | AdapterRows | None = None
        self.merged: Merged | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight as (D, V), a projection of one-hot vectors."""
        return self.weight.T

    def new_adapter(
        self, parts: list[LinearPart], ranks: list[int], scales: list[float], dropout: float
    ) -> LoRAMatrixWeights:
        """A fresh adapter, not attached yet: `a` (R, V), zero, and `b` (D, R), N(0, 1), as in PEFT, without dropout."""
        vocab_size, d_model = self.weight.shape
        a = torch.zeros(ranks[0], vocab_size, device=self.weight.device)
        b = torch.randn(d_model, ranks[0], device=self.weight.device)
        return LoRAMatrixWeights(parts[0], a, b, scales[0])

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.active, AdapterRows):
            return self.active.apply(ids, ids.dim(), self.active.on(self.lora), self._look_up)
        return self._look_up(ids, self.active)

    def _look_up(self, ids: Tensor, adapter: str | None) -> Tensor:
        y = F.embedding(ids, self.weight, self.padding_idx)  # (B, T, D)
        if adapter is None:
            return y

        factors: LoRAMatrixWeights = self.lora[adapter]  # type: ignore[assignment]
        low_rank = F.embedding(ids, factors.a.T.to(y.dtype))  # (B, T, R)
        y = y + factors.scale * (low_rank @ factors.b.T.to(y.dtype))  # (B, T, D)
        return y if factors.m is None else rescale(y, factors.gain(self.matrix), None)

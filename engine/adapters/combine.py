"""One adapter out of several: the weighted sum of their corrections, exactly or in a given rank.

Σ wᵢ sᵢ Bᵢ Aᵢ is itself of low rank: its factors are the Aᵢ one above the other and the wᵢ sᵢ Bᵢ side by side. With a
rank to keep, QR of both and the SVD of the small core Rb Raᵀ give its best approximation (Eckart and Young 1936)
without the matrix itself. It is not what PEFT calls "linear", which averages the A's and the B's: the product of
averages is no average of products.

Shapes: a weight (M, K), A (R, K) and B (M, R); ΣR is the sum of the ranks of the adapters.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...kernels import Conv2d, Linear, LoRALinearWeights
from ...kernels.conv import LoRAConvWeights
from .config import is_finite
from .embedding import LoRAEmbedding, LoRAEmbeddingWeights
from .locking import with_adapter_lock
from .lora import adapter_sites, check_adapter_name, prepare_for_adapter, refuse_merged
from .modules_to_save import trained_outside_adapters
from .switch import check_attached, set_adapter
from .wrapping import Adaptable, LoRAWeights

Pair = tuple[Tensor, Tensor]  # A (R, K) and B (M, R)


@with_adapter_lock
@torch.no_grad()
def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str, rank: int | None = None) -> None:
    """Attach the weighted sum of the adapters named in `weights` as `name`, and make it active; the others stay.

    `combine_adapters(model, {"law": 0.7, "tone": 0.3}, "both")`. Without `rank` it is exact, and its rank the sum of
    theirs; else each module gets at most that rank, the best approximation of the sum.

    Raises ValueError, with the model unchanged, for an adapter that isn't there, is a DoRA, or has more than factors (a
    head, norms, token rows), a name that is taken, weights that are none or not finite, a rank below 1, or an adapter
    on a convolution in groups.
    """
    check_adapter_name(model, name)
    refuse_merged(model)
    _check_summable(model, weights, rank)

    # All sums come before the first change, since one of them can fail.
    combined = []
    for site in adapter_sites(model):
        present = {adapter: weight for adapter, weight in weights.items() if adapter in site.module.lora}
        if present:
            combined.append((site.module, _combined(site.path, site.module, present, rank)))

    prepare_for_adapter(model)
    for module, factors in combined:
        module.lora[name] = factors.train(module.training)
    set_adapter(model, name)


def _check_summable(model: nn.Module, weights: Mapping[str, float], rank: int | None) -> None:
    if not weights or not all(is_finite(weight) for weight in weights.values()):
        raise ValueError(f"weights: expected a finite number for each of some adapters, got {dict(weights)}")
    check_attached(model, *weights)
    if rank is not None and rank < 1:
        raise ValueError(f"rank: expected a positive number, got {rank}")
    for adapter in weights:
        if trained := sorted(trained_outside_adapters(model, adapter)):
            raise ValueError(
                f"{trained[0]} belongs to {adapter!r}, and such a tensor can't be added up; merge it into the base "
                "instead"
            )
    for site in adapter_sites(model):
        for adapter in weights:
            if adapter in site.module.lora and site.module.lora[adapter].m is not None:
                raise ValueError(
                    f"{adapter!r} is a DoRA, whose magnitudes can't be added up; merge it into the base instead"
                )


def _combined(path: str, module: Adaptable, weights: Mapping[str, float], rank: int | None) -> LoRAWeights:
    """The sum of the adapters on one module."""
    if isinstance(module, Linear):
        return _combined_linear(module, weights, rank)
    if isinstance(module, LoRAEmbedding):
        return _combined_embedding(module, weights, rank)
    if module.groups > 1:
        raise ValueError(
            f"{path} is a convolution in {module.groups} groups, each with a rank of its own: no sum of them"
        )
    return _combined_convolution(module, weights, rank)


def _combined_linear(module: Linear, weights: Mapping[str, float], rank: int | None) -> LoRALinearWeights:
    # Each adapter sits on some parts of a fused projection, and each part has a sum of its own.
    pairs: dict[int, list[Pair]] = {}
    for adapter, weight in weights.items():
        factors: LoRALinearWeights = module.lora[adapter]  # type: ignore[assignment]
        for part, scale, a, b in factors.blocks():
            pairs.setdefault(module.parts.index(part), []).append((a, weight * scale * b))

    indices = sorted(pairs)
    parts = [module.parts[index] for index in indices]
    sums = [_sum(pairs[index], rank) for index in indices]
    ranks = [len(a) for a, _ in sums]
    out = LoRALinearWeights(module.in_features, parts, ranks, [1.0] * len(parts), device=module.weight.device)
    out.a.data = torch.cat([a for a, _ in sums])  # (ΣR, K)
    for parameter, (_, b) in zip(out.b, sums, strict=True):
        parameter.data = b  # (M, R) of the part
    return out


def _combined_embedding(module: LoRAEmbedding, weights: Mapping[str, float], rank: int | None) -> LoRAEmbeddingWeights:
    pairs = []
    for adapter, weight in weights.items():
        factors: LoRAEmbeddingWeights = module.lora[adapter]  # type: ignore[assignment]
        pairs.append((factors.a, weight * factors.scale * factors.b))
    a, b = _sum(pairs, rank)  # (R, V), (D, R)

    out = LoRAEmbeddingWeights(module.num_embeddings, module.embedding_dim, len(a), 1.0, a.device)
    out.a.data = a
    out.b.data = b
    return out


def _combined_convolution(module: Conv2d, weights: Mapping[str, float], rank: int | None) -> LoRAConvWeights:
    pairs = []
    for adapter, weight in weights.items():
        factors: LoRAConvWeights = module.lora[adapter]  # type: ignore[assignment]
        pairs.append((factors.a.flatten(1), weight * factors.scale * factors.b.flatten(1)))
    a, b = _sum(pairs, rank)  # (R, C·k·k), (M, R)

    out = LoRAConvWeights(module, len(a), 1.0)
    out.a.data = a.view(len(a), *out.a.shape[1:])  # (R, C, k, k)
    out.b.data = b[..., None, None]  # (M, R, 1, 1)
    return out


def _sum(pairs: Sequence[Pair], rank: int | None) -> Pair:
    """The factors of Σ B A, of at most this rank."""
    a = torch.cat([a for a, _ in pairs])  # (ΣR, K)
    b = torch.cat([b for _, b in pairs], 1)  # (M, ΣR)
    if rank is None or rank >= len(a):
        return a, b

    # B A = Qb (Rb Raᵀ) Qaᵀ, and the core between the orthogonal matrices has the singular values of the product.
    q_b, r_b = torch.linalg.qr(b)  # (M, ΣR), (ΣR, ΣR)
    q_a, r_a = torch.linalg.qr(a.T)  # (K, ΣR), (ΣR, ΣR)
    u, singular_values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)

    # Each factor takes the root of the singular values, so that the two are of one size.
    root = singular_values[:rank].sqrt()  # (R,)
    return (v[:rank] * root[:, None]) @ q_a.T, q_b @ (u[:, :rank] * root)  # (R, K), (M, R)

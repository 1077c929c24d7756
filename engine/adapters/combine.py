"""One adapter out of several: the weighted sum of their corrections, exactly or in a given rank.

Σ wᵢ sᵢ Bᵢ Aᵢ is itself of low rank: its factors are the Aᵢ one above the other and the wᵢ sᵢ Bᵢ side by side. With a
rank to keep, QR of both and the SVD of the small core Rb Raᵀ give its best approximation (Eckart and Young 1936)
without the matrix itself. It is not what PEFT calls "linear", which averages the A's and the B's: the product of
averages is no average of products.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...kernels import Conv2d, Linear, LoRALinearWeights
from ...kernels.conv import LoRAConvWeights
from .belongings import belongings_of
from .config import is_finite
from .embedding import LoRAEmbedding, LoRAEmbeddingWeights
from .lora import adapter_sites, check_name, make_room, refuse_merged
from .switch import adapter_names, set_adapter
from .turns import taking_turns
from .wrapping import Adaptable, LoRAWeights

Pair = tuple[Tensor, Tensor]  # A (R, K) and B (M, R)


@taking_turns
@torch.no_grad()
def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str, rank: int | None = None) -> None:
    """Attach the weighted sum of the adapters named in `weights` as `name`, and make it active; the others stay.

    `combine_adapters(model, {"law": 0.7, "tone": 0.3}, "both")`. Without `rank` it is exact, and its rank the sum of
    theirs; else each module gets at most that rank, the best approximation of the sum.

    Raises ValueError, with the model unchanged, for an adapter that isn't there, is a DoRA, or has more than factors (a
    head, norms, token rows), a name that is taken,
    weights that are none or not finite, a rank below 1, or an adapter on a convolution in groups.
    """
    check_name(model, name)
    refuse_merged(model)
    _check(model, weights, rank)
    made = []
    for slot in adapter_sites(model):
        used = {key: weight for key, weight in weights.items() if key in slot.module.lora}
        if used:
            made.append((slot.module, _combined(slot.path, slot.module, used, rank)))
    make_room(model)
    for module, factors in made:
        module.lora[name] = factors.train(module.training)
    set_adapter(model, name)


def _check(model: nn.Module, weights: Mapping[str, float], rank: int | None) -> None:
    known = adapter_names(model)
    if not weights or not all(is_finite(weight) for weight in weights.values()):
        raise ValueError(f"weights: expected a finite number for each of some adapters, got {dict(weights)}")
    if lacking := [name for name in weights if name not in known]:
        raise ValueError(f"there is no adapter {lacking[0]!r}; attached: {', '.join(known) or 'none'}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank: expected a positive number, got {rank}")
    for name in weights:
        if trained := sorted(belongings_of(model, name)):
            raise ValueError(
                f"{trained[0]} belongs to {name!r}, and such a tensor can't be added up; merge it into the base instead"
            )
    for slot in adapter_sites(model):
        for name in weights:
            if name in slot.module.lora and slot.module.lora[name].m is not None:
                raise ValueError(
                    f"{name!r} is a DoRA, whose magnitudes can't be added up; merge it into the base instead"
                )


def _combined(path: str, module: Adaptable, weights: Mapping[str, float], rank: int | None) -> LoRAWeights:
    """The sum on one module."""
    if isinstance(module, Linear):
        return _combined_projection(module, weights, rank)
    if isinstance(module, LoRAEmbedding):
        pairs = []
        for name, weight in weights.items():
            of_embedding: LoRAEmbeddingWeights = module.lora[name]  # type: ignore[assignment]
            pairs.append((of_embedding.a, weight * of_embedding.scale * of_embedding.b))
        a, b = _sum(pairs, rank)
        out = LoRAEmbeddingWeights(module.num_embeddings, module.embedding_dim, len(a), 1.0, a.device)
        out.a.data, out.b.data = a, b
        return out
    if module.groups > 1:
        raise ValueError(
            f"{path} is a convolution in {module.groups} groups, each with a rank of its own: no sum of them"
        )
    return _combined_convolution(module, weights, rank)


def _combined_projection(module: Linear, weights: Mapping[str, float], rank: int | None) -> LoRALinearWeights:
    found: dict[int, list[Pair]] = {}
    for name, weight in weights.items():
        own: LoRALinearWeights = module.lora[name]  # type: ignore[assignment]
        for part, scale, a, b in own.blocks():
            found.setdefault(module.parts.index(part), []).append((a, weight * scale * b))
    sums = {index: _sum(pairs, rank) for index, pairs in sorted(found.items())}
    parts, ranks = [module.parts[index] for index in sums], [len(a) for a, _ in sums.values()]
    out = LoRALinearWeights(module.in_features, parts, ranks, [1.0] * len(parts), device=module.weight.device)
    out.a.data = torch.cat([a for a, _ in sums.values()])
    for own_b, (_, b) in zip(out.b, sums.values(), strict=True):
        own_b.data = b
    return out


def _combined_convolution(module: Conv2d, weights: Mapping[str, float], rank: int | None) -> LoRAConvWeights:
    pairs = []
    for name, weight in weights.items():
        own: LoRAConvWeights = module.lora[name]  # type: ignore[assignment]
        pairs.append((own.a.flatten(1), weight * own.scale * own.b.flatten(1)))
    a, b = _sum(pairs, rank)
    out = LoRAConvWeights(module, len(a), 1.0)
    out.a.data, out.b.data = a.view(len(a), *out.a.shape[1:]), b[..., None, None]
    return out


def _sum(pairs: Sequence[Pair], rank: int | None) -> Pair:
    """LoRAWeights of Σ B A, of at most this rank."""
    a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
    if rank is None or rank >= len(a):
        return a, b
    left, of_b = torch.linalg.qr(b)
    right, of_a = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(of_b @ of_a.T, full_matrices=False)
    root = values[:rank].sqrt()
    return (v[:rank] * root[:, None]) @ right.T, left @ (u[:, :rank] * root)

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

from ...kernels.lora.factors import LinearPart, PartWeights
from .config import is_finite
from .locking import with_adapter_lock
from .lora import AdapterSite, adapter_sites, check_adapter_name, prepare_for_adapter, refuse_merged
from .modules_to_save import trained_outside_adapters
from .switch import check_attached, set_adapter
from .wrapping import LoRAWeights, n_groups

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
            combined.append((site.module, _combined(site, present, rank)))

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
            if adapter in site.adapters and site.adapters[adapter].m is not None:
                raise ValueError(
                    f"{adapter!r} is a DoRA, whose magnitudes can't be added up; merge it into the base instead"
                )


def _combined(site: AdapterSite, weights: Mapping[str, float], rank: int | None) -> LoRAWeights:
    """The sum of the adapters on one module."""
    if (groups := n_groups(site.module)) > 1:
        raise ValueError(
            f"{site.path} is a convolution in {groups} groups, each with a rank of its own: no sum of them"
        )

    # Each adapter sits on some parts of a fused projection, and each part has a sum of its own.
    pairs: dict[LinearPart, list[Pair]] = {}
    for adapter, weight in weights.items():
        for block in site.adapters[adapter].blocks():
            scaled = weight * block.scale * block.b
            pairs.setdefault(block.part, []).append((block.a.flatten(1), scaled.flatten(1)))

    parts = [part for part in site.module.parts if part in pairs]
    sums = [_sum(pairs[part], rank) for part in parts]
    combined = site.module.new_adapter(parts, [len(a) for a, _ in sums], [1.0] * len(parts), dropout=0.0)
    combined.fill([PartWeights(part, 1.0, a, b) for part, (a, b) in zip(parts, sums, strict=True)])
    return combined


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

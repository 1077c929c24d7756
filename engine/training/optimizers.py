"""Which optimizer updates which parameter: `train.optimizer`.

    adamw      all of them, with moments in fp32
    adamw8bit  the same with moments in eight bits, but for parameters of fewer than 4,096 entries
    muon       Muon for the matrices between embedding and head; AdamW for embeddings, heads, convolutions, vectors

Muon's authors advise the last: an embedding's rows and a head's are each a vector of their own, not one linear map. The
factors of an adapter are matrices, too, and the parts of a fused projection are one each, as they are published.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ...kernels import Linear, LoRALinearWeights
from ...kernels.dropout import refuse_in_graph
from ...kernels.optim.adamw import adamw_
from ...kernels.optim.adamw8bit import MIN_SIZE, adamw8bit_
from ...kernels.optim.adamw8bit_state import AdamW8bitParam
from ...kernels.optim.adamw_state import AdamWParam
from ...kernels.optim.blockwise import BLOCK, n_blocks
from ...kernels.optim.muon import MuonParam, muon_
from ..parallel.sharding import is_shard

TrainedParam = AdamWParam | AdamW8bitParam | MuonParam
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
# What the heads of models are called here and elsewhere.
HEADS = {"head", "lm_head", "score", "classifier", "qa_outputs"}


def update_(
    trained: Iterable[TrainedParam], lr: float, betas: tuple[float, float], eps: float, factor: Tensor | None
) -> None:
    """One update of each parameter that has a gradient, by the optimizer that its state belongs to.

    RuntimeError where a CUDA graph is being recorded.
    """
    refuse_in_graph("the learning rate")
    params = list(trained)
    adamw_([param for param in params if isinstance(param, AdamWParam)], lr, betas, eps, factor)
    adamw8bit_([param for param in params if isinstance(param, AdamW8bitParam)], lr, betas, eps, factor)
    muon_([param for param in params if isinstance(param, MuonParam)], lr, factor)


def states_for(
    optimizer: str, model: nn.Module, trained: Mapping[str, nn.Parameter], rows: Iterable[str]
) -> dict[str, Callable[[Tensor], TrainedParam]]:
    """What makes the state of those `trained` parameters that AdamW in fp32 doesn't update, by name.

    Of the parameters in `rows` only some rows train. ValueError where Muon would find no matrix, and where a matrix is
    in shards, which Muon and blocks of eight bits would cut otherwise than one process does.
    """
    if optimizer != "adamw" and any(map(is_shard, trained.values())):
        raise ValueError(
            f'train.optimizer = "{optimizer}": the matrices that train are in shards, which adamw alone updates; take '
            'adamw, or parallel.shard = "none"'
        )
    if optimizer == "adamw8bit":
        return {name: AdamW8bitParam for name, p in trained.items() if p.numel() >= MIN_SIZE and name not in rows}
    if optimizer != "muon":
        return {}

    matrices = {name: sizes for name, sizes in hidden_matrices(model).items() if name in trained}
    if not matrices:
        raise ValueError(
            'train.optimizer = "muon": it updates the matrices between embedding and head, and none of them trains; '
            'take "adamw", or train more of the model'
        )
    others = len(trained) - len(matrices)
    tqdm.write(f"Muon updates {len(matrices)} matrices, AdamW the {others} other parameters", file=sys.stderr)
    return {name: partial(MuonParam, rows=sizes) for name, sizes in matrices.items()}


def moments_bytes(optimizer: str, model: nn.Module, sizes: Mapping[str, int], rows: Iterable[str]) -> int:
    """Bytes of the moments that an optimizer keeps of so many entries each, by the parameter's name.

    Of the parameters in `rows` only some rows train.
    """
    matrices = hidden_matrices(model) if optimizer == "muon" else {}
    total = 0
    for name, size in sizes.items():
        if name in matrices:
            total += 4 * size
        elif optimizer == "adamw8bit" and size >= MIN_SIZE and name not in rows:
            total += n_blocks(size) * 2 * (BLOCK + 4)  # codes, and a scale in fp32
        else:
            total += 8 * size
    return total


def hidden_matrices(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The matrices of linear layers below the head, and the factors of adapters on these: how many rows each part has.

    By name, in the order of the model.
    """
    matrices: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if HEADS & set(path.split(".")):
            continue
        sizes: dict[str, Any] = {}
        if isinstance(module, LoRALinearWeights):
            sizes = {"a": module.ranks, **{f"b.{i}": (len(b),) for i, b in enumerate(module.b)}}
        elif isinstance(module, Linear) and module.quantized is None:
            parts = (len(module.weight),) if module.transposed else tuple(part.size for part in module.parts)
            sizes = {"weight": parts}
        elif isinstance(module, nn.Linear):
            sizes = {"weight": (len(module.weight),)}
        matrices |= {f"{path}.{name}": rows for name, rows in sizes.items()}
    return matrices

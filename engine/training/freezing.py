"""What trains: freezing by name, unfreezing on schedule, and what it all costs in memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ..._weightless import is_shard, local
from ...kernels.quant.nf4 import NF4Weight
from ..adapters.lora import active_adapter, adapter_sites
from ..adapters.modules_to_save import (
    forget_trained,
    inactive_tensors,
    mark_trained,
    trained_outside_adapters,
)
from ..adapters.switch import adapter_names
from ..adapters.token_rows import trained_rows
from .cached_features import head_only
from .optimizers import moments_bytes


def match(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters whose names match the shell globs. ValueError for a glob that matches nothing."""
    # A tied head can be asked for by both its names, and goes by the first of them.
    every_name = dict(model.named_parameters(remove_duplicate=False))
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    matched: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        hits = [parameter for name, parameter in every_name.items() if fnmatchcase(name, pattern)]
        if not hits:
            tops = sorted({name.split(".")[0] for name in every_name})
            raise ValueError(f"{pattern!r} matches no parameter; names start with {', '.join(tops)}")
        matched |= {first_name[id(parameter)]: parameter for parameter in hits}
    return matched


def trained_parameters(
    model: nn.Module, unfreeze: Mapping[str, float], lr_scale: Mapping[str, float], by_adapter: bool
) -> dict[str, nn.Parameter]:
    """The parameters that train now or later, by name. ValueError where none trains, or not as it is meant."""
    # Rows reach only the active adapter, unless each row names its own (`by_adapter`).
    for site in adapter_sites(model):
        for name, factors in site.module.lora.items():
            if not by_adapter and name != site.module.active and any(p.requires_grad for p in factors.parameters()):
                raise ValueError(f"adapter {name!r} would train but is not active: set_adapter(model, {name!r}) first")

    # A glob of `lr_scale` that matches nothing is refused here; its factors are the optimizer's business.
    match(model, lr_scale)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad} | match(model, unfreeze)
    if by_adapter and (shared := [name for name in trained if ".lora." not in name]):
        raise ValueError(f"{shared[0]} would train for rows of all adapters: freeze it, or train one adapter at a time")
    if not trained:
        raise ValueError("nothing trains: add_lora(model, ...) or unfreeze(model, ...) first")

    unfreeze_due(model, unfreeze, 0.0)
    if not any(parameter.requires_grad for parameter in trained.values()):
        raise ValueError("unfreeze: nothing trains from the beginning; let a part start at epoch 0")
    return trained


def whole_in_shards(model: nn.Module) -> list[nn.Parameter]:
    """What trains and stays whole in a model that is sharded.

    Beside an adapter, or of a head alone, all, and what else belongs to the adapter; otherwise heads of labels,
    vectors, and matrices of which single rows train. The other matrices are sharded, also where they train.
    """
    factors = {id(p) for site in adapter_sites(model) for each in site.adapters.values() for p in each.parameters()}
    rows = trained_rows(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = active_adapter(model)
    if adapter is not None:
        named = dict(model.named_parameters())
        trained |= {name: named[name] for name in trained_outside_adapters(model, adapter)}
    if head_only(model) or any(id(parameter) in factors for parameter in trained.values()):
        return list(trained.values())
    has_labels = not str(getattr(model, "task", "-lm")).endswith("-lm")
    return [
        parameter
        for name, parameter in trained.items()
        if parameter.dim() < 2 or name in rows or (has_labels and name.startswith("head."))
    ]


def freeze(model: nn.Module, *patterns: str) -> None:
    """Stop training the parameters that match: `freeze(model, "*")`. ValueError for a glob that matches nothing.

    Those of adapters that are not in use, too: they stay frozen once they are. What has not changed yet no longer
    belongs to the active adapter.
    """
    matched = match(model, patterns)
    for parameter in matched.values():
        parameter.requires_grad_(False)
    forget_trained(model, matched.values())

    # Adapters that are not in use: their tensors are set aside, and what was paused would train again with them.
    for adapter in (None, *adapter_names(model)):
        for name, tensor in inactive_tensors(model, adapter).items():
            if tensor is not None and any(fnmatchcase(name, pattern) for pattern in patterns):
                tensor.requires_grad_(False)
    for site in adapter_sites(model):
        for adapter, factors in site.adapters.items():
            prefix = f"{site.path}.lora.{adapter}."
            factors.paused = tuple(key for key in factors.paused if f"{prefix}{key}" not in matched)


def unfreeze(model: nn.Module, *patterns: str) -> None:
    """Train the parameters that match: `unfreeze(model, "head.*")`. They belong to the adapter that is active.

    Raises ValueError for a glob that matches nothing, or a quantised weight.
    """
    matched = match(model, patterns)
    # All are checked before the first one changes.
    for name, parameter in matched.items():
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is of a quantised weight, which can't train: add_lora, or load it in bfloat16")
    for parameter in matched.values():
        parameter.requires_grad_(True)
    mark_trained(model, active_adapter(model))


def unfreeze_due(model: nn.Module, schedule: Mapping[str, float], epoch: float) -> None:
    """Gradual unfreezing (Howard and Ruder 2018, arXiv:1801.06146): train what is due by `epoch`, freeze what is not.

    `schedule` maps globs to the epoch from which their parameters train; of several that match, the earliest counts.
    """
    due = [pattern for pattern, start in schedule.items() if epoch >= start]
    freeze(model, *(schedule.keys() - due))
    unfreeze(model, *due)


def put_into_training(model: nn.Module, schedule: Mapping[str, float], epoch: float) -> None:
    """The model in train mode, what is due by `epoch` (below 0: from the beginning) requiring a gradient."""
    unfreeze_due(model, schedule, max(0.0, epoch))
    train_mode(model)


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but batch norms whose parameters are all frozen keep their statistics, as in `eval()`.

    Statistics that drift under frozen weights change the model behind an adapter's back. The batch norms of this
    project do so by themselves; this is for torch's, in foreign modules.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            params = list(module.parameters(recurse=False))
            module.train(not params or any(parameter.requires_grad for parameter in params))


@dataclass(frozen=True)
class TrainableReport:
    """What trains, in parameters, and what training takes beside activations, in bytes."""

    trainable: int  # parameters
    total: int  # parameters of the model, its adapters' too
    weights: int  # bytes, of a model in shards those of this process, as of what follows
    gradients: int
    optimizer: int
    modules: tuple[tuple[str, int], ...]  # (the first part of its name, or LoRA, and how many of its parameters train)

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        parts = ", ".join(f"{name} {count:,}" for name, count in self.modules) or "nothing"
        mib = 2**20
        return (
            f"trains {self.trainable:,} of {self.total:,} parameters ({share:.2f} %): {parts}\n"
            f"weights {self.weights / mib:.1f} MiB, gradients {self.gradients / mib:.1f} MiB, "
            f"optimizer {self.optimizer / mib:.1f} MiB"
        )


def trainable_report(model: nn.Module, optimizer: str = "adamw", micro_batches: int = 1) -> TrainableReport:
    """Count what trains. The bytes of the optimizer are its moments, and an fp32 master of narrower weights or rows.

    The gradients of a step's `micro_batches` in a process wait for one another in a tree (`parallel/tree.py`), but for
    those in shards.
    """
    total = weights = gradients = masters = trainable = 0
    waiting = max(1, (micro_batches + 1).bit_length() - 1)
    modules: dict[str, int] = {}
    sizes: dict[str, int] = {}  # of what trains, in this process
    rows = trained_rows(model)
    for name, parameter in model.named_parameters():
        here = local(parameter)
        n = parameter.numel()
        total += n
        weights += here.nbytes
        if parameter.requires_grad:
            # Autograd makes a whole gradient also where few rows train; the optimizer's state is theirs alone.
            gradients += here.nbytes if is_shard(parameter) else waiting * here.nbytes
            has_master = parameter.element_size() < 4
            if name in rows:
                n = len(rows[name]) * parameter.shape[1]
                has_master = True
            trainable += n
            sizes[name] = here.numel() if is_shard(parameter) else n
            masters += 4 * sizes[name] if has_master else 0
            group = "LoRA" if ".lora." in name else name.split(".")[0]
            modules[group] = modules.get(group, 0) + n

    # A quantized weight is stored in several tensors, two weights to a byte, but counts as the matrix that it was.
    for module in model.modules():
        if isinstance(module, NF4Weight):
            total += module.shape[0] * module.shape[1] - sum(tensor.numel() for tensor in module.parameters())
    moments = moments_bytes(optimizer, model, sizes, rows)
    return TrainableReport(trainable, total, weights, gradients, moments + masters, tuple(modules.items()))

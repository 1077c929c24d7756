"""Everything that trains: adapters, freezing, data, losses, the loop, checkpoints, generation.

Works on any `nn.Module` with a loss function; the built-in losses need the models of this project. Names are imported
at first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_files import load_adapter as load_adapter
    from .adapter_files import save_adapter as save_adapter
    from .adapters import drop_adapter as drop_adapter
    from .adapters import merge_lora as merge_lora
    from .adapters import set_adapter as set_adapter
    from .adapters import unmerge_lora as unmerge_lora
    from .adapters import use_adapter as use_adapter
    from .checkpoint import load_checkpoint as load_checkpoint
    from .checkpoint import save_checkpoint as save_checkpoint
    from .combine import combine_adapters as combine_adapters
    from .evaluation import evaluate as evaluate
    from .freezing import freeze as freeze
    from .freezing import trainable_report as trainable_report
    from .freezing import unfreeze as unfreeze
    from .generation import generate as generate
    from .loop import TrainConfig as TrainConfig
    from .loop import train as train
    from .lora import add_lora as add_lora
    from .lora_config import LoRAConfig as LoRAConfig
    from .ppo_config import PPOConfig as PPOConfig
    from .ppo_loop import ppo as ppo
    from .quantization import projections as projections
    from .quantization import quantize as quantize
    from .reward import load_reward as load_reward
    from .token_rows import train_rows as train_rows

_HOME = {
    "LoRAConfig": "lora_config",
    "PPOConfig": "ppo_config",
    "TrainConfig": "loop",
    "add_lora": "lora",
    "combine_adapters": "combine",
    "drop_adapter": "adapters",
    "evaluate": "evaluation",
    "freeze": "freezing",
    "generate": "generation",
    "load_adapter": "adapter_files",
    "load_checkpoint": "checkpoint",
    "load_reward": "reward",
    "merge_lora": "adapters",
    "ppo": "ppo_loop",
    "projections": "quantization",
    "quantize": "quantization",
    "save_adapter": "adapter_files",
    "save_checkpoint": "checkpoint",
    "set_adapter": "adapters",
    "train": "loop",
    "train_rows": "token_rows",
    "trainable_report": "freezing",
    "unfreeze": "freezing",
    "unmerge_lora": "adapters",
    "use_adapter": "adapters",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value

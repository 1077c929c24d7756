"""Everything that trains. It works on any `nn.Module` with a loss function; the built-in losses need the models here.

    model  finite  runtime    what the engine may ask of a model; weights that are NaN or infinite; the process of a run
    parallel/                 several processes, whose result is that of one
    formats/  data/           what stands in files; rows, batches
    chat/                     chat templates, and which tokens the assistant wrote
    adapters/  peft/          low-rank adapters, switched and merged; their files, in PEFT's format
    tasks/                    what each method of training means: encoding, loss, score, prediction
    generation/               sampling and beams, with a cache
    training/                 the loop (begin with `training/loop.py`), its optimizer, checkpoints and run folder
    rlhf/                     PPO, reward models

Names are imported at first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.combine import combine_adapters as combine_adapters
    from .adapters.config import LoRAConfig as LoRAConfig
    from .adapters.lora import add_lora as add_lora
    from .adapters.qlora import projections as projections
    from .adapters.qlora import quantize as quantize
    from .adapters.switch import drop_adapter as drop_adapter
    from .adapters.switch import merge_lora as merge_lora
    from .adapters.switch import set_adapter as set_adapter
    from .adapters.switch import unmerge_lora as unmerge_lora
    from .adapters.switch import use_adapter as use_adapter
    from .adapters.token_rows import train_rows as train_rows
    from .generation.sampling import generate as generate
    from .peft.format import load_adapter as load_adapter
    from .peft.format import save_adapter as save_adapter
    from .rlhf.config import PPOConfig as PPOConfig
    from .rlhf.reward_model import load_reward as load_reward
    from .rlhf.run import ppo as ppo
    from .training.checkpoint import load_checkpoint as load_checkpoint
    from .training.checkpoint import save_checkpoint as save_checkpoint
    from .training.config import TrainConfig as TrainConfig
    from .training.evaluation import evaluate as evaluate
    from .training.freezing import freeze as freeze
    from .training.freezing import trainable_report as trainable_report
    from .training.freezing import unfreeze as unfreeze
    from .training.loop import train as train
    from .training.watching import Callback as Callback

# The module of each name. An import of the package alone loads none of them.
_HOME = {
    "Callback": "training.watching",
    "LoRAConfig": "adapters.config",
    "PPOConfig": "rlhf.config",
    "TrainConfig": "training.config",
    "add_lora": "adapters.lora",
    "combine_adapters": "adapters.combine",
    "drop_adapter": "adapters.switch",
    "evaluate": "training.evaluation",
    "freeze": "training.freezing",
    "generate": "generation.sampling",
    "load_adapter": "peft.format",
    "load_checkpoint": "training.checkpoint",
    "load_reward": "rlhf.reward_model",
    "merge_lora": "adapters.switch",
    "ppo": "rlhf.run",
    "projections": "adapters.qlora",
    "quantize": "adapters.qlora",
    "save_adapter": "peft.format",
    "save_checkpoint": "training.checkpoint",
    "set_adapter": "adapters.switch",
    "train": "training.loop",
    "train_rows": "adapters.token_rows",
    "trainable_report": "training.freezing",
    "unfreeze": "training.freezing",
    "unmerge_lora": "adapters.switch",
    "use_adapter": "adapters.switch",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # Python asks this function no second time
    return value

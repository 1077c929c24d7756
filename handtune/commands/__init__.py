"""What the commands of the command line do, one file a command."""

import argparse
from collections.abc import Callable

from .chat import run_chat
from .check_data import run_check_data
from .compare import run_compare
from .config import run_config
from .evaluate import run_evaluate
from .generate import run_generate
from .label import run_label
from .merge import run_merge
from .ppo import run_ppo
from .predict import run_predict
from .report import run_report
from .train import run_train

_FOR_CONFIGURATIONS = 'set model.dtype = "bfloat16", or model.quantize = "nf4", or take a smaller model'
_FOR_OPTIONS = "use --dtype bfloat16 or fewer --batch-size, or take a smaller model"
# What to do where memory runs out, unless the code that ran out of it gives better advice.
LESS_MEMORY = {
    **dict.fromkeys(("train", "check-data", "ppo"), _FOR_CONFIGURATIONS),
    **dict.fromkeys(("compare", "generate", "label", "predict"), _FOR_OPTIONS),
    "chat": "use --dtype bfloat16, or take a smaller model",
    "evaluate": "end what else runs here, or train and evaluate with shorter rows (data.max_length)",
    "merge": "end what else runs here; the largest tensor, and what the adapter changes of it, must fit in memory",
    "report": "end what else runs here, or compare fewer runs",
    "config": "end what else runs here",
}

# The function of each command, in the file of its name.
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": run_train,
    "check-data": run_check_data,
    "chat": run_chat,
    "compare": run_compare,
    "config": run_config,
    "evaluate": run_evaluate,
    "generate": run_generate,
    "label": run_label,
    "merge": run_merge,
    "ppo": run_ppo,
    "predict": run_predict,
    "report": run_report,
}

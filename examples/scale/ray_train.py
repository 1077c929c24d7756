"""Start a run in the workers of Ray Train: `python examples/scale/ray_train.py 32 run.toml [train.lr=1e-4 ...]`.

Ray starts the processes, sets up torch.distributed among them, and starts them anew where one is lost; the run then
goes on from its last checkpoint. `pip install 'ray[train]'`.
"""

import sys
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from handtune.cli import main


def work(settings: dict[str, Any]) -> None:
    """What each worker does: the command, which finds the others as Ray has introduced them."""
    if code := main(["train", *settings["arguments"]]):
        raise RuntimeError(f"handtune train ended with exit code {code}")


if __name__ == "__main__":
    n_workers, *arguments = sys.argv[1:]
    scaling = ScalingConfig(num_workers=int(n_workers), use_gpu=torch.cuda.is_available())
    run = RunConfig(failure_config=FailureConfig(max_failures=3))
    TorchTrainer(work, train_loop_config={"arguments": arguments}, scaling_config=scaling, run_config=run).fit()

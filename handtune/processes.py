"""A command that a launcher such as torchrun has started in several processes: they meet, and they end together.

A launcher tells each process by the environment how many there are, which one it is, and where the first can be met.
The first one speaks; the others are silent, unless they fail. Where a process fails, one says so: the first of all if
they fail alike, else the one that met the fault, with its rank. All end with exit code 2, as for any mistake; where a
process was killed, the others notice as soon as they wait for it.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from .terminal import Stream

if TYPE_CHECKING:
    from torch.nn import Parameter

    from .config import PPORunConfig, RunConfig
    from .engine.parallel.sharding import Sharding
    from .models.checkpoint.local_rows import ShardFn

# The commands whose work is shared; of any other, each process does all.
DIVIDED = ("train", "ppo", "evaluate", "generate", "predict")
TOGETHER = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells
TIMEOUT = timedelta(minutes=30)  # in which a process waits for others that are still there
PATIENCE = 1.0  # seconds in which the first process may report a mistake that all have met


def n_processes() -> int:
    """How many processes a launcher has started together."""
    if _have_met():
        return int(sys.modules["torch.distributed"].get_world_size())
    told = all(name in os.environ for name in TOGETHER)
    return int(os.environ["WORLD_SIZE"]) if told else 1


def _have_met() -> bool:
    """Whether the launcher has brought the processes together itself, as Ray does."""
    return "torch.distributed" in sys.modules and bool(sys.modules["torch.distributed"].is_initialized())


@contextmanager
def together(command: str) -> Iterator[None]:
    """Inside, the processes of a command know each other, and all but the first are silent."""
    if command not in DIVIDED or n_processes() == 1:
        yield
        return

    import torch.distributed as dist

    meets = not _have_met()
    if meets:
        _meet()
    if dist.get_rank() == 0:
        yield
    else:
        silence = cast(TextIO, Stream(None))
        with redirect_stdout(silence), redirect_stderr(silence):
            yield
    if meets:
        dist.destroy_process_group()


def _meet() -> None:
    """Bring the processes together. ValueError where they can't meet."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        # torchrun's store outlives a failed attempt: without names of their own, the processes of the next one would
        # look for those of the last.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"handtune/{attempt}", store)
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"the processes could not meet at {address}: {_first_line(error)}") from error


def sharding_of(config: "RunConfig | PPORunConfig", folder: Path | None) -> "Sharding":
    """How the processes of a run hold its model, whose weights lie in `folder`. ValueError where they can't so."""
    import torch

    from .config import RunConfig
    from .engine.parallel.sharding import Sharding

    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder is not None else 0
    if config.model.quantize is not None:
        n_bytes //= 3  # of 16 bits a little over 4, but for embedding and head
    device = "cuda" if config.model.device != "cpu" and torch.cuda.is_available() else "cpu"
    sharding = Sharding(config.parallel.shard, n_bytes, torch.device(device))
    if sharding.mode != "none" and isinstance(config, RunConfig) and config.train.unfreeze:
        raise ValueError(
            f'train.unfreeze: a model in shards (parallel.shard = "{config.parallel.shard}") trains the same weights '
            'from beginning to end; leave it out, or shard = "none"'
        )
    return sharding


def while_loading(config: "RunConfig | PPORunConfig", sharding: "Sharding") -> "ShardFn | None":
    """What puts a model into shards as it is loaded: each layer, and what is outside of them where nothing changes it.

    None where an adapter to go on from brings matrices of layers that stay whole.
    """
    from .adapted.starting import brings_matrices
    from .config import RunConfig
    from .engine.adapters.targets import adapts_embeddings

    start = config.model.adapter
    if sharding.mode == "none" or (start is not None and brings_matrices(start)):
        return None

    # The vocabulary may grow, or come with the adapter, and heads may train alone, and stay whole then.
    outside_changes = start is not None or bool(config.model.add_tokens)
    beside_adapter: list[str] = []  # patterns of what trains beside an adapter, and stays whole
    if isinstance(config, RunConfig):
        lora = config.lora
        outside_changes |= bool(config.freeze.token_rows) or not config.trains_adapter
        beside_adapter = config.freeze.except_ if config.trains_adapter else []
    else:
        lora = config.ppo.lora

    def shard(part: Any, named: "dict[str, Parameter]") -> None:
        whole = [p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in beside_adapter)]
        if hasattr(part, "head"):  # the model, for what is in no layer
            if outside_changes or (lora is not None and adapts_embeddings(part, lora.targets)):
                return
            if not part.task.endswith("-lm"):
                whole += part.head.parameters()
        elif all(name.startswith("head.") for name in named):  # a layer of a head
            return
        sharding.put(part, whole)

    return shard


def of_one_process(error: BaseException, code: int, line: str) -> tuple[int, str]:
    """The exit code and the line of this process, where an error ends it; without a line where another one speaks."""
    import torch.distributed as dist

    # Before they have met, all meet the same mistakes.
    if not dist.is_initialized():
        return code, line if os.environ["RANK"] == "0" else ""
    rank = dist.get_rank()
    # A process that is gone leaves an error of the network to those that wait for it.
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        code = 2
        line = (
            "another process of this run has ended, or was killed (for want of memory, say); the same command goes on "
            "from the last checkpoint"
        )
        time.sleep(PATIENCE)
    if not line:  # an interrupt
        return code, line

    if rank > 0:
        time.sleep(PATIENCE)
    store = dist.distributed_c10d._get_default_store()
    with suppress(RuntimeError):  # of a store that went down with the process that held it
        if store.add("failed", 1) > 1:
            return code, ""
        # The first process may hold the store, which the others ask whether they are to speak.
        until = time.monotonic() + 2 * PATIENCE
        while rank == 0 and store.add("failed", 0) < dist.get_world_size() and time.monotonic() < until:
            time.sleep(0.05)
    return code, line if rank == 0 else f"rank {rank}: {line}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

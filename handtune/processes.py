"""A command that a launcher such as torchrun has started in several processes: they meet, and they end together.

A launcher tells each process by the environment how many there are, which one it is, and where the first can be met.
The first one speaks; the others are silent, unless they fail. Where a process fails, one says so: the first of all if
they fail alike, else the one that met the fault, with its rank. All end with exit code 2, as for any mistake; where a
process was killed, the others notice as soon as they wait for it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import TextIO, cast

from .terminal import Stream

DIVIDED = ("train", "ppo")  # commands whose work processes share; of any other, each does all
TOGETHER = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells
TIMEOUT = timedelta(minutes=30)  # in which a process waits for others that are still there
PATIENCE = 1.0  # seconds in which the first process may report a mistake that all have met


def n_processes() -> int:
    """How many processes a launcher has started together."""
    told = all(name in os.environ for name in TOGETHER)
    return int(os.environ["WORLD_SIZE"]) if told else 1


@contextmanager
def together(command: str) -> Iterator[None]:
    """Inside, the processes of a command know each other, and all but the first are silent."""
    if command not in DIVIDED or n_processes() == 1:
        yield
        return

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

    if rank == 0:
        yield
    else:
        silence = cast(TextIO, Stream(None))
        with redirect_stdout(silence), redirect_stderr(silence):
            yield
    dist.destroy_process_group()


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
    with suppress(RuntimeError):  # of a store that went down with the process that held it
        if dist.distributed_c10d._get_default_store().add("failed", 1) > 1:
            return code, ""
    return code, line if rank == 0 else f"rank {rank}: {line}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

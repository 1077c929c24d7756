"""The processes of a run, numbered by their rank, and what they tell each other.

A caller sets torch.distributed up as usual; for a command that torchrun has started, `handtune/processes.py` does.
Without it there is one process, and nothing travels.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("handtune")
Item = TypeVar("Item")
Value = TypeVar("Value")


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and tells of the run."""
    return rank() == 0


def shares(sizes: Sequence[float], n: int) -> list[range]:
    """Pieces of work of these sizes, cut into `n` contiguous shares of about the same sum.

    Each share has at least one piece; where there are fewer pieces than shares, the last shares are empty.
    """
    total = sum(sizes)
    bounds = [0]
    done = 0.0  # the sum of the sizes before this piece
    for i, size in enumerate(sizes):
        missing = n - len(bounds)  # bounds that are still to come
        # A share is full where the middle of its next piece lies beyond it; every later one needs a piece.
        is_full = done + size / 2 > total * len(bounds) / n or len(sizes) - i <= missing
        if missing and i > bounds[-1] and is_full:
            bounds.append(i)
        done += size
    bounds += [len(sizes)] * (n + 1 - len(bounds))
    return [range(start, end) for start, end in pairwise(bounds)]


def warn_of_idle(n: int, what: str, options: str) -> None:
    """Say that some processes have nothing to do, where there are fewer pieces of work than processes."""
    if n < world_size() and is_first():
        log.warning("%s %s for %s processes: some have nothing to do; set %s lower", n, what, world_size(), options)


def sum_in_order(values: Mapping[int, Tensor], n: int, device: torch.device) -> Tensor:
    """The sum, in fp64, of scalars numbered 0..n-1, of which each process has some; on the device, without waiting.

    It is added up from all of them in their order, the same everywhere.
    """
    table = torch.zeros(n, dtype=torch.float64, device=device)
    for i, value in values.items():
        table[i] = value
    add_disjoint(table)
    return table.sum()


def add_disjoint(*tensors: Tensor) -> None:
    """Fill in what other processes have computed: entries that are zero in all processes but one."""
    # Adding zeros leaves a number as it is, to the bit.
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def in_order(values: Mapping[int, Value]) -> list[Value]:
    """Values by their numbers, of which each process has some: all of them in their order, pickled on the way."""
    everywhere = {number: value for part in gathered(dict(values)) for number, value in part.items()}
    return [everywhere[number] for number in sorted(everywhere)]


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return any(gathered(flag))


def gathered(value: Value) -> list[Value]:
    """The value of each process, by rank; it is pickled on the way."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], Value]) -> Value:
    """What the first process makes, in every process, pickled on the way; its exception is raised in all of them."""
    if world_size() == 1:
        return make()

    value: Any = None
    error: Exception | None = None
    if is_first():
        try:
            value = make()
        except (ValueError, OSError, ArithmeticError, MemoryError) as raised:  # what is raised on purpose
            error = raised
    message = [value, error]
    dist.broadcast_object_list(message, src=0)
    if error is None and message[1] is not None:
        error = message[1]
    if error is not None:
        raise error
    return value if is_first() else message[0]


class OfFirst(Mapping[str, Tensor]):
    """Tensors that the first process has, each of which comes to the others when all ask for it, in the same order."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.names = from_first(lambda: list(tensors))

    def __getitem__(self, name: str) -> Tensor:
        # Before all are asked: `in` asks for what need not be there.
        if name not in self.names:
            raise KeyError(name)
        return from_first(lambda: self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def one_first(make: Callable[[], Value]) -> Value:
    """What `make` gives in each process, where it is called in one of each machine's before the others."""
    if world_size() == 1:
        return make()
    if int(os.environ.get("LOCAL_RANK", rank())) == 0:
        value = make()
        dist.barrier()
        return value
    dist.barrier()
    return make()


def require_agreement(**facts: Any) -> None:
    """ValueError where a process has other facts than the first, which names it and them."""
    for number, others in enumerate(gathered(facts)):
        if different := [name for name, value in facts.items() if others[name] != value]:
            raise ValueError(
                f"the processes of ranks {rank()} and {number} have different {', '.join(different)}: they must all "
                "have the same packages, files and settings, and begin with the same weights"
            )


def spread(items: Iterable[Item], compute: Callable[[int, Item], Value], in_step: bool = False) -> list[Value]:
    """`compute(number, item)` of each item, each in one process, in their order and in every process.

    What `compute` gives is pickled on the way: numbers, arrays, tensors on the CPU. `in_step`: each process computes
    as often as the others, the last of them an item that another one has, too.
    """
    n, mine = world_size(), rank()
    values: dict[int, Value] = {}
    i = -1
    for i, item in enumerate(items):
        if i % n == mine:
            values[i] = compute(i, item)
    # The last round may lack items for the last processes.
    n_last = (i + 1) % n
    if in_step and 0 < n_last <= mine:
        compute(i, item)
    return in_order(values)

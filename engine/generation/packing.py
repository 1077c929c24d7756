"""Copies of a model's weights in the layout that a CPU reads the fastest, for the time in which it writes.

Writing reads all weights for each token. In the layout of a checkpoint that takes up to twice as long as it must (the
figures are in `kernels/matmul_cpu.py`); making the copies takes as long as four to six tokens, and their memory. So
they are made for texts that win that back, and where half of the free memory is enough for them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ...kernels import Linear
from ...kernels.matmul_cpu import PackedWeight
from ..parallel.sharding import is_sharded

MIN_STEPS = 24  # tokens of a text that pay for the copies
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # where a container's limits are: version 2, and version 1
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))

Packed = dict[Linear, PackedWeight]


def pack(model: nn.Module, rows: int, steps: int) -> Packed:
    """Copies of the weights for `steps` products with so many rows each; none where they would not pay."""
    # Of weights in shards there are copies for the time of a product.
    if steps < MIN_STEPS or is_sharded(model):
        return {}
    linears = [module for module in model.modules() if isinstance(module, Linear) and module.quantized is None]
    fitting = [linear for linear in linears if PackedWeight.supports(linear.matrix, rows)]
    size = sum(linear.weight.nbytes for linear in fitting)
    if size > free_memory() // 2:
        return {}
    return {linear: PackedWeight(linear.matrix) for linear in fitting}


@contextmanager
def using(packed: Packed) -> Iterator[None]:
    """Read these copies inside the block."""
    for linear, weight in packed.items():
        linear.packed = weight
    try:
        yield
    finally:
        for linear in packed:
            linear.packed = None


def free_memory() -> int:
    """Bytes of main memory that this process may still take; 0 where the system doesn't tell."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return 0
    free = 1024 * int(match[1]) if match else 0

    for limit, usage in LIMITS:
        try:
            free = min(free, int((CGROUP / limit).read_text()) - int((CGROUP / usage).read_text()))
        except (OSError, ValueError):  # no such limit: it isn't there, or "max"
            continue
    return max(free, 0)

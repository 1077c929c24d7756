"""Which Triton kernels were launched: a test of a kernel that never ran would prove nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from handtune.kernels.backend import INTERPRETED


@contextmanager
def launched() -> Iterator[list[str]]:
    """The names of the kernels launched inside the block."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction as Kernel
    else:
        from triton.runtime.jit import KernelInterface as Kernel
    names: list[str] = []
    get = Kernel.__getitem__

    def spy(kernel, grid):
        names.append(kernel.__name__)
        return get(kernel, grid)

    with mock.patch.object(Kernel, "__getitem__", spy):
        yield names

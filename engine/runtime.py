"""What a run changes in the process that it is a guest in, and restores: arithmetic, random numbers, modes, Ctrl-C.

By default CUDA computes a product of fp32 matrices in fp32, but not a convolution: cuDNN may round the operands to
TF32, with 10 bits of mantissa, because `torch.backends.cudnn.allow_tf32` begins as True. Here convolutions do what
matrix products do: exact unless `torch.set_float32_matmul_precision("high")` asks both for speed.
"""

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # the environment variable that cuBLAS reads


@contextmanager
def configure_determinism(deterministic: bool = False) -> Iterator[None]:
    """Make convolutions as exact as matrix products and, if `deterministic`, all of CUDA repeat itself bitwise.

    After the block the process has the settings that it had before, in whichever of torch's two spellings of cuDNN's
    precision they were made.
    """
    cudnn: Any = torch.backends.cudnn  # the stubs don't know the newer spelling, fp32_precision
    precisions = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        allow_tf32 = cudnn.allow_tf32
    except RuntimeError:  # it can't be read where the newer spelling was used for one of the two alone
        allow_tf32 = None
    algorithms = _deterministic_algorithms()
    memory: Any = torch.utils.deterministic  # a module with a property, which the stubs don't know
    fill = memory.fill_uninitialized_memory
    workspace = os.environ.get(CUBLAS_WORKSPACE)

    try:
        cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        if deterministic:
            os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # without it cuBLAS refuses to be deterministic
            torch.use_deterministic_algorithms(True)
            cudnn.deterministic = True
            cudnn.benchmark = False  # it would choose the algorithm by the clock
            memory.fill_uninitialized_memory = False  # ours is written whole before it is read
        yield
    finally:
        # The call imports torch's compiler, which takes seconds: it is made only where it changes something.
        if _deterministic_algorithms() != algorithms:
            enabled, warn_only = algorithms
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)
        else:
            os.environ[CUBLAS_WORKSPACE] = workspace

        memory.fill_uninitialized_memory = fill
        cudnn.deterministic, cudnn.benchmark = flags
        # The older spelling first, which sets the precision of both: the newer one then tells them apart again.
        if allow_tf32 is not None:
            cudnn.allow_tf32 = allow_tf32
        if (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) != precisions:
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = precisions


def _deterministic_algorithms() -> tuple[bool, bool]:
    """Whether torch insists on deterministic algorithms, and whether it only warns of others."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def begin_draws(*position: int) -> None:
    """Start all random generators, Python's and numpy's too, at what follows from `position` alone.

    That is, say, (seed, step, micro-batch): what a loss or collate function draws then depends neither on what was
    drawn before nor on the process that draws, so that a run can be resumed, and divided, without a generator's state.
    """
    # The length goes first: a sequence that ends with zeros seeds as if it were shorter.
    words = np.random.SeedSequence([len(position), *position]).generate_state(4)
    seed = int(words[0]) << 31 | int(words[1]) >> 1
    torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for every kind of device, for 0.15 ms
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    random.seed(int(words[2]))
    np.random.seed(words[3])


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore after the block the mode of each module, training or eval."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and restore the mode of each module after the block."""
    with preserve_modes(model):
        model.eval()
        yield


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Give an event that the first Ctrl-C sets; the second one interrupts as usual.

    It is never set outside the main thread, which alone may set handlers, nor where the caller has replaced Python's
    handler: the caller's stays, and decides what a Ctrl-C means.
    """
    event = threading.Event()
    default_handlers = (signal.default_int_handler, signal.SIG_DFL)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) not in default_handlers:
        yield event
        return

    def stop(signal_number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)  # for the second Ctrl-C
        tqdm.write("finishing this step, then saving; once more stops at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)

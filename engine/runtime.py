"""What a run changes in the process that it is a guest in, and puts back: arithmetic, modes of modules, Ctrl-C.

How CUDA computes in fp32: a product of fp32 matrices is by default one of fp32 numbers. A convolution isn't: cuDNN may
round what it reads to TF32, 10 bits of mantissa, because `torch.backends.cudnn.allow_tf32` begins as True. Here
convolutions do what matrix products do: exact unless `torch.set_float32_matmul_precision("high")` asks both for speed.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def settled_arithmetic(deterministic: bool = False) -> Iterator[None]:
    """Convolutions as exact as matrix products; if `deterministic`, everything on CUDA repeats itself bitwise.

    After the block the process has the settings that it had before.
    """
    with _same_cudnn(), _same_algorithms():
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        if deterministic:
            os.environ.setdefault(WORKSPACE, ":4096:8")  # without it cuBLAS refuses to be deterministic
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False  # which would choose the algorithm by the clock
        yield


@contextmanager
def _same_cudnn() -> Iterator[None]:
    """cuDNN's settings are afterwards what they were, in whichever of torch's two spellings they were made."""
    cudnn: Any = torch.backends.cudnn  # the stubs don't know its newer spelling
    precisions = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        allow_tf32 = cudnn.allow_tf32
    except RuntimeError:  # it can't be read where the newer spelling was used for one of the two alone
        allow_tf32 = None
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = flags
        if allow_tf32 is not None:
            cudnn.allow_tf32 = allow_tf32
        if (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) != precisions:
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = precisions


@contextmanager
def _same_algorithms() -> Iterator[None]:
    """Whether torch insists on deterministic algorithms is afterwards as before, and so is cuBLAS's workspace."""

    def algorithms() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    insists, warns = algorithms()
    workspace = os.environ.get(WORKSPACE)
    try:
        yield
    finally:
        if algorithms() != (insists, warns):  # for nothing, it would import torch's compiler, for seconds
            torch.use_deterministic_algorithms(insists, warn_only=warns)
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
        else:
            os.environ[WORKSPACE] = workspace


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """After the block each module is in the mode, training or eval, that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module is in the mode that it was in."""
    with same_modes(model):
        model.eval()
        yield


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual.

    Never set outside the main thread, nor where the caller has put a handler of its own in the place of Python's: that
    one stays, and decides what a Ctrl-C means.
    """
    event = threading.Event()
    usual = (signal.default_int_handler, signal.SIG_DFL)
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) not in usual:
        yield event
        return

    def stop(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)
        tqdm.write("finishing this step, then saving; once more stops at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)

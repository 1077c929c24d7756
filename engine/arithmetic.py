"""How CUDA computes in fp32, and whether it repeats itself: settings of the process, made before a run or evaluation.

A product of fp32 matrices is by default one of fp32 numbers. A convolution isn't: cuDNN may round what it reads to
TF32, 10 bits of mantissa, because `torch.backends.cudnn.allow_tf32` begins as True. Here convolutions do what matrix
products do: exact unless `torch.set_float32_matmul_precision("high")` asks both for speed.
"""

import os

import torch


def settle_arithmetic(deterministic: bool = False) -> None:
    """Convolutions as exact as matrix products; if `deterministic`, everything on CUDA repeats itself bitwise."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False  # which would choose the algorithm by the clock

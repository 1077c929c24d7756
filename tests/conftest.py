"""For every test: offline, quiet, one thread. Under Triton's interpreter (TRITON_INTERPRET=1) only Triton's tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path, config):
    """Kernels run under the interpreter or on a GPU; everything else where there is no interpreter."""
    on_triton = collection_path.name.startswith("test_triton_")
    if collection_path.suffix == ".py" and on_triton != INTERPRETED:
        return not (on_triton and torch.cuda.is_available())
    return None


if INTERPRETED:
    from triton.runtime import interpreter

    plain_dot = interpreter.InterpreterBuilder.create_dot

    def wide_dot(self, a, b, d, *rest):
        """The interpreter holds bf16 as bare 16-bit patterns and multiplies those; widened to fp32 it is right."""
        import triton.language as tl

        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return plain_dot(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.create_dot = wide_dot

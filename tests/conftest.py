"""For every test: offline, quiet, one thread. Under Triton's interpreter (TRITON_INTERPRET=1) only Triton's tests.

With --as-on-gpu all tests run under it, so that each operation goes the way it goes on a GPU: hours, not minutes.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser):
    parser.addoption(
        "--as-on-gpu", action="store_true", help="with TRITON_INTERPRET=1: every test, Triton in all paths"
    )


def pytest_ignore_collect(collection_path, config):
    """Kernels run under the interpreter or on a GPU; everything else where there is no interpreter."""
    if INTERPRETED and config.getoption("--as-on-gpu"):
        return None
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

    plain_convert = interpreter._convert_float

    def rounding_convert(x, source, target, rounding):
        """The interpreter cuts fp32 off where bf16 ends; a GPU rounds to the nearest, as torch does."""
        import triton.language as tl

        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(x.view("float32").copy()).bfloat16()
            return rounded.view(torch.int16).numpy().view("uint16")
        return plain_convert(x, source, target, rounding)

    interpreter._convert_float = rounding_convert

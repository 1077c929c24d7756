"""Where kernels run, told without a GPU: fake tensors on several, and a look at the code."""

import ast
from contextlib import contextmanager

import pytest
import torch
from project import ROOT
from torch._subclasses import FakeTensorMode

from handtune.kernels import backend
from handtune.kernels.lora import batched_torch, batched_triton, products


def test_kernels_run_on_the_gpu_of_their_tensors(monkeypatch) -> None:
    """A model may be spread over several GPUs, of which one is the current one."""
    current = [torch.device("cuda:0")]

    @contextmanager
    def made_current(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", made_current)
    launch = backend.launches(lambda x, other: (current[-1], other.device))
    with FakeTensorMode():
        elsewhere, here, on_cpu = (torch.empty(2, device=name) for name in ("cuda:1", "cuda:0", "cpu"))
        assert launch(elsewhere, elsewhere)[0] == elsewhere.device
        assert launch(here, here)[0] == launch(on_cpu, on_cpu)[0] == here.device


def launching_functions(code: str) -> dict[str, bool]:
    """The public functions of a file that launch kernels, and whether each is decorated with `backend.launches`."""
    functions = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
            kernels = [f for f in calls if isinstance(f, ast.Subscript) and ast.unparse(f.value).endswith("_kernel")]
            if kernels:
                functions[node.name] = "backend.launches" in map(ast.unparse, node.decorator_list)
    return functions


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*_triton.py")), ids=lambda path: path.stem)
def test_whatever_launches_chooses_the_gpu(path) -> None:
    functions = launching_functions(path.read_text(encoding="utf-8"))
    functions.pop("update_", None)  # of an optimizer, which gives it no tensor first, and chooses by itself
    assert all(functions.values()), functions


def test_a_launch_without_the_choice_is_found() -> None:
    assert launching_functions("def f(x):\n    _copy_kernel[(1,)](x)\n") == {"f": False}
    assert launching_functions("@backend.launches\ndef f(x):\n    _copy_kernel[(1,)](x)\n") == {"f": True}


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter takes fp32, too")
def test_one_adapter_and_many_draw_dropout_by_one_rule(monkeypatch) -> None:
    monkeypatch.setattr(backend, "on_triton", lambda *tensors: True)
    for dtype, module in ((torch.bfloat16, batched_triton), (torch.float32, batched_torch)):
        x = torch.empty(2, 2, dtype=dtype)
        assert products._products_by_row(x, 8) is module
        assert products.takes_triton(x, rank=8) == (module is batched_triton)

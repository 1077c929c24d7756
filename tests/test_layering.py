"""Who imports whom, and what each package exports."""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {"kernels": {"kernels"}, "models": {"models", "kernels"}, "engine": {"engine", "kernels"}}
TORCH_ONLY = {"torch", "triton"}
# The package itself, which imports nothing; the one writer and reader of files, and what these hold; the lock; what is
# done about what comes from outside; models without weights.
SHARED = {"", "__version__", "_files", "_folders", "_locks", "_outside", "_shapes", "_weightless"}
BY_NAME = {"import_module", "__import__"}

EXPORTS = {
    "kernels": [
        "Conv2d", "LayerNorm", "Linear", "LowRank", "RMSNorm", "Segments", "activate", "activation_linear", "attention",
        "feed_forward", "layer_norm", "linear_cross_entropy", "lora_conv2d", "lora_linear", "lora_linear_batched",
        "norm_linear", "rms_norm", "rope", "swiglu",
    ],
    "models": ["Bert", "Bloom", "GPT2", "Llama", "ResNet", "T5", "XLNet", "add_tokens", "load", "save"],
    "engine": [
        "LoRAConfig", "PPOConfig", "TrainConfig", "add_lora", "combine_adapters", "drop_adapter", "evaluate", "freeze",
        "generate", "load_adapter", "load_checkpoint", "load_reward", "merge_lora", "ppo", "projections", "quantize",
        "save_adapter", "save_checkpoint", "set_adapter", "train", "train_rows", "trainable_report", "unfreeze",
        "unmerge_lora", "use_adapter",
    ],
}  # fmt: skip


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file of handtune.`package`, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["handtune", package][: 3 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            whole = base in ("", "handtune")  # `from .. import models`: what is named is a module itself
            yield from ((node.lineno, f"{base}.{alias.name}" if whole else base) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(source: str, package: str) -> list[str]:
    """Imports that a file of this package may not have."""
    found = []
    for line, module in imported(source, package):
        top, _, rest = module.partition(".")
        inside = rest.partition(".")[0] if top == "handtune" else top
        if top == "handtune" or top in MAY_IMPORT:
            allowed = top == "handtune" and inside in {*MAY_IMPORT[package], *SHARED}
        else:
            allowed = package != "kernels" or top in TORCH_ONLY or top in sys.stdlib_module_names
        if not allowed:
            found.append(f"line {line}: {package} imports {module}")
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_follow_the_layers(package: str) -> None:
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    for path in files:
        assert not violations(path.read_text(encoding="utf-8"), package), path


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("engine", "from ..models import load"),
        ("engine", "from ..models.gpt2 import GPT2"),
        ("engine", "from .. import models"),
        ("engine", "from handtune.models import load"),
        ("engine", "import handtune.models.gpt2 as g"),
        ("engine", "from handtune import kernels, models"),
        ("engine", "import models"),
        ("engine", "from ..cli import main"),
        ("engine", "def f():\n    if True:\n        from ..models import load"),
        ("engine", "if TYPE_CHECKING:\n    from ..models import GPT2"),
        ("engine", "from importlib import import_module\nimport_module('handtune.models')"),
        ("models", "from ..engine import train"),
        ("models", "from handtune.engine.lora import add_lora"),
        ("kernels", "from ..models.layers import positions"),
        ("kernels", "from ..engine import train"),
        ("kernels", "import numpy"),
        ("kernels", "from transformers import x"),
        ("kernels", "import kernels"),
    ],
)
def test_a_planted_violation_is_found(package: str, source: str) -> None:
    assert len(violations(f"import torch\n{source}\n", package)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("kernels", "import math, torch.nn as nn\nfrom .lora import Plan\nfrom . import lora\nimport triton.language"),
        ("models", "from ..kernels import Linear\nfrom .layers import x\nfrom tokenizers import y\nimport json"),
        ("engine", "from ..kernels.linear import Merged\nfrom .lora import x\nimport numpy\nfrom .. import kernels"),
        ("engine", "import handtune\nfrom .. import __version__"),
    ],
)
def test_what_is_allowed_is_not_reported(package: str, source: str) -> None:
    assert not violations(source, package)


@pytest.mark.parametrize("package", EXPORTS)
def test_exports_are_these_and_no_others(package: str) -> None:
    module = importlib.import_module(f"handtune.{package}")
    assert module.__all__ == EXPORTS[package]
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__module__.startswith(f"handtune.{package}."), name
        assert value.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("package", EXPORTS)
def test_no_export_is_named_like_a_file(package: str) -> None:
    """Importing the file `train.py` would put the module `train` in place of the function."""
    files = {path.stem for path in (ROOT / package).iterdir()}
    assert not files & set(EXPORTS[package])


@pytest.mark.parametrize("package", EXPORTS)
def test_type_checkers_see_the_same_names(package: str) -> None:
    """The imports under TYPE_CHECKING say what the lazy table says."""
    module = importlib.import_module(f"handtune.{package}")
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.asname: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert shown == module._HOME

"""Who imports whom, and what each package exports."""

import ast
import importlib
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from project import ROOT

MAY_IMPORT = {"kernels": {"kernels"}, "models": {"models", "kernels"}, "engine": {"engine", "kernels"}}
TORCH_ONLY = {"torch", "triton"}
# The package itself, which imports nothing; the one writer and reader of files, and what these hold; the lock; what is
# done about what comes from outside; models without weights.
SHARED = {"", "__version__", "_files", "_folders", "_locks", "_outside", "_shapes", "_weightless"}
BY_NAME = {"import_module", "__import__"}

# The rooms of a package: folders, and files at its top (`norms` is norms.py and norms_triton.py). Each may import what
# stands in lines above its own, and itself.
ROOMS = {
    "kernels": ["backend dropout matmul_cpu", "activations", "attn cross_entropy norms optim quant rotary", "lora",
                "linear", "conv mlp"],
    "engine": ["model parallel progress runtime", "finite", "formats", "chat data adapters", "tasks generation peft",
               "training prediction", "rlhf"],
    "models": ["layers", "tensors tokenizer", "model", "encoder image_model llama",
               "gpt2 smollm3 gemma phi3 olmo bloom bert distilbert roberta mpnet modernbert t5 xlnet resnet vit",
               "families", "checkpoint"],
}  # fmt: skip
LINES = {
    package: {room: i for i, line in enumerate(lines) for room in line.split()} for package, lines in ROOMS.items()
}

EXPORTS = {
    "kernels": [
        "Conv2d", "LayerNorm", "Linear", "LoRALinearWeights", "RMSNorm", "Segments", "activate", "activation_linear",
        "attention",
        "feed_forward", "layer_norm", "linear_cross_entropy", "lora_conv2d", "lora_linear", "lora_linear_batched",
        "norm_linear", "rms_norm", "rope", "split_rope", "swiglu",
    ],
    "models": [
        "Bert", "Bloom", "Dinov2", "DistilBert", "GPT2", "Gemma2", "Gemma3", "Llama", "MPNet", "ModernBert", "Olmo2",
        "Olmo3", "Phi3", "ResNet", "Roberta", "SmolLM3", "T5", "ViT", "XLNet", "add_tokens", "load", "save",
        "set_dropout",
    ],
    "engine": [
        "Callback",
        "LoRAConfig", "PPOConfig", "TrainConfig", "add_lora", "combine_adapters", "drop_adapter", "evaluate", "freeze",
        "generate", "load_adapter", "load_checkpoint", "load_reward", "merge_lora", "ppo", "projections", "quantize",
        "save_adapter", "save_checkpoint", "set_adapter", "train", "train_rows", "trainable_report", "unfreeze",
        "unmerge_lora", "use_adapter",
    ],
}  # fmt: skip


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in the file of handtune.`module`, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["handtune", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            whole = (ROOT / base.removeprefix("handtune").replace(".", "/").lstrip("/")).is_dir() or not base
            yield from ((node.lineno, f"{base}.{alias.name}" if whole else base) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def room_of(parts: list[str]) -> str:
    return parts[0].removesuffix("_triton")


def violations(source: str, module: str) -> list[str]:
    """Imports that the file of handtune.`module` may not have."""
    package, *parts = module.split(".")
    found = []
    for line, target in imported(source, module):
        top, *rest = target.split(".")
        inside = rest[0] if top == "handtune" and rest else "" if top == "handtune" else top
        if top == "handtune" or top in MAY_IMPORT:
            allowed = top == "handtune" and inside in {*MAY_IMPORT[package], *SHARED}
        else:
            allowed = package != "kernels" or top in TORCH_ONLY or top in sys.stdlib_module_names
        if allowed and inside == package and package in LINES and rest[1:]:
            lines, own, other = LINES[package], room_of(parts), room_of(rest[1:])
            allowed = own == other or own not in lines or other not in lines or lines[other] < lines[own]
        if not allowed:
            found.append(f"line {line}: {module} imports {target}")
    return found


def modules(package: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_follow_the_layers(package: str) -> None:
    paths = list(modules(package))
    assert paths
    assert not [text for path, name in paths for text in violations(path.read_text(encoding="utf-8"), name)]


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_its_line(package: str) -> None:
    there = {room_of(name.split(".")[1:]) for _, name in modules(package)} - {"__init__"}
    assert there == LINES[package].keys()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.x", "from ..models import load"),
        ("engine.x", "from ..models.gpt2 import GPT2"),
        ("engine.x", "from .. import models"),
        ("engine.data.x", "from ...models import load"),
        ("engine.x", "from handtune.models import load"),
        ("engine.x", "import handtune.models.gpt2.model as g"),
        ("engine.x", "from handtune import kernels, models"),
        ("engine.x", "import models"),
        ("engine.x", "from ..cli import main"),
        ("engine.x", "def f():\n    if True:\n        from ..models import load"),
        ("engine.x", "if TYPE_CHECKING:\n    from ..models import GPT2"),
        ("engine.x", "from importlib import import_module\nimport_module('handtune.models')"),
        ("models.x", "from ..engine import train"),
        ("models.x", "from handtune.engine.adapters.lora import add_lora"),
        ("kernels.norms", "from ..models.layers import positions"),
        ("kernels.norms", "from ..engine import train"),
        ("kernels.lora.linear", "from ...engine import train"),
        ("kernels.norms", "import numpy"),
        ("kernels.norms", "from transformers import x"),
        ("kernels.norms", "import kernels"),
        ("kernels.norms_triton", "from .lora.linear import fused_linear"),
        ("kernels.lora.per_row", "from ..linear import Linear"),
        ("kernels.lora.per_row", "if TYPE_CHECKING:\n    from .. import linear"),
        ("kernels.backend", "def f():\n    from . import norms_triton"),
        ("kernels.quant.nf4", "from ..attn.cpu import x"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    assert len(violations(f"import torch\n{source}\n", module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.linear", "import math, torch.nn as nn\nfrom .lora.products import Plan\nfrom . import norms_triton"),
        ("kernels.lora.linear", "from ..norms import x\nfrom . import products\nfrom ..quant.nf4 import y"),
        ("models.x", "from ..kernels import Linear\nfrom .layers import x\nfrom tokenizers import y\nimport json"),
        (
            "engine.x",
            "from ..kernels.lora.factors import Merged\nfrom .y import x\nimport numpy\nfrom .. import kernels",
        ),
        ("engine.x", "import handtune\nfrom .. import __version__"),
    ],
)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    assert not violations(source, module)


def test_no_two_files_import_each_other() -> None:
    """However many lie in between, and for types neither."""
    graph = {name: set() for package in MAY_IMPORT for _, name in modules(package)}
    for package in MAY_IMPORT:
        for path, name in modules(package):
            targets = (target.removeprefix("handtune.") for _, target in imported(path.read_text("utf-8"), name))
            graph[name] = {target for target in targets if target in graph}
    TopologicalSorter(graph).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter({**graph, "kernels.backend": {"kernels.linear"}}).prepare()


def test_every_package_is_built() -> None:
    """The list in pyproject.toml is that of the folders."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    inits = [path for room in (*MAY_IMPORT, "handtune") for path in (ROOT / room).rglob("__init__.py")]
    names = (".".join(path.parent.relative_to(ROOT).parts) for path in inits)
    assert sorted(listed) == sorted(name if name.startswith("handtune") else f"handtune.{name}" for name in names)


@pytest.mark.parametrize("room", [*MAY_IMPORT, "handtune"])
def test_no_folder_is_crowded(room: str) -> None:
    for folder in {path.parent for path in (ROOT / room).rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= 15, folder


@pytest.mark.parametrize("room", [*MAY_IMPORT, "handtune"])
def test_no_file_is_long(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 330, path


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


def test_a_name_of_the_tests_helpers_means_one_thing() -> None:
    names: list[str] = []
    for path in sorted((ROOT / "tests/helpers").glob("*.py")):
        definitions = (ast.FunctionDef, ast.ClassDef)
        names += [node.name for node in ast.parse(path.read_text()).body if isinstance(node, definitions)]
    assert [name for name, count in Counter(names).items() if count > 1] == []

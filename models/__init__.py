"""Architectures, one a file: configuration, presets, blocks, forward pass and the names of the published checkpoints.

`load` reads a checkpoint in Hugging Face layout, `save` writes one. Names are imported at first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bert import Bert as Bert
    from .bloom import Bloom as Bloom
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .gpt2 import GPT2 as GPT2
    from .growing import add_tokens as add_tokens
    from .llama import Llama as Llama
    from .resnet import ResNet as ResNet
    from .t5 import T5 as T5
    from .xlnet import XLNet as XLNet

_HOME = {
    "Bert": "bert",
    "Bloom": "bloom",
    "GPT2": "gpt2",
    "Llama": "llama",
    "ResNet": "resnet",
    "T5": "t5",
    "XLNet": "xlnet",
    "add_tokens": "growing",
    "load": "checkpoint",
    "save": "checkpoint",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value

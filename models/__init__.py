"""Architectures: configuration, presets, blocks, forward pass and the names of the published checkpoints.

    layers/      what several architectures are made of, and how their weights and configurations are published
    tensors/     files of weights: safetensors, GGUF, quantised ones
    tokenizer/   special tokens, and tokenizers of old vocabulary files
    model        what they have in common, and what each has to provide; `encoder`, `image_model`: of some of them
    gpt2/  llama/  gemma/  smollm3  phi3  olmo  bloom/  bert  distilbert  roberta  mpnet  modernbert
    t5/  xlnet/  resnet/  vit/     the architectures: begin with `gpt2/model.py`
    families     which of them a published `model_type` is
    checkpoint/  `load` reads a checkpoint in Hugging Face layout, `save` writes one

Names are imported at first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bert import Bert as Bert
    from .bloom.model import Bloom as Bloom
    from .checkpoint.loading import load as load
    from .checkpoint.saving import save as save
    from .distilbert import DistilBert as DistilBert
    from .gemma.gemma2 import Gemma2 as Gemma2
    from .gemma.gemma3 import Gemma3 as Gemma3
    from .gpt2.model import GPT2 as GPT2
    from .layers.dropout import set_dropout as set_dropout
    from .llama.model import Llama as Llama
    from .modernbert import ModernBert as ModernBert
    from .mpnet import MPNet as MPNet
    from .olmo import Olmo2 as Olmo2
    from .olmo import Olmo3 as Olmo3
    from .phi3 import Phi3 as Phi3
    from .resnet.model import ResNet as ResNet
    from .roberta import Roberta as Roberta
    from .smollm3 import SmolLM3 as SmolLM3
    from .t5.model import T5 as T5
    from .tokenizer.added_tokens import add_tokens as add_tokens
    from .vit.dinov2 import Dinov2 as Dinov2
    from .vit.model import ViT as ViT
    from .xlnet.model import XLNet as XLNet

_HOME = {
    "Bert": "bert",
    "Bloom": "bloom.model",
    "Dinov2": "vit.dinov2",
    "DistilBert": "distilbert",
    "GPT2": "gpt2.model",
    "Gemma2": "gemma.gemma2",
    "Gemma3": "gemma.gemma3",
    "Llama": "llama.model",
    "MPNet": "mpnet",
    "ModernBert": "modernbert",
    "Olmo2": "olmo",
    "Olmo3": "olmo",
    "Phi3": "phi3",
    "ResNet": "resnet.model",
    "Roberta": "roberta",
    "SmolLM3": "smollm3",
    "T5": "t5.model",
    "ViT": "vit.model",
    "XLNet": "xlnet.model",
    "add_tokens": "tokenizer.added_tokens",
    "load": "checkpoint.loading",
    "save": "checkpoint.saving",
    "set_dropout": "layers.dropout",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value

"""The families of models, by the `model_type` that published checkpoints give them."""

from difflib import get_close_matches
from typing import get_args

from .bert import Bert
from .bloom.model import Bloom
from .distilbert import DistilBert
from .gemma.gemma2 import Gemma2
from .gemma.gemma3 import Gemma3
from .gpt2.model import GPT2
from .llama.model import Llama
from .modernbert import ModernBert
from .mpnet import MPNet
from .olmo import Olmo2, Olmo3
from .phi3 import Phi3
from .resnet.model import ResNet
from .roberta import Roberta
from .smollm3 import SmolLM3
from .t5.model import T5
from .vit import Dinov2, ViT
from .xlnet.model import XLNet

Decoders = SmolLM3 | Gemma2 | Gemma3 | Phi3 | Olmo2 | Olmo3
Encoders = Bert | DistilBert | Roberta | MPNet | ModernBert
Model = GPT2 | Bloom | Llama | Decoders | Encoders | T5 | XLNet | ResNet | ViT | Dinov2
Family = type[Model]
ALL: tuple[Family, ...] = get_args(Model)
FAMILIES: dict[str, Family] = {model_type: family for family in ALL for model_type in family.model_types}


def family_of_preset(preset: str) -> Family:
    """The family of a published size. ValueError for a name that isn't one."""
    families = {name: family for family in ALL for name in family.presets}
    if preset not in families:
        similar = get_close_matches(preset, families, n=1)
        meant = f"did you mean {similar[0]!r}? " if similar else ""
        raise ValueError(f"preset {preset!r} is unknown; {meant}known: {', '.join(families)}")
    return families[preset]

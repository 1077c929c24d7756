"""The families of models, by the `model_type` that published checkpoints give them."""

from difflib import get_close_matches

from .bert import Bert
from .bloom.model import Bloom
from .distilbert import DistilBert
from .gemma3 import Gemma3
from .gpt2.model import GPT2
from .llama.model import Llama
from .modernbert import ModernBert
from .mpnet import MPNet
from .resnet.model import ResNet
from .roberta import Roberta
from .t5.model import T5
from .xlnet.model import XLNet

Model = GPT2 | Bloom | Bert | DistilBert | Roberta | MPNet | ModernBert | Gemma3 | Llama | T5 | XLNet | ResNet
Family = type[Model]
ALL: tuple[Family, ...] = (GPT2, Bloom, Bert, DistilBert, Roberta, MPNet, ModernBert, Llama, Gemma3, T5, XLNet, ResNet)
FAMILIES: dict[str, Family] = {model_type: family for family in ALL for model_type in family.model_types}


def family_of_preset(preset: str) -> Family:
    """The family of a published size. ValueError for a name that isn't one."""
    families = {name: family for family in ALL for name in family.presets}
    if preset not in families:
        similar = get_close_matches(preset, families, n=1)
        meant = f"did you mean {similar[0]!r}? " if similar else ""
        raise ValueError(f"preset {preset!r} is unknown; {meant}known: {', '.join(families)}")
    return families[preset]

"""The families of models, by the `model_type` that published checkpoints give them."""

from difflib import get_close_matches

from .bert import Bert
from .bloom.model import Bloom
from .gpt2.model import GPT2
from .llama.model import Llama
from .resnet.model import ResNet
from .t5.model import T5
from .xlnet.model import XLNet

Model = GPT2 | Bloom | Bert | Llama | T5 | XLNet | ResNet
Family = type[Model]
FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "gpt3": GPT2,
    "bloom": Bloom,
    "bert": Bert,
    "llama": Llama,
    "t5": T5,
    "mistral": Llama,
    "qwen2": Llama,
    "qwen3": Llama,
    "xlnet": XLNet,
    "resnet": ResNet,
    "resnet_small": ResNet,
}


def family_of_preset(preset: str) -> Family:
    """The family of a published size. ValueError for a name that isn't one."""
    families = dict.fromkeys(FAMILIES.values())
    for family in families:
        if preset in family.presets:
            return family
    known = [name for family in families for name in family.presets]
    similar = get_close_matches(preset, known, n=1)
    meant = f"did you mean {similar[0]!r}? " if similar else ""
    raise ValueError(f"preset {preset!r} is unknown; {meant}known: {', '.join(known)}")

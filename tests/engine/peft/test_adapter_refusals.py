"""Adapters that do not fit or are damaged: one line that says so, and the model as it was."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import adapted, assert_unchanged, logits, small_gpt2, snapshot
from small_models import LABELS, both, theirs, tiny_bert, tiny_gpt2
from torch import Tensor, nn

from handtune.engine import LoRAConfig, add_lora, load_adapter, save_adapter, unfreeze
from handtune.models import load

FILES = "adapter_config.json", "adapter_model.safetensors"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "use_dora": (
        {"use_dora": True},
        "use_dora is set, but transformer.h.0.attn.c_attn.lora_magnitude_vector is not there",
    ),
    "bias": ({"bias": "some"}, "bias = 'some' is not implemented"),
    "lora_bias": ({"lora_bias": True}, "lora_bias = True"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "target_parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "trainable_token_indices": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "a field of the future": ({"use_whatever": 1}, "use_whatever = 1 is not implemented"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not implemented"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora' is not implemented"),
    "another method": ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not implemented"),
    "a rank that is none": ({"r": "many"}, "r = 'many'"),
    "no rank": ({"r": None}, "r = None"),
    "a rank of zero": ({"r": 0}, "rank: expected a positive whole number"),
    "a pattern that is none": ({"rank_pattern": ["c_fc"]}, "rank_pattern = ['c_fc']"),
    "an alpha beyond fp32": ({"lora_alpha": 1e39}, "lora_alpha = 1e+39"),
    "an alpha of many digits": ({"alpha_pattern": {"c_fc": 10**400}}, "a number of 401 digits"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha = None"),
    "another rank": ({"r": 4}, "has rank 3, but adapter_config.json says 4"),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(model: nn.Module, folder: Path, says: str, kind: type[Exception] = ValueError) -> None:
    before = snapshot(model)
    with pytest.raises(kind, match=says) as caught:
        load_adapter(model, folder)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_a_field_that_is_not_implemented_is_refused_by_name(adapter: Path, change: dict, says: str) -> None:
    config = json.loads((adapter / FILES[0]).read_text())
    (adapter / FILES[0]).write_text(json.dumps(config | change))
    refused(small_gpt2(), adapter, re.escape(says))


def test_pefts_defaults_are_accepted_field_by_field(adapter: Path) -> None:
    """Every field that PEFT writes at its default says nothing that we would have to refuse."""
    own = json.loads((adapter / FILES[0]).read_text())
    config = peft.LoraConfig(target_modules=["c_attn"]).to_dict()
    config = {key: list(value) if isinstance(value, set) else value for key, value in config.items()}
    (adapter / FILES[0]).write_text(json.dumps(config | {"r": own["r"], "lora_alpha": own["lora_alpha"]}, default=str))
    model = small_gpt2()
    load_adapter(model, adapter)
    assert torch.equal(logits(model), logits(adapted()))


def test_config_file_damaged_or_missing(adapter: Path) -> None:
    model = small_gpt2()
    text = (adapter / FILES[0]).read_text()
    for damaged in (text[:-30], "[1, 2]", ""):
        (adapter / FILES[0]).write_text(damaged)
        refused(model, adapter, "adapter_config.json")
    (adapter / FILES[0]).write_bytes(b"\xff\xfe\x00")
    refused(model, adapter, "not JSON")
    (adapter / FILES[0]).unlink()
    refused(model, adapter, "no adapter_config.json there", FileNotFoundError)
    refused(model, adapter / "nowhere", "no adapter_config.json there", FileNotFoundError)


def test_weights_damaged_or_missing(adapter: Path) -> None:
    model = small_gpt2()
    whole = (adapter / FILES[1]).read_bytes()
    for cut in (0, 4, 100, len(whole) - 8):
        (adapter / FILES[1]).write_bytes(whole[:cut])
        refused(model, adapter, "damaged or cut short")
    (adapter / FILES[1]).unlink()
    refused(model, adapter, "not there", FileNotFoundError)


def nan(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key][0, 0] = float("nan")


def counted(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key].int()


def wide(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = torch.zeros(3, 25)


def half_a_byte(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = torch.zeros(3, 12, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def counted_beside(tensors: dict[str, Tensor], key: str) -> None:
    tensors["base_model.model.transformer.ln_f.weight"] = torch.ones(24, dtype=torch.int64)


def lonely(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key.replace("lora_A", "lora_B")]


def flat(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = torch.zeros(())


def stranger(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key.replace("h.0", "h.9")] = torch.zeros(3, 24)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (nan, "lora_A.weight holds NaN or infinity"),
        (counted, "lora_A.weight holds torch.int32"),
        (half_a_byte, "lora_A.weight holds torch.float4_e2m1fn_x2"),
        (counted_beside, "ln_f.weight holds torch.int64"),
        (wide, "has factors of shape ((3, 25), (72, 3)), the model needs ((3, 24), (72, 3))"),
        (lonely, "c_attn.lora_A.weight is there without transformer.h.0.attn.c_attn.lora_B.weight"),
        (flat, "has factors of shape ((), (72, 3))"),
        (stranger, "h.9.attn.c_attn.lora_A.weight has no place in this model"),
    ],
)
def test_tensors_that_do_not_fit(adapter: Path, damage: Callable[[dict[str, Tensor], str], None], says: str) -> None:
    tensors = load_file(adapter / FILES[1])
    damage(tensors, "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight")
    save_file(tensors, adapter / FILES[1])
    refused(small_gpt2(), adapter, re.escape(says))


def test_an_adapter_of_another_base(adapter: Path, tmp_path: Path) -> None:
    refused(small_gpt2(d_model=48), adapter, "it is for another base")
    refused(small_gpt2(n_layer=1), adapter, "has no place in this model; it was made for another base")
    bert = theirs(tiny_bert(), "masked-lm")
    refused(bert, adapter, "none of its tensors belongs to this model")
    refused(both(tmp_path / "bert", tiny_bert(), "masked-lm")[1], adapter, "none of its tensors belongs to this model")


def test_an_adapter_on_a_tied_embedding(tmp_path: Path) -> None:
    """PEFT makes such a thing; merged, it would change the head too."""
    reference, model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")
    peft.get_peft_model(reference, peft.LoraConfig(r=2, target_modules=["wte"])).save_pretrained(tmp_path / "adapter")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"embed\.tokens is tied to head"):
        load_adapter(model, tmp_path / "adapter")
    assert_unchanged(model, before)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    model = both(tmp_path / "base", tiny_bert(), "sequence-classification")[1]
    add_lora(model, LoRAConfig(rank=2))
    unfreeze(model, "head.out.*")
    save_adapter(model, tmp_path / "adapter")
    assert LABELS["sequence-classification"] == 4
    other, _ = load(tmp_path / "base", "sequence-classification", labels=3, device="cpu")
    refused(other, tmp_path / "adapter", r"classifier\.(weight|bias) has")

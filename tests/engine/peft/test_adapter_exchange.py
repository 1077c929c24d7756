"""Adapters of every family carried over to PEFT and back, with all that can go into a file: outputs agree to 1e-5."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_adapters import assert_close, logits_of, shaken
from small_models import (
    both,
    tiny_bert,
    tiny_bloom,
    tiny_distilbert,
    tiny_gpt2,
    tiny_llama,
    tiny_modernbert,
    tiny_mpnet,
    tiny_roberta,
    token_rows,
)
from small_resnets import both_resnets, images
from small_t5 import both_t5
from small_vits import both_vits
from small_xlnet import both_xlnets
from starting import same_as_base
from torch import Tensor, nn

from handtune.engine import (
    LoRAConfig,
    TrainConfig,
    add_lora,
    freeze,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    train,
    unfreeze,
)
from handtune.engine.data.batches import Collate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.models import load, save

IDS = torch.tensor(token_rows((7, 7)))
TEXT = {"input_ids": IDS}


class Family(NamedTuple):
    """How PEFT's and our model are made, what they are given, and what may be adapted, by its published name."""

    make: Callable[[Path], Any]
    inputs: dict[str, Tensor]
    projections: list[str]
    layer: str  # a pattern for one of them in the second layer
    norm: str
    embedding: str | None = None


FAMILIES = {
    "gpt2": Family(
        lambda f: both(f, tiny_gpt2(), "causal-lm"), TEXT,
        ["c_attn", "c_proj", "c_fc"], r"h\.1\.attn\.c_attn", "ln_2", "wpe",
    ),
    "bert": Family(
        lambda f: both(f, tiny_bert(), "sequence-classification"), TEXT,
        ["query", "value", "output.dense"], r"layer\.1\..*\.query", "LayerNorm", "position_embeddings",
    ),
    "roberta": Family(
        lambda f: both(f, tiny_roberta(), "sequence-classification"), TEXT,
        ["query", "value", "output.dense"], r"layer\.1\..*\.query", "LayerNorm", "position_embeddings",
    ),
    "distilbert": Family(
        lambda f: both(f, tiny_distilbert(), "sequence-classification"), TEXT,
        ["q_lin", "v_lin", "lin2"], r"layer\.1\..*\.q_lin", "sa_layer_norm", "position_embeddings",
    ),
    "modernbert": Family(
        lambda f: both(f, tiny_modernbert(), "sequence-classification"), TEXT,
        ["Wqkv", "Wo", "Wi"], r"layers\.1\..*\.Wqkv", "mlp_norm", "tok_embeddings",
    ),
    "mpnet": Family(
        lambda f: both(f, tiny_mpnet(), "sequence-classification"), TEXT,
        ["attn.q", "attn.v", "output.dense"], r"layer\.1\..*\.q", "LayerNorm", "position_embeddings",
    ),
    "bloom": Family(
        lambda f: both(f, tiny_bloom(), "causal-lm"), TEXT,
        ["query_key_value", "dense"], r"h\.1\..*\.query_key_value", "ln_f",
    ),
    "t5": Family(both_t5, TEXT | {"decoder_input_ids": IDS}, ["q", "v", "wo"], r"block\.1\..*\.q", "final_layer_norm"),
    "llama": Family(
        lambda f: both(f, tiny_llama(), "causal-lm"), TEXT,
        ["q_proj", "v_proj", "down_proj"], r"layers\.1\..*\.q_proj", "input_layernorm", "embed_tokens",
    ),
    "resnet": Family(
        both_resnets, {"pixel_values": images(32, 32)},
        ["convolution"], r"stages\.1\..*\.convolution", "normalization",
    ),
    "vit": Family(
        both_vits, {"pixel_values": images(24, 24)},
        ["q_proj", "v_proj", "fc2"], r"layers\.1\..*\.q_proj", "layernorm_after",
    ),
    "dinov2": Family(
        lambda f: both_vits(f, "dinov2", use_swiglu_ffn=True), {"pixel_values": images(32, 24)},
        ["q_proj", "v_proj", "gate_proj", "down_proj"], r"layer\.1\..*\.q_proj", "layer_scale1",
    ),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)


def pefts(family: str) -> dict[str, dict[str, Any]]:
    """Settings of PEFT's by name: what can go into an adapter of this family."""
    _, _, projections, layer, norm, embedding = FAMILIES[family]
    plain: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": projections}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "patterns": {"rank_pattern": {layer: 2}, "alpha_pattern": {layer: 7}, "use_rslora": True},
        "regex": {"target_modules": rf".*{layer}"},
        "DoRA": {"use_dora": True},
        "biases of all": {"bias": "all"},
        "biases of adapted layers": {"bias": "lora_only"},
        "norms": {"modules_to_save": [norm]},
    }
    if embedding:
        kinds["an embedding"] = {"target_modules": [*projections, embedding]}
    if family not in ("t5", "resnet"):  # their layers have no number in PEFT's eyes
        kinds["one layer"] = {"layers_to_transform": [1]}
    if "input_ids" in FAMILIES[family].inputs:
        kinds["token rows"] = {"trainable_token_indices": [2, 5]}
    if family in ("bert", "distilbert", "modernbert", "mpnet", "roberta", "vit", "dinov2"):
        kinds["a head"] = {"modules_to_save": ["classifier"]}
    return {kind: plain | settings for kind, settings in kinds.items()}


@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family in FAMILIES for kind in pefts(family)], ids=lambda name: name
)
def test_we_load_pefts(family: str, kind: str, tmp_path: Path) -> None:
    make, inputs, *_ = FAMILIES[family]
    reference, model = make(tmp_path / "base")
    reference = shaken(peft.get_peft_model(reference, peft.LoraConfig(**pefts(family)[kind])))
    reference.eval().save_pretrained(tmp_path / "adapter")
    base = logits_of(model, inputs)
    load_adapter(model, tmp_path / "adapter")
    expected = logits_of(reference, inputs)
    assert (expected - base).abs().max() > 1e-2
    assert_close(logits_of(model, inputs), expected)
    save_adapter(model, tmp_path / "again")  # what was loaded is stored again
    back = peft.PeftModel.from_pretrained(make(tmp_path / "other")[0], str(tmp_path / "again"))
    assert_close(logits_of(back, inputs), expected)


OURS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "patterns": ({"rslora": True, "rank_pattern": 2, "alpha_pattern": 7}, ()),
    "DoRA": ({"dora": True}, ()),
    "biases of adapted layers": ({}, ("BIASES",)),
    "norms": ({}, ("*norm*",)),
    "weights under an adapter": ({}, ("WEIGHTS",)),
}


@every_family
@pytest.mark.parametrize("kind", OURS)
def test_peft_loads_ours(family: str, kind: str, tmp_path: Path) -> None:
    make, inputs, projections, layer, _, _ = FAMILIES[family]
    settings, unfrozen = OURS[kind]
    patterns = {key: {layer: value} for key, value in settings.items() if key.endswith("pattern")}
    reference, model = make(tmp_path / "base")
    paths = add_lora(model, LoRAConfig(rank=3, alpha=5, targets=projections, **{**settings, **patterns}))
    ends = {"BIASES": "bias", "WEIGHTS": "weight"}
    for glob in unfrozen:
        wanted = [f"{path}.{ends[glob]}" for path in paths] if glob in ends else [glob]
        known = dict(model.named_parameters())
        if wanted := [name for name in wanted if name in known or glob not in ends]:
            unfreeze(model, *wanted)
    shaken(model)
    save_adapter(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter"))
    assert_close(logits_of(adapted, inputs), logits_of(model, inputs))
    again = make(tmp_path / "other")[1]
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def test_xlnets_adapters_go_round(tmp_path: Path) -> None:
    """Its attention weights are bare tensors, which PEFT can't adapt, and refuses the file; all load it merged."""
    reference, model = both_xlnets(tmp_path / "base")
    add_lora(model, LoRAConfig(rank=3, alpha=5, rank_pattern={"layers.1.*": 2}, dora=True))
    unfreeze(model, "*norm*")
    expected = logits_of(shaken(model), TEXT)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(KeyError, match="HANDTUNE_LORA"):
        peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter"))
    again, _ = load(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits_of(again, TEXT), expected)
    merge_lora(again)
    assert_close(logits_of(again, TEXT), expected)
    save(again, None, tmp_path / "merged")
    assert_close(logits_of(type(reference).from_pretrained(tmp_path / "merged"), TEXT), expected)


def test_peft_finds_the_base_by_itself(tmp_path: Path) -> None:
    model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")[1]
    add_lora(model, LoRAConfig(rank=3))
    save_adapter(shaken(model), tmp_path / "adapter")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close(logits_of(found, TEXT), logits_of(model, TEXT))


def test_an_adapter_on_the_output_head(tmp_path: Path) -> None:
    make = partial(both, config=tiny_llama(tie_word_embeddings=False), task="causal-lm")
    reference, model = make(tmp_path / "base")
    reference = shaken(peft.get_peft_model(reference, peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"])))
    reference.eval().save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    assert_close(logits_of(model, TEXT), logits_of(reference, TEXT))
    save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(tmp_path / "other")[0], str(tmp_path / "ours"))
    assert_close(logits_of(back, TEXT), logits_of(model, TEXT))


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering", "reward"])
def test_the_head_goes_with_the_adapter(task: str, tmp_path: Path) -> None:
    """Also where it is frozen, or was frozen again: PEFT's models for these tasks ask for it."""
    config = tiny_gpt2()
    reference, model = both(tmp_path / "base", config, task)
    add_lora(model, LoRAConfig(rank=2))
    unfreeze(model, "head.*")
    shaken(model)
    freeze(model, "*")
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"]
    adapted = peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter"))
    out = adapted.eval()(**TEXT)
    theirs = torch.stack((out.start_logits, out.end_logits), -1) if task == "question-answering" else out.logits
    ours = logits_of(model, TEXT)
    assert_close(ours, theirs[:, 0] if task == "reward" else theirs)


def test_each_adapter_has_its_head_here_and_in_peft(tmp_path: Path) -> None:
    """Two that brought heads, and one under the base's; PEFT, with all three loaded, gives the same for each."""
    reference, model = both(tmp_path / "base", tiny_gpt2(), "sequence-classification")
    for seed, name in enumerate("abc"):
        add_lora(model, LoRAConfig(rank=2), name)
        if name != "c":
            unfreeze(model, "head.*")
        save_adapter(shaken(model, seed), tmp_path / name, name)
    again = both(tmp_path / "base", tiny_gpt2(), "sequence-classification")[1]
    theirs = peft.PeftModel.from_pretrained(reference, str(tmp_path / "a"), adapter_name="a")
    for name in "abc":
        load_adapter(again, tmp_path / name, name)
        if name != "a":
            theirs.load_adapter(str(tmp_path / name), name)
    for name in "bca":
        for one in (model, again, theirs):
            one.set_adapter(name) if one is theirs else set_adapter(one, name)
        assert torch.equal(logits_of(again, TEXT), logits_of(model, TEXT))
        assert_close(logits_of(again, TEXT), logits_of(theirs, TEXT))


def test_modules_are_stored_whole(tmp_path: Path) -> None:
    """PEFT loads whole modules: of a norm whose weight alone trains the bias goes along, and so do statistics."""
    model = both(tmp_path / "base", tiny_gpt2(), "causal-lm")[1]
    add_lora(model, LoRAConfig(rank=2))
    unfreeze(model, "layers.0.norm1.weight")
    save_adapter(shaken(model), tmp_path / "adapter")
    stored = {
        key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter/adapter_model.safetensors")
    }
    assert {key for key in stored if "ln_" in key} == {"transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias"}
    reference = both(tmp_path / "base", tiny_gpt2(), "causal-lm")[0]
    adapted = peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter"))
    assert_close(logits_of(adapted, TEXT), logits_of(model, TEXT))


def test_names_that_end_alike(tmp_path: Path) -> None:
    """PEFT takes "norm" for every module whose path ends so, and misses what it doesn't find of them."""
    reference, model = both(tmp_path / "base", tiny_llama(), "embedding")
    add_lora(model, LoRAConfig(rank=2))
    unfreeze(model, "norm.weight")
    shaken(model)
    save_adapter(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter"))
    states = adapted.eval()(**TEXT).last_hidden_state
    assert_close(model.hidden(IDS).detach(), states.detach())
    again, _ = load(tmp_path / "base", "embedding")
    load_adapter(again, tmp_path / "adapter")
    assert [name for name, p in again.named_parameters() if p.requires_grad and ".lora." not in name] == ["norm.weight"]


class Nested(nn.Module):
    """Two modules whose paths end alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc1": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(self.block["fc1"](x))


def test_patterns_name_one_module(tmp_path: Path) -> None:
    model = Nested()
    add_lora(model, LoRAConfig(rank=4, targets=["fc1"], rank_pattern={"block.fc1": 2}, alpha_pattern={"block.fc1": 9}))
    save_adapter(shaken(model), tmp_path)
    x = torch.randn(3, 6)
    adapted = peft.PeftModel.from_pretrained(Nested(), str(tmp_path))
    assert_close(adapted(x), model(x))
    again = Nested()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_what_trained_with_an_adapter_goes_with_it(tmp_path: Path) -> None:
    """Norms trained with a, whatever is frozen, attached or copied afterwards; b starts from the base, without them."""
    rows = [{"input_ids": row.tolist(), "targets": [*row[1:].tolist(), -100]} for row in IDS]
    make = FAMILIES["gpt2"].make
    model = make(tmp_path / "base")[1]
    base = logits_of(model, TEXT)
    add_lora(model, LoRAConfig(rank=2), "a")
    unfreeze(model, "layers.0.norm1.*")
    train(model, rows, causal_lm_loss, TrainConfig(lr=0.1), collate=Collate())
    freeze(model, "*")
    expected = {"a": logits_of(model, TEXT)}
    add_lora(model, LoRAConfig(rank=2), "b")
    assert same_as_base(logits_of(model, TEXT), base)
    expected["b"] = logits_of(shaken(model), TEXT)
    again = make(tmp_path / "base")[1]
    for name, source, norms in (("a", model, 2), ("b", copy.deepcopy(model), 0)):
        save_adapter(source, tmp_path / name, name)
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        assert sum("ln_1" in key for key in stored) == norms
        load_adapter(again, tmp_path / name, name)
        assert torch.equal(logits_of(again, TEXT), expected[name])


class Normed(nn.Module):
    """A convolution, a batch norm that counts its batches, and a parameter of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.scale = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.scale


def test_integers_and_bare_parameters_beside_an_adapter(tmp_path: Path) -> None:
    model, x = Normed(), torch.randn(2, 3, 8, 8)
    add_lora(model, LoRAConfig(rank=2, targets=["conv"]))
    unfreeze(model, "bn.*")
    shaken(model)
    model(x)
    save_adapter(model.eval(), tmp_path / "norm")
    again = Normed().eval()
    load_adapter(again, tmp_path / "norm")
    assert torch.equal(again(x), model(x))
    assert_close(peft.PeftModel.from_pretrained(Normed(), str(tmp_path / "norm")).eval()(x), model(x))
    unfreeze(model, "scale")
    model.scale.data.fill_(3.0)
    save_adapter(model, tmp_path / "bare")  # PEFT knows no module for it, and must not leave it out
    again = Normed().eval()
    load_adapter(again, tmp_path / "bare")
    assert torch.equal(again(x), model(x))
    with pytest.raises(KeyError, match="HANDTUNE_LORA"):
        peft.PeftModel.from_pretrained(Normed(), str(tmp_path / "bare"))


def test_a_module_in_two_places_has_its_adapter_in_both() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    model.append(model[0])
    add_lora(model, LoRAConfig(rank=2, targets=["0"]))
    assert model[0] is model[2]
    assert len(model[0].lora) == 1

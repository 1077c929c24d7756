"""LoRA on convolutions: exchange with PEFT, merging, what trains beside, foreign networks, refusals."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_models import assert_within
from small_resnets import both_resnets, images, their_resnet
from torch import nn

from handtune.engine import (
    LoRAConfig,
    add_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unfreeze,
    unmerge_lora,
    use_adapter,
)
from handtune.kernels import Conv2d
from handtune.models import load, save

WEIGHTS = "adapter_model.safetensors"
PEFTS = {
    "everything": {"target_modules": ["convolution"], "r": 3, "lora_alpha": 5},
    "by regex": {"target_modules": r".*layer\.[01]\.convolution", "r": 2},
    "rank and alpha of some": {
        "target_modules": ["convolution", "classifier.1"],
        "r": 4,
        "rank_pattern": {r"shortcut\.convolution": 2},
        "alpha_pattern": {r"layer\.1\.convolution": 7},
        "use_rslora": True,
    },
    "with a head": {"target_modules": ["convolution"], "r": 2, "modules_to_save": ["classifier.1"]},
    "with norms and a head": {"target_modules": ["convolution"], "modules_to_save": ["normalization", "classifier.1"]},
}


def shaken(module: nn.Module) -> nn.Module:
    """What trains moved away from where it begins."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.mark.parametrize("settings", PEFTS.values(), ids=PEFTS)
def test_we_load_pefts(tmp_path, settings):
    reference, model = both_resnets(tmp_path / "base")
    reference = shaken(peft.get_peft_model(reference, peft.LoraConfig(**settings)))
    if "normalization" in settings.get("modules_to_save", ()):
        reference.train()(images(seed=5))  # moves the statistics, which are stored with their norms
    reference.eval().save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert_within(model(images()), reference(images()).logits, 1e-4, "logits")
    x, labels = images(seed=2), torch.tensor([1, 2, 3])
    F.cross_entropy(model(x), labels).backward()
    F.cross_entropy(reference(x).logits, labels).backward()
    published = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    factors = model.layers[1].conv1.lora["default"]
    for ours, letter in ((factors.a, "A"), (factors.b, "B")):
        name = f"base_model.model.resnet.encoder.stages.1.layers.0.layer.0.convolution.lora_{letter}.default.weight"
        assert_within(ours.grad, published[name], 1e-4, name)


@pytest.mark.parametrize("beside", [(), ("head.*",), ("head.*", "layers.*norm*")], ids=str)
def test_peft_loads_ours(tmp_path, beside):
    reference, model = both_resnets(tmp_path / "base", layer_type="basic")
    adapted = add_lora(model, LoRAConfig(rank=3, alpha=5, rank_pattern={"conv2": 2}))
    assert adapted == tuple(
        f"layers.{i}.{name}"
        for i in range(3)
        for name in (("shortcut.conv", "conv1", "conv2") if i < 2 else ("conv1", "conv2"))
    )
    if beside:
        unfreeze(model, *beside)
    shaken(model)
    model.train()(images(seed=5))
    model.eval()
    save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    again, _ = load(tmp_path / "base", device="cpu")
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert_within(loaded(images()).logits, model(images()), 1e-4, "logits")
        assert torch.equal(again(images()), model(images()))
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trained[0] == trained[1]


def test_keys_and_shapes_on_disk(tmp_path):
    _, model = both_resnets(tmp_path / "base", layer_type="basic", depths=[1, 1])
    add_lora(model, LoRAConfig(rank=3, alpha=6, dropout=0.25, targets=["layers.1.conv1", "layer.1.convolution"]))
    save_adapter(model, tmp_path / "adapter")
    names = {f"stages.{stage}.layers.0.layer.1": (24 if stage else 16,) * 2 for stage in range(2)}
    names["stages.1.layers.0.layer.0"] = (16, 24)
    base = "base_model.model.resnet.encoder"
    assert {key: tuple(value.shape) for key, value in load_file(tmp_path / "adapter" / WEIGHTS).items()} == {
        **{f"{base}.{name}.convolution.lora_A.weight": (3, fan_in, 3, 3) for name, (fan_in, _) in names.items()},
        **{f"{base}.{name}.convolution.lora_B.weight": (out, 3, 1, 1) for name, (_, out) in names.items()},
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.25)
    load_adapter(model, tmp_path / "adapter", "again")
    assert model.layers[1].conv1.lora["again"].dropout == 0.25


def test_a_fresh_adapter_changes_nothing_and_dropout_acts_in_training_only(tmp_path):
    _, model = both_resnets(tmp_path)
    before = model(images())
    add_lora(model, LoRAConfig(rank=2, dropout=0.5))
    assert torch.equal(model(images()), before)
    assert torch.equal(model.train()(images()), before)  # frozen norms, and B is zero
    shaken(model)
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merging_is_exact_and_undone_bitwise(tmp_path, dtype):
    reference, _ = both_resnets(tmp_path / "base")
    model, _ = load(tmp_path / "base", dtype=dtype, device="cpu")
    plain = model(images())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, LoRAConfig(rank=3, alpha=6))
    shaken(model)
    tuned = model(images())
    with use_adapter(model, None):
        assert torch.equal(model(images()), plain)
    merge_lora(model)
    assert_within(model(images()), tuned, 1e-4 if dtype == torch.float32 else 0.3, "merged")
    save(model, None, tmp_path / "merged")
    merged = type(reference).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert_within(merged(images()).logits, model(images()), 1e-4 if dtype == torch.float32 else 0.3, "transformers")
    unmerge_lora(model)
    assert torch.equal(model(images()), tuned)
    set_adapter(model, None)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class Net(nn.Module):
    """A CNN of somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 6, (3, 5), padding="same")
        self.deep = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.pairs = nn.Conv2d(6, 8, 3, stride=2, padding="valid", groups=2, bias=False)
        self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = self.mirrored(self.pairs(self.deep(self.wide(x)).relu()).relu()).relu()
        return self.fc(x.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_a_foreign_network_exchanges_with_peft(tmp_path):
    targets = ["wide", "deep", "pairs"]
    with pytest.warns(UserWarning, match="groups > 1"):
        reference = peft.get_peft_model(net(), peft.LoraConfig(r=6, target_modules=targets))
    shaken(reference).eval().save_pretrained(tmp_path / "theirs")
    ours, x = net().eval(), images(9, 11)
    keys = set(ours.state_dict())
    load_adapter(ours, tmp_path / "theirs")
    assert_within(ours(x), reference(x), 1e-5, "ours")
    assert {key for key in ours.state_dict() if ".lora." not in key} == keys
    save_adapter(ours, tmp_path / "ours")
    with pytest.warns(UserWarning, match="groups > 1"):
        again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    assert_within(again(x), reference(x), 1e-5, "again")
    with pytest.raises(ValueError, match="deep is a convolution in 6 groups.*can't be merged"):
        merge_lora(ours)
    fresh = net()
    add_lora(fresh, LoRAConfig(rank=2, targets=["wide", "fc"]))
    shaken(fresh)
    tuned = fresh(x)
    merge_lora(fresh)
    assert_within(fresh(x), tuned, 1e-5, "merged")


@pytest.mark.parametrize(
    ("targets", "rank", "says"),
    [
        (["mirrored"], 2, "mirrored: padding_mode 'reflect' is not implemented for an adapter"),
        (["wide", "deep"], 4, "deep: rank 4 can't be divided among the 6 groups"),
        (["conv*"], 2, r"'conv\*' matches no layer; there are deep, fc, mirrored"),
        ("attention", 2, "known for handtune's own models only"),
    ],
)
def test_what_does_not_fit_a_foreign_network_is_refused_and_nothing_changed(targets, rank, says):
    model = net()
    with pytest.raises(ValueError, match=says):
        add_lora(model, LoRAConfig(rank=rank, targets=targets))
    assert not any(isinstance(module, Conv2d) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_all_linear_is_without_convolutions_in_a_foreign_network():
    model = net()
    with pytest.raises(ValueError, match='"all-linear" matches no projection; name the layers'):
        add_lora(model, LoRAConfig(rank=2))
    uneven = nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"))
    with pytest.raises(ValueError, match='0: padding "same" of an even kernel'):
        add_lora(uneven, LoRAConfig(rank=2, targets=["0"]))


def test_groups_of_targets(tmp_path):
    _, model = both_resnets(tmp_path)
    with pytest.raises(ValueError, match="'attention': ResNet has no such group, but convolutions"):
        add_lora(model, LoRAConfig(targets="attention"))
    assert add_lora(model, LoRAConfig(targets="convolutions"), "a") == add_lora(model, LoRAConfig(), "b")
    stem = add_lora(model, LoRAConfig(targets=["embed.conv", "head.out"]), "c")
    assert stem == ("embed.conv", "head.out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("shape", r"convolution has factors of shape \(\(3, 8, 1, 1\), .* the model needs \(\(3, 8, 3, 3\), "),
        ("lone", "is there without"),
        ("another", "has no place in this model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, change, says):
    from safetensors.torch import save_file

    reference = their_resnet(layer_type="basic")
    peft.get_peft_model(reference, peft.LoraConfig(r=3, target_modules=["convolution"])).save_pretrained(tmp_path / "a")
    state = load_file(tmp_path / "a" / WEIGHTS)
    name = "base_model.model.resnet.encoder.stages.0.layers.0.layer.0.convolution.lora_A.weight"
    if change == "shape":
        state[name] = state[name][:, :, :1, :1].contiguous()
    elif change == "lone":
        del state[name]
    else:
        state["base_model.model.resnet.encoder.stages.7.normalization.running_mean"] = torch.zeros(3)
    save_file(state, tmp_path / "a" / WEIGHTS)
    _, model = both_resnets(tmp_path / "base", layer_type="basic")
    with pytest.raises(ValueError, match=says):
        load_adapter(model, tmp_path / "a")
    assert all(p.requires_grad for p in model.parameters())

"""ViT and DINOv2 against transformers: outputs, gradients, positions of any size, both sets of names; runs of them."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from small_images import class_folders
from small_models import assert_same_state, assert_within, change_config
from small_resnets import images
from small_vits import both_vits, their_outputs, their_vit
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from handtune import predict
from handtune.cli import main
from handtune.engine import LoRAConfig, add_lora, freeze, load_adapter, save_adapter, unfreeze
from handtune.engine.adapters.targets import match_targets
from handtune.engine.data.images import ImageCollate, decode
from handtune.models import Bert, Dinov2, ViT, load, save
from handtune.models.layers.image_processor import ImageProcessor

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "vit, another activation": ("vit", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}),
    "vit, no bias in q, k and v": ("vit", {"qkv_bias": False}),
    "vit, one channel": ("vit", {"num_channels": 1}),
    "vit, pixels left over": ("vit", {"image_size": 27}),
    "dinov2": ("dinov2", {}),
    "dinov2, gated": ("dinov2", {"use_swiglu_ffn": True}),
    "dinov2, odd widths": ("dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 3, "hidden_size": 30}),
    "dinov2, relu": ("dinov2", {"hidden_act": "relu", "mlp_ratio": 2, "qkv_bias": False, "layer_norm_eps": 0.1}),
    "dinov2, one channel": ("dinov2", {"num_channels": 1, "use_mask_token": False}),
    "registers": ("dinov2_with_registers", {}),
    "registers, gated": ("dinov2_with_registers", {"use_swiglu_ffn": True, "num_register_tokens": 2}),
}
QUICK = ("vit", "dinov2", "dinov2, gated", "registers")
every_config = pytest.mark.parametrize(
    ("kind", "overrides"),
    [pytest.param(*CONFIGS[name], id=name, marks=() if name in QUICK else pytest.mark.deep) for name in CONFIGS],
)
every_kind = pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers"])


def inputs_for(kind: str, overrides: dict[str, Any], sides: tuple[int, int] = (41, 20)) -> torch.Tensor:
    """Images of the size that a ViT takes, for others of these sides."""
    size = overrides.get("image_size", 24)
    return images(*((size, size) if kind == "vit" else sides), channels=overrides.get("num_channels", 3))


@torch.no_grad()
@every_config
def test_outputs_are_those_of_transformers(tmp_path, kind, overrides):
    for task in ("image-classification", "embedding"):
        reference, model = both_vits(tmp_path / task, kind, task, **overrides)
        for sides in ((24, 24), (41, 20)):
            x = inputs_for(kind, overrides, sides)
            assert_within(model(x), their_outputs(reference, x), 1e-5, f"{task}, {sides}")
        assert_within(model.hidden(x), getattr(reference, kind, reference)(x).last_hidden_state, 1e-5, "states")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize("sides", [(24, 24), (40, 40), (8, 72), (9, 15), (100, 30)], ids=str)
def test_positions_between_the_patches_are_those_of_transformers(tmp_path, kind, sides):
    """Also where there are as many patches in another shape (8 × 72), and fewer than in the table."""
    reference, model = both_vits(tmp_path, kind, "embedding", image_size=24)
    x = images(*sides)
    assert_within(model.embedded(x), reference.embeddings(x), 1e-5, "embedded")


@every_config
def test_gradients_are_those_of_transformers(tmp_path, kind, overrides):
    reference, model = both_vits(tmp_path, kind, **overrides)
    x, labels = inputs_for(kind, overrides), torch.tensor([4, 0, 2])
    F.cross_entropy(reference(x).logits, labels, reduction="sum").backward()
    F.cross_entropy(model(x), labels, reduction="sum").backward()
    table = model.key_map()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        source = table[name]
        expected = torch.cat([source.ours(theirs.pop(part).grad) for part in source.names])
        # The bias of keys changes no score: its gradient is rounding noise.
        assert_within(parameter.grad, expected, 1e-4 * expected.abs().max().item(), name)
    assert {name.rpartition(".")[2] for name in theirs} <= {"mask_token"}


@pytest.mark.parametrize("task", ["image-classification", "embedding"])
@every_config
def test_transformers_loads_what_is_saved(tmp_path, kind, overrides, task):
    """Every tensor bit for bit, DINOv2's token of masked patches among them; under the names that it writes itself."""
    reference, model = both_vits(tmp_path / "theirs", kind, task, **overrides)
    save(model, None, tmp_path / "ours")
    if kind == "vit" and task == "embedding":
        reference.pooler = None  # which no task reads
        loaded = transformers.ViTModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False)
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in reference.state_dict().items())
    elif overrides.get("use_mask_token", True):
        loaded = assert_same_state(reference, tmp_path / "ours")
    else:
        loaded = type(reference).from_pretrained(tmp_path / "ours")
    x = inputs_for(kind, overrides)
    assert_within(their_outputs(loaded.eval(), x), model(x).detach(), 1e-5, "outputs")
    theirs, ours = (set(load_file(tmp_path / place / "model.safetensors")) for place in ("theirs", "ours"))
    assert {name for name in theirs ^ ours if "pooler" not in name and "mask_token" not in name} == set()
    stored = json.loads((tmp_path / "theirs" / "config.json").read_text())
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert all(stored[name] == value for name, value in written.items() if name in stored and name != "use_mask_token")


@every_kind
def test_both_sets_of_names_are_read(tmp_path, kind):
    """Tensors by the names of transformers' modules, as in a state dict, with the prefix of a model for a task."""
    reference, model = both_vits(tmp_path, kind, use_swiglu_ffn=True) if kind != "vit" else both_vits(tmp_path)
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    x = images(24, 24)
    again, _ = load(tmp_path, device="cpu")
    assert torch.equal(again(x), model(x))
    base = type(again).architectures["embedding"].format(type(again).model_types[kind])
    getattr(transformers, base).from_pretrained(tmp_path).save_pretrained(tmp_path / "base")
    assert torch.equal(load(tmp_path / "base", "embedding", device="cpu")[0](x), model.hidden(x)[:, 0])


@every_kind
def test_a_tensor_by_both_its_names_is_refused(tmp_path, kind):
    both_vits(tmp_path, kind)
    state = load_file(tmp_path / "model.safetensors")
    name = f"{kind}.encoder.layer.1.attention.attention.key.weight"
    layers = "layers" if kind == "vit" else "encoder.layer"
    state[f"{kind}.{layers}.1.attention.k_proj.weight"] = state[name].clone()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 left over: {name}"):
        load(tmp_path, device="cpu")


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "overrides", "quirk"),
    [
        ("dinov2", {}, "scales"),
        ("dinov2", {}, "mean of patches"),
        ("dinov2", {}, "positions"),
        ("dinov2_with_registers", {}, "registers in the mean"),
        ("dinov2_with_registers", {}, "smoothing"),
        ("dinov2", {"use_swiglu_ffn": True}, "gate and value"),
        ("vit", {}, "last norm"),
    ],
)
def test_ignoring_a_quirk_would_show(tmp_path, kind, overrides, quirk, monkeypatch):
    _, model = both_vits(tmp_path, kind, **overrides)
    x = inputs_for(kind, overrides, (16, 56))
    before = model(x)
    if quirk == "scales":
        for block in model.layers:
            block.scale1.fill_(1.0)
    elif quirk == "mean of patches":
        monkeypatch.setattr(model, "pool", lambda states: states[:, :1].expand(-1, 2, -1).flatten(1))
    elif quirk == "positions":
        nearest = F.interpolate(model.embed.positions[:, 1:].mT.unflatten(2, (3, 3)), (2, 7)).flatten(2).mT
        positions = torch.cat((model.embed.positions[:, :1], nearest), 1)
        monkeypatch.setattr("handtune.models.vit.dinov2.resized_positions", lambda *sizes: positions)
    elif quirk == "registers in the mean":
        monkeypatch.setattr(model, "pool", lambda states: torch.cat((states[:, 0], states[:, 1:].mean(1)), 1))
    elif quirk == "smoothing":
        resized = __import__("handtune.models.vit.blocks", fromlist=["x"]).resized_positions
        monkeypatch.setattr("handtune.models.vit.dinov2.resized_positions", lambda *sizes: resized(*sizes[:-1]))
    elif quirk == "gate and value":
        for block in model.layers:
            block.gate_up.weight.copy_(block.gate_up.weight.roll(len(block.gate_up.weight) // 2, 0))
    else:
        model.norm = torch.nn.Identity()
    assert (model(x) - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [
        ("vit", "vit-tiny-patch16-224", 5_717_416),
        ("vit", "vit-small-patch16-224", 22_050_664),
        ("vit", "vit-base-patch16-224", 86_567_656),
        ("vit", "vit-base-patch16-384", 86_859_496),
        ("vit", "vit-large-patch16-224", 304_326_632),
        ("dinov2", "dinov2-small", 22_056_576),
        ("dinov2", "dinov2-base", 86_580_480),
        ("dinov2", "dinov2-large", 304_368_640),
        ("dinov2", "dinov2-giant", 1_136_480_768),
        ("dinov2", "dinov2-with-registers-base", 86_583_552),
    ],
)
def test_presets_have_the_published_sizes(kind, name, count):
    """Every tensor of theirs: a ViT's with a thousand classes, DINOv2's with the token of masked patches."""
    labels = tuple(map(str, range(1000))) if kind == "vit" else ()
    with torch.device("meta"):
        model = {"vit": ViT, "dinov2": Dinov2}[kind].from_name(name, labels=labels)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == count


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("vit", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is unknown; known: gelu"),
        ("vit", {"head_dim": 4}, "head_dim = 4 is not implemented"),
        ("vit", {"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
        ("vit", {"image_size": [24, 24]}, r"image_size = \[24, 24\]: expected int"),
        ("vit", {"patch_size": 32}, "patch_size 32 leaves no patch in an image_size of 24"),
        ("vit", {"qkv_bias": "no"}, "qkv_bias = 'no': expected bool"),
        ("dinov2", {"drop_path_rate": 0.1}, "drop_path_rate = 0.1 is not implemented"),
        ("dinov2", {"mlp_ratio": "4"}, "mlp_ratio = '4': expected"),
        ("dinov2_with_registers", {"num_register_tokens": 0}, "num_register_tokens = 0: expected a positive number"),
        ("dinov2", {"patch_size": 4}, "the weights don't fit config.json; .*of another shape: .*position_embeddings"),
        (
            "dinov2",
            {"hidden_size": 48},
            r"of another shape: dinov2\.embeddings\.cls_token \(1, 1, 24\), expected \(1, 1, 48\)",
        ),
    ],
    ids=str,
)
def test_a_configuration_that_is_another_model(tmp_path, kind, fields, says):
    their_vit(kind).save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=says):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("CLIP", "'clip' is not .*; it reads texts and images together, and near there is 'vit' for images alone$"),
        ("Gemma3", "'vit' for images alone, 'gemma3_text' for texts alone$"),
        ("CLIPVision", "the nearest there is 'vit'$"),
        ("Beit", "the nearest there is 'vit'$"),
        ("DINOv3ViT", "the nearest there is 'dinov2'$"),
        ("Deberta", "the nearest there is 'bert'$"),
    ],
)
def test_other_architectures_are_answered_with_one_of_their_kind(tmp_path, kind, says):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        load(tmp_path, device="cpu")


def test_weights_of_the_other_kind_are_listed(tmp_path):
    """A text model's configuration with an image model's weights, and the other way round."""
    their_vit().save_pretrained(tmp_path / "vit")
    sizes = {"n_layer": 2, "n_head": 3, "d_model": 24, "d_ff": 40, "vocab_size": 61, "max_positions": 40}
    save(Bert.from_name("bert-base-uncased", **sizes), None, tmp_path / "bert")
    configs = [tmp_path / name / "config.json" for name in ("vit", "bert")]
    texts = [path.read_text() for path in configs]
    for path, text in zip(configs, reversed(texts), strict=True):
        path.write_text(text)
    with pytest.raises(ValueError, match=r"missing: bert\.embeddings\.word_embeddings\.weight.*left over: .*cls_token"):
        load(tmp_path / "vit", device="cpu")
    with pytest.raises(ValueError, match=r"missing: vit\.embeddings\.cls_token.*left over: .*word_embeddings"):
        load(tmp_path / "bert", device="cpu")


def test_images_that_do_not_fit_are_refused(tmp_path):
    _, vit = both_vits(tmp_path / "vit")
    _, dinov2 = both_vits(tmp_path / "dinov2", "dinov2")
    with pytest.raises(ValueError, match="images of 32 x 24 pixels, but this ViT's .* image_size = 24"):
        vit(images(32, 24))
    with pytest.raises(ValueError, match="images of 40 x 7 pixels are smaller than a patch of 8 x 8"):
        dinov2(images(40, 7))
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got \(3, 1, 24, 24\)"):
        vit(images(24, 24, channels=1))
    with pytest.raises(ValueError, match="ViT can do image-classification, embedding"):
        ViT.from_name("vit-base-patch16-224", task="causal-lm")


@pytest.mark.parametrize(
    ("kind", "processor", "expected"),
    [
        (
            "vit",
            ViTImageProcessorPil(size={"height": 24, "width": 24}),
            ImageProcessor(24, 24, True, 2, (0.5,) * 3, (0.5,) * 3),
        ),
        (
            "dinov2",
            BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
            ImageProcessor(28, 32, False, 3, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ),
    ],
)
def test_images_are_prepared_as_published(tmp_path, kind, processor, expected):
    """By the settings beside the weights, which are written so that transformers prepares images in the same way."""
    _, model = both_vits(tmp_path / "theirs", kind)
    assert model.pixels == (expected if kind == "vit" else ImageProcessor())
    processor.save_pretrained(tmp_path / "theirs")
    model, _ = load(tmp_path / "theirs", device="cpu")
    assert model.pixels == expected
    save(model, None, tmp_path / "ours")
    assert load(tmp_path / "ours", device="cpu")[0].pixels == expected

    array = np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "image.png")
    collated = ImageCollate(expected)([{"image": decode(tmp_path / "image.png", expected), "label": 0}])
    written = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())["image_processor_type"]
    assert written == "BitImageProcessor"
    for place, its_class in (("theirs", type(processor)), ("ours", BitImageProcessorPil)):
        out = its_class.from_pretrained(tmp_path / place)(array, return_tensors="pt")["pixel_values"]
        assert_within(collated["inputs"]["pixel_values"], out, 1e-5, place)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_kind
def test_other_dtypes(tmp_path, kind, dtype):
    reference, _ = both_vits(tmp_path, kind)
    model, _ = load(tmp_path, dtype=dtype, device="cpu")
    x = inputs_for(kind, {})
    assert model(x).dtype == dtype
    assert_within(model(x), their_outputs(reference, x), 0.3 if dtype == torch.bfloat16 else 1e-5, "logits")


@every_kind
def test_fresh_weights_and_frozen_ones(kind):
    """Nothing is left unset, scales begin where they are told to, and what is frozen gets no gradient."""
    family = ViT if kind == "vit" else Dinov2
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 3, "d_model": 24, "image_size": 24, "patch_size": 8}
    sizes |= {"d_ff": 40} if kind == "vit" else {"layer_scale": 0.25, "n_registers": 2 if "reg" in kind else None}
    name = next(iter(family.presets))
    model = family.from_name(name, task="image-classification", labels=("a", "b"), head_layers=2, **sizes)
    for key, tensor in model.state_dict().items():
        expected = {"bias": 0, "norm": 1, "scale": 0.25, "mask": 0}
        value = next((value for part, value in expected.items() if part in key and "norm.bias" not in key), None)
        if key.endswith("bias"):
            value = 0
        assert torch.equal(tensor, torch.full_like(tensor, value)) if value is not None else 0.01 < tensor.std() < 0.03
    freeze(model, "*")
    unfreeze(model, "head.*", "layers.1.*")
    model(images(24, 24)).sum().backward()
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"head", "layers"}
    assert all(p.grad is None for p in model.layers[0].parameters())


@every_kind
def test_an_adapter_by_its_former_names(tmp_path, kind):
    """As PEFT stored it before transformers renamed its modules."""
    _, model = both_vits(tmp_path / "base", kind)
    add_lora(model, LoRAConfig(rank=2, targets=["qkv", "o", "*.up"]))
    unfreeze(model, "layers.1.norm1.*")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    pairs = [("attention.q_proj", "attention.attention.query"), ("attention.k_proj", "attention.attention.key")]
    pairs += [("attention.v_proj", "attention.attention.value"), ("attention.o_proj", "attention.output.dense")]
    pairs += [("vit.layers", "vit.encoder.layer"), ("mlp.fc1", "intermediate.dense")] if kind == "vit" else []
    for new, former in pairs:
        tensors = {name.replace(new, former): tensor for name, tensor in tensors.items()}
    assert tensors.keys() != load_file(path).keys()
    save_file(tensors, path)
    again, _ = load(tmp_path / "base", device="cpu")
    load_adapter(again, tmp_path / "adapter")
    x = images(24, 24)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("vit", "lora"),
        ("dinov2", "head"),
        *(
            pytest.param(kind, way, marks=pytest.mark.deep)
            for kind in ("vit", "dinov2", "dinov2_with_registers")
            for way in ("lora", "full", "nf4", "head")
            if (kind, way) not in (("vit", "lora"), ("dinov2", "head"))
        ),
    ],
)
def test_training_by_the_command_line(tmp_path, kind, way):
    """On images that a folder holds; merged, the model gives transformers what the run's gives here."""
    their_vit(kind, hidden_size=48, initializer_range=0.1).save_pretrained(tmp_path / "base")
    data = class_folders(tmp_path / "data", count=12)
    sizes = {} if kind == "vit" else {"image_size": 32}
    tables = {
        "model": {"path": str(tmp_path / "base"), **({"quantize": "nf4"} if way == "nf4" else {})},
        "data": {"train": str(data), "eval": 0.25, "augment": False, **sizes},
        "train": {"batch_size": 6, "lr": 1e-2, "epochs": 4, "best": "last"},
        **({"lora": {"rank": 4}} if way in ("lora", "nf4") else {}),
        **({"freeze": {"names": ["*"], "except": ["head.*"]}} if way == "head" else {}),
    }
    text = f'method = "classify"\nout = {json.dumps(str(tmp_path / "run"))}\n'
    for table, fields in tables.items():
        text += f"[{table}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())
    (tmp_path / "config.toml").write_text(text)
    assert main(["train", str(tmp_path / "config.toml")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["loss"] < result["before"]["loss"]
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0

    merged, _ = load(tmp_path / "merged", device="cpu")
    assert merged.labels == ("sea", "sky") and merged.pixels.size == (24 if kind == "vit" else 32)
    x = images(merged.pixels.size, merged.pixels.size)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert_within(merged(x).detach(), their_outputs(theirs, x), 1e-5, "merged")
    if way == "lora":
        adapted, _ = load(tmp_path / "base", labels=["sea", "sky"], device="cpu")
        load_adapter(adapted, tmp_path / "run" / "adapter")
        assert_within(merged(x).detach(), adapted(x).detach(), 1e-4, "adapted")


IN21K = {
    "do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 24,
}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {"feature_extractor_type": "ViTFeatureExtractor", "resample": 2},  # as the first ViTs are published
        {"image_processor_type": "ViTImageProcessor"},
        {},
    ],
    ids=["as it was", "no filter", "no class"],
)
def test_a_size_of_one_number_is_a_square_of_this_side(more, tmp_path):
    """And what such a file leaves out is what transformers' class for ViTs does."""
    their_vit().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**IN21K, **more}))
    model, _ = load(tmp_path, device="cpu")
    assert model.pixels == ImageProcessor(24, 24, True, 2, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_head_that_chooses_no_class_is_refused(problem, tmp_path):
    their_vit().save_pretrained(tmp_path)
    change_config(tmp_path, problem_type=problem)
    with pytest.raises(ValueError, match="and one class of several is predicted here"):
        predict(tmp_path, ["a.png"])


@every_kind
def test_embeddings_of_images_are_those_of_transformers(tmp_path, kind):
    reference, model = both_vits(tmp_path, kind, "embedding")
    model.pixels = ImageProcessor(24, 30)
    model.pixels.write(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    (ours,) = predict(tmp_path, [str(tmp_path / "a.png")])
    pixels = BitImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    expected = their_outputs(reference, pixels)[0]
    torch.testing.assert_close(torch.tensor(ours["embedding"]), expected, atol=1e-4, rtol=0)


def test_published_targets_of_before_modules_were_renamed():
    """`query` and `value`, as guides to adapting a ViT have it."""
    model = ViT.from_name("vit-tiny-patch16-224", n_layer=1, task="embedding")
    assert match_targets(model, ["query", "value"]) == match_targets(model, ["q_proj", "v_proj"])
    assert match_targets(model, ["attention.output.dense"]) == match_targets(model, ["o_proj"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.image_size=32"], "images of 32 pixels a side, but the positions of this model are for 24"),
        (["method=embed"], "method 'embed': ViT reads images, for which there is method classify"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_begins(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    their_vit().save_pretrained("base")
    class_folders(tmp_path / "images")
    (tmp_path / "run.toml").write_text(
        "method = 'classify'\nout = 'run'\n[model]\npath = 'base'\n[data]\ntrain = 'images'\n[train]\nepochs = 1\n"
    )
    for command in ("check-data", "train"):
        assert main([command, "run.toml", *arguments]) == 2
        assert says in capsys.readouterr().err


def test_code_of_its_own_is_not_run(tmp_path, caplog):
    their_vit().save_pretrained(tmp_path)
    change_config(tmp_path, auto_map={"AutoModel": "modeling_x.Y"})
    load(tmp_path, device="cpu")
    assert "auto_map = {'AutoModel': 'modeling_x.Y'}: that code is not run" in caplog.text

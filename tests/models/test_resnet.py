"""ResNet against transformers: outputs, gradients, statistics, both spellings of checkpoints; frozen norms."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from small_models import assert_same_state, assert_within
from small_resnets import CONFIGS, assert_same_outputs, both_resnets, images, statistics, their_resnet, torchvision_name
from torch import nn

from handtune.engine import LoRAConfig, TrainConfig, add_lora, freeze, train, unfreeze
from handtune.models import ResNet, load, save

every_config = pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)


@every_config
@pytest.mark.parametrize("sides", [(45, 38), (64, 64), (33, 97), (5, 3)], ids=str)
def test_outputs_are_those_of_transformers(tmp_path, overrides, sides):
    reference, model = both_resnets(tmp_path, **overrides)
    assert_same_outputs(reference, model, images(*sides, channels=overrides.get("num_channels", 3)))


@every_config
def test_the_pooled_vector_is_that_of_transformers(tmp_path, overrides):
    reference, model = both_resnets(tmp_path, "embedding", **overrides)
    x = images(channels=overrides.get("num_channels", 3))
    assert_same_outputs(reference, model, x)
    assert model.hidden(x).shape == reference(x).last_hidden_state.shape


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@every_config
def test_gradients_and_statistics_are_those_of_transformers(tmp_path, overrides, training):
    reference, model = both_resnets(tmp_path, **overrides)
    x, labels = images(channels=overrides.get("num_channels", 3)), torch.tensor([4, 0, 2])
    for module in (reference, model):
        module.train(training)
    for _ in range(2):
        loss = F.cross_entropy(reference(x).logits, labels, reduction="sum")
        ours = F.cross_entropy(model(x), labels, reduction="sum")
        assert_within(ours, loss, 1e-4, "loss")
        loss.backward()
        ours.backward()
    table = model.key_map()
    published = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = published.pop(table[name].names[0])
        # In training a norm takes away the scale and mean of what is in front: some gradients are rounding noise.
        bound = 1e-4 * max(expected.abs().max().item(), 1.0 if training else 0.0)
        assert_within(parameter.grad, expected, bound, name)
    assert not published
    buffers = dict(reference.named_buffers())
    for name, buffer in model.named_buffers():
        assert_within(buffer, buffers[table[name].names[0]], 1e-5, name)
    assert model.embed.norm.num_batches_tracked == (9 if training else 7)


@pytest.mark.parametrize("task", ["image-classification", "embedding"])
@every_config
def test_transformers_loads_what_is_saved(tmp_path, overrides, task):
    reference, model = both_resnets(tmp_path / "theirs", task, **overrides)
    model.train()
    save(model, None, tmp_path / "ours")
    loaded = assert_same_state(reference, tmp_path / "ours")
    assert loaded.config.id2label == reference.config.id2label
    assert not (tmp_path / "ours" / "modules.json").exists()


@every_config
def test_torchvision_names_are_read(tmp_path, overrides):
    """Tensors renamed as torchvision has them, without num_batches_tracked, as in its old files."""
    _, model = both_resnets(tmp_path, **overrides)
    state = load_file(tmp_path / "model.safetensors")
    renamed = {torchvision_name(name): tensor for name, tensor in state.items()}
    assert len(renamed) == len(state)
    kept = {name: tensor for name, tensor in renamed.items() if "num_batches" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    again, _ = load(tmp_path, device="cpu")
    x = images(channels=overrides.get("num_channels", 3))
    assert torch.equal(again(x), model(x))
    assert all(int(t) == 0 for name, t in again.named_buffers() if name.endswith("num_batches_tracked"))
    save_file(renamed, tmp_path / "model.safetensors")
    state, expected = load(tmp_path, device="cpu")[0].state_dict(), model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def timm_folder(folder, **changes):
    """A ResNet-18 as timm publishes one, with ten classes."""
    torch.manual_seed(0)
    sizes = {"layer_type": "basic", "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    reference = their_resnet(num_labels=10, **sizes)
    folder.mkdir()
    state = {torchvision_name(name): tensor for name, tensor in reference.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    pixels = {"input_size": [3, 160, 160], "crop_pct": 0.95, "interpolation": "bilinear"}
    pixels |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_mode": "center"}
    config = {"architecture": "resnet18", "num_classes": 10, "num_features": 512, "pretrained_cfg": pixels}
    config |= {"model_args": {"in_chans": 3, "num_classes": 10, "global_pool": "avg"}, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return reference


def test_a_folder_of_timm(tmp_path):
    reference = timm_folder(tmp_path / "timm")
    model, tokenizer = load(tmp_path / "timm", device="cpu")
    assert tokenizer is None and model.labels == tuple(str(i) for i in range(10))
    assert_same_outputs(reference, model, images(64, 64))
    assert (model.pixels.size, model.pixels.edge, model.pixels.resample) == (160, 168, 2)
    assert model.pixels.mean == (0.5, 0.4, 0.3)
    save(model, None, tmp_path / "ours")
    again, _ = load(tmp_path / "ours", device="cpu")
    assert again.pixels == model.pixels
    assert_same_state(reference, tmp_path / "ours")
    other, _ = load(tmp_path / "timm", labels=["car", "truck"], device="cpu")
    assert other.head_is_new and other(images(64, 64)).shape == (3, 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "resnet18d"}, r"config\.json: architecture 'resnet18d' is not one of handtune \(resnet18, "),
        ({"model_args": {"stem_width": 32}}, r"model_args = \{'stem_width': 32\} is not implemented"),
        ({"model_args": {"global_pool": "max"}}, "global_pool = 'max' is not implemented"),
        ({"pretrained_cfg": {"input_size": [3, 64, 64], "interpolation": "random"}}, "interpolation = 'random'"),
        ({"pretrained_cfg": {"interpolation": "bilinear"}}, ".input_size. is missing, of what is done to images"),
        (
            {"pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5]}},
            r"mean = \[0.5\]: expected one value for each",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_folder_of_timm_that_is_another_model(tmp_path, changes, says):
    timm_folder(tmp_path / "timm", **changes)
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "timm", device="cpu")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("hidden_act", "gelu", "hidden_act = 'gelu' is not implemented"),
        ("layer_type", "preactivation", "layer_type = 'preactivation' is not implemented"),
        ("depths", [1, 2, 3], r"depths \(1, 2, 3\): expected positive numbers, one of each a stage"),
        ("depths", [1, 0], "expected positive numbers"),
        ("hidden_sizes", "16, 24", "hidden_sizes or depths = '16, 24': expected a list of numbers"),
        ("num_channels", 0, "num_channels = 0: expected a positive number"),
        ("downsample_in_bottleneck", "yes", "downsample_in_bottleneck = 'yes': expected bool"),
    ],
)
def test_a_configuration_that_is_another_model(tmp_path, field, value, says):
    both_resnets(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=says):
        load(tmp_path, device="cpu")


def test_missing_and_left_over_tensors_are_listed(tmp_path):
    both_resnets(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["layer9.0.conv1.weight"] = state.pop("resnet.embedder.embedder.normalization.running_var")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: .*running_var; 1 left over: layer9\.0\.conv1\.weight"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_presets_have_the_published_sizes(name, count):
    with torch.device("meta"):
        model = ResNet.from_name(name, labels=tuple(str(i) for i in range(1000)))
    assert sum(p.numel() for p in model.parameters()) == count
    with pytest.raises(ValueError, match="'resnet20' is unknown; known: resnet18"):
        ResNet.from_name("resnet20")
    with pytest.raises(ValueError, match="d_ff: no such configuration field"):
        ResNet.from_name(name, d_ff=3)


def small(**overrides) -> ResNet:
    torch.manual_seed(0)
    sizes = {"stem_width": 8, "widths": (8, 12), "depths": (1, 1), **overrides}
    return ResNet.from_name("resnet18", labels=("car", "truck"), **sizes)


def test_small_images_keep_their_places(tmp_path):
    """The paper's stem for CIFAR: no stride, no pooling; transformers, which has no such model, refuses it."""
    model = small(small_images=True).eval()
    x = images(32, 32)
    assert model.hidden(x).shape == (3, 12, 16, 16) and model.pixels.size == 32
    save(model, None, tmp_path)
    again, _ = load(tmp_path, device="cpu")
    assert torch.equal(again(x), model(x)) and again.labels == ("car", "truck") and again.pixels == model.pixels
    with pytest.raises(ValueError, match="resnet_small"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_inputs_that_are_no_images_are_refused():
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got \(3, 1, 32, 32\)"):
        small()(images(32, 32, channels=1))
    with pytest.raises(ValueError, match="needs labels"):
        ResNet.from_name("resnet18")
    with pytest.raises(ValueError, match="ResNet can do image-classification, embedding"):
        ResNet.from_name("resnet18", task="causal-lm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    reference, _ = both_resnets(tmp_path)
    model, _ = load(tmp_path, dtype=dtype, device="cpu")
    assert model(images()).dtype == dtype
    assert {b.dtype for b in model.buffers()} == {torch.int64, torch.promote_types(dtype, torch.float32)}
    assert_within(model(images()), reference(images()).logits, 0.3 if dtype == torch.bfloat16 else 1e-4, "logits")


def test_statistics_are_not_rounded_with_the_weights(tmp_path):
    """In a model loaded in bf16 they stay the checkpoint's, move in fp32, and are saved so; transformers reads them."""
    reference, _ = both_resnets(tmp_path / "theirs")
    model, _ = load(tmp_path / "theirs", dtype="bfloat16", device="cpu")
    expected, names = reference.state_dict(), {key: source.names[0] for key, source in model.key_map().items()}
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[names[key]]), key
    model.train()
    rounded = nn.BatchNorm2d(8).eval()
    x = images(16, 16, channels=8).bfloat16()
    rounded.load_state_dict(model.embed.norm.state_dict())
    assert_within(model.embed.norm(x).detach(), rounded.train()(x.float()).detach(), 0.05, "normalised by the batch")
    for name, buffer in model.embed.norm.named_buffers():
        torch.testing.assert_close(buffer, rounded.get_buffer(name), rtol=1e-4, atol=1e-5)
    model(images()).float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    save(model.eval(), None, tmp_path / "ours")
    again, _ = load(tmp_path / "ours", device="cpu")
    assert again.embed.conv.weight.dtype == torch.bfloat16
    assert all(torch.equal(again.get_buffer(name), buffer) for name, buffer in model.named_buffers())
    assert torch.equal(again(images()), model(images()))
    back = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert all(torch.equal(back.state_dict()[names[name]], buffer) for name, buffer in model.named_buffers())
    assert_within(model(images()).float(), back(images()).logits, 0.3, "logits")


def test_a_bf16_model_trains_through_the_loop(tmp_path):
    both_resnets(tmp_path)
    model, _ = load(tmp_path, dtype="bfloat16", device="cpu")
    rows = [(image, i % 2) for i, image in enumerate(images(32, 32, rows=8))]

    def collate(rows):
        return torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="sum"), len(batch[1])

    config = TrainConfig(epochs=6, batch_size=4, lr=1e-2)
    result = train(model, rows, loss_fn, config, eval_data=rows, collate=collate, run_dir=tmp_path / "out")
    assert result.metrics["loss"] < 0.7 * result.before["loss"]
    assert model.embed.norm.running_var.dtype == torch.float32


def test_frozen_norms_are_in_training_what_they_are_in_evaluation():
    model = small()
    x = images(64, 64)
    for _ in range(3):
        model(x)  # statistics of their own
    truth = model.eval()(x)
    before = statistics(model)
    model.train()
    freeze(model, "*norm*")
    assert torch.equal(model(x), truth)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    unfreeze(model, "layers.1.norm1.bias")
    assert not torch.equal(model(x), truth)
    moved = {name.rpartition(".")[0] for name, b in model.named_buffers() if not torch.equal(b, before[name])}
    assert moved == {"layers.1.norm1"}
    model.eval()
    settled = model(x)
    assert torch.equal(model(x), settled)


def test_training_an_adapter_or_a_head_leaves_the_base_as_it_is(tmp_path):
    """Weights and statistics, bitwise; a full run moves both, and a killed one resumes with them."""
    rows = [(image, i % 2) for i, image in enumerate(images(32, 32, rows=8))]

    def collate(rows):
        return torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    for way in ("lora", "head", "full"):
        model = small()
        if way == "lora":
            add_lora(model, LoRAConfig(rank=2))
        elif way == "head":
            freeze(model, "*")
            unfreeze(model, "head.*")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = TrainConfig(epochs=2, batch_size=4, lr=1e-2)
        train(model, rows, loss_fn, config, eval_data=rows, collate=collate)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        kinds = {"lora": ".lora.", "head": "head.", "full": ""}
        assert changed and all(kinds[way] in name for name in changed)
        assert (len(changed) == len(before)) == (way == "full")


def test_torchs_batch_norms_stay_frozen_too():
    """In a foreign network, which knows nothing of this rule, across evaluations and gradual unfreezing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    rows = [(image, i % 2) for i, image in enumerate(images(8, 8, rows=8))]

    def collate(rows):
        return torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    before = statistics(net)
    add_lora(net, LoRAConfig(rank=2, targets=["0"]))
    train(net, rows, loss_fn, TrainConfig(epochs=2, batch_size=4), eval_data=rows, collate=collate)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    config = TrainConfig(epochs=2, batch_size=4, unfreeze={"4.*": 0, "1.*": 1})
    train(net, rows, loss_fn, config, eval_data=rows, collate=collate)
    assert int(net[1].num_batches_tracked) == 2  # the steps of the second epoch


def test_an_adapted_network_keeps_no_input_of_its_norms():
    """Between two adapted convolutions only the input of the second one, and S, are kept."""
    model = small(widths=(16,), depths=(1,), stem_width=16, small_images=True)
    add_lora(model, LoRAConfig(rank=2))
    model.train()
    x, kept = images(16, 16), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    large = [size for address, size in kept.items() if address not in own and size >= 2**10]
    wide, low = 3 * 16 * 16 * 16 * 4, 3 * 2 * 16 * 16 * 4
    # The inputs of both convolutions, what the last relu gives, and S twice.
    assert sorted(large) == [low, low, wide, wide, wide]


def test_norms_keep_the_memory_format():
    model = small().eval()
    x = images(64, 64).contiguous(memory_format=torch.channels_last)
    assert model.hidden(x).is_contiguous(memory_format=torch.channels_last)

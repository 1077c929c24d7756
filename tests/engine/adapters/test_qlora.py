"""QLoRA: a model with quantised projections computes, trains an adapter, is counted, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from handtune.engine import (
    LoRAConfig,
    TrainConfig,
    add_lora,
    freeze,
    generate,
    load_adapter,
    load_checkpoint,
    merge_lora,
    quantize,
    save_adapter,
    train,
    trainable_report,
    unfreeze,
)
from handtune.kernels import Linear
from handtune.kernels.quant.nf4 import NF4Weight, Workspace
from handtune.models import GPT2, Bert, XLNet, save


def tiny(**sizes: int) -> GPT2:
    torch.manual_seed(0)
    model = GPT2.from_name(
        "gpt2", **{"vocab_size": 31, "max_positions": 16, "n_layer": 2, "n_head": 2, "d_model": 32} | sizes
    )
    model.embed.tokens.weight.data *= 10  # logits of a norm and a small embedding could hardly differ
    freeze(model, "*")
    return model.eval()


def decoded(model: GPT2) -> GPT2:
    """A copy whose quantised weights are parameters again."""
    out = copy.deepcopy(model)
    for module in out.modules():
        if isinstance(module, Linear) and module.quantized is not None:
            weight = module.quantized.dequantize(torch.float32)
            del module.weight
            module.weight = nn.Parameter(weight, requires_grad=False)
    return out


IDS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
ALL = tuple(f"layers.{i}.{name}" for i in range(2) for name in ("qkv", "o", "up", "down"))


@pytest.mark.parametrize("family", ["gpt2", "xlnet"])
def test_quantised_and_adapted_tensors_are_published_as_before(family) -> None:
    model = tiny() if family == "gpt2" else XLNet.from_name("xlnet-base-cased", n_layer=1, d_model=24, vocab_size=31)
    table = model.key_map()
    freeze(model, "*")
    quantize(model)
    add_lora(model, LoRAConfig(rank=2, targets=["layers.*.up"]), name="weight")
    assert model.key_map() == table


def test_quantises_the_projections_of_the_layers() -> None:
    model = tiny()
    assert quantize(model) == ALL
    packed = [module for module in model.modules() if isinstance(module, NF4Weight)]
    assert len(packed) == 8
    assert len({id(weight.workspace) for weight in packed}) == 1
    assert torch.equal(model(IDS), decoded(model)(IDS))
    prompt = IDS[:, :4]
    assert torch.equal(
        generate(model, prompt, max_new_tokens=5, temperature=0.0),
        generate(decoded(model), prompt, max_new_tokens=5, temperature=0.0),
    )


def test_leaves_alone_what_trains_and_what_is_quantised() -> None:
    model = tiny()
    unfreeze(model, "layers.1.*")
    assert quantize(model, "attention") == ("layers.0.qkv", "layers.0.o")
    assert quantize(model) == ("layers.0.up", "layers.0.down")
    assert isinstance(model.layers[1].qkv.weight, nn.Parameter)
    freeze(model, "*")
    assert quantize(model) == ALL[4:]
    assert quantize(model) == ()
    assert len({id(m.workspace) for m in model.modules() if isinstance(m, NF4Weight)}) == 1


def test_report_counts_weights_and_bytes() -> None:
    model = tiny(d_model=64)
    dense = trainable_report(model)
    quantize(model)
    add_lora(model, LoRAConfig(rank=2))
    report, lora = trainable_report(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == dense.total + lora
    assert report.trainable == lora
    n = 2 * 12 * 64 * 64
    packed = n // 2 + n // 64 + sum(4 * (-(-size * 64 * 64 // 64 // 256) + 1) for size in 2 * (3, 1, 4, 4))
    assert report.weights == dense.weights - 4 * n + packed + 4 * lora


class Repeats:
    """The same lines again and again, as batches."""

    def __len__(self) -> int:
        return 4  # steps an epoch

    def __iter__(self):
        return iter([[{"ids": IDS}]] * 4)

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def line_loss(model: GPT2, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    logits = model(batch["ids"])[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch["ids"][:, 1:].flatten(), reduction="sum"), 16


def test_trains_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    model = tiny()
    quantize(model)
    add_lora(model, LoRAConfig(rank=4))
    before = {name: p.clone() for name, p in model.named_parameters() if ".lora." not in name}
    with torch.no_grad():
        start = line_loss(model, {"ids": IDS})[0].item()
    train(model, Repeats(), line_loss, TrainConfig(lr=2e-2, epochs=8), run_dir=tmp_path / "run")
    with torch.no_grad():
        assert line_loss(model, {"ids": IDS})[0].item() < 0.6 * start
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
    tensors, _ = load_checkpoint(max((tmp_path / "run").glob("**/step-*")))
    assert tensors
    assert not [key for key in tensors if key.rpartition(".")[2] in ("codes", "scales", "ranges", "offset")]
    save_adapter(model, tmp_path / "adapter")
    fresh = tiny()
    quantize(fresh)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(IDS), model(IDS))
    dense = tiny()
    load_adapter(dense, tmp_path / "adapter")
    merge_lora(dense)
    save(dense, None, tmp_path / "merged")


def test_merging_and_saving_are_refused(tmp_path: Path) -> None:
    model = tiny()
    quantize(model)
    with pytest.raises(ValueError, match=r"layers\.0\.qkv is quantised to 4 bits.*load the base in bfloat16"):
        save(model, None, tmp_path / "base")
    add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"layers\.0\.qkv is quantised.*load the base in bfloat16.*merge_lora there"):
        merge_lora(model)
    with pytest.raises(ValueError, match="is quantised to 4 bits: save_adapter"):
        save(model, None, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_merging_is_refused_before_anything_is_merged() -> None:
    model = tiny()
    quantize(model, "layers.1.*")
    add_lora(model, LoRAConfig(rank=2))
    for p in model.parameters():
        p.data = p.data + 1 if p.requires_grad else p.data
    before = model.layers[0].qkv.weight.clone()
    with pytest.raises(ValueError, match=r"layers\.1\.qkv is quantised"):
        merge_lora(model)
    assert torch.equal(model.layers[0].qkv.weight, before)


def test_training_the_weight_is_refused() -> None:
    model = tiny()
    unfreeze(model, "*")
    with pytest.raises(ValueError, match=r'all that targets name trains.*freeze\(model, "\*"\) first'):
        quantize(model)
    linear = Linear(8, 4)
    with pytest.raises(ValueError, match="the weight trains, and 4 bits can't"):
        linear.quantize_(Workspace())
    freeze(model, "*")
    quantize(model)
    with pytest.raises(ValueError, match=r"layers\.0\.qkv\.weight\.codes is of a quantised weight"):
        unfreeze(model, "*")
    assert not any(p.requires_grad for p in model.parameters())
    unfreeze(model, "norm.*")


@pytest.mark.parametrize("targets", ["head", "embed.tokens", "layers.0.*", "*"])
def test_only_whole_projections_of_layers_are_quantised(targets: str) -> None:
    model = tiny(n_layer=1)
    if targets == "layers.0.*":
        assert quantize(model, targets) == ALL[:4]
        return
    with pytest.raises(ValueError, match="heads and embeddings stay as they are"):
        quantize(model, targets)
    assert not any(isinstance(module, NF4Weight) for module in model.modules())


def test_other_refusals() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="matches no layer"):
        quantize(model, "nothing")
    with pytest.raises(ValueError, match="Sequential is not a model of handtune"):
        quantize(nn.Sequential(Linear(8, 4)))
    bert = Bert.from_name("bert-base-uncased", n_layer=1, n_head=2, d_model=32, d_ff=64, vocab_size=31).eval()
    freeze(bert, "*")
    with pytest.raises(ValueError, match=r"query is a part of layers\.0\.qkv, which is quantised whole"):
        quantize(bert, "query")
    assert quantize(bert, ("layers.0.qkv", "mlp")) == ("layers.0.qkv", "layers.0.up", "layers.0.down")
    with pytest.raises(ValueError, match="in 4 bits already"):
        model.layers[0].o.quantize_(Workspace()) or model.layers[0].o.quantize_(Workspace())
    model.layers[1].o.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.o: a weight \(32, 32\) that is empty or holds NaN or infinity"):
        quantize(model)
    add_lora(tied := tiny(), LoRAConfig(rank=2))
    merge_lora(tied)
    with pytest.raises(ValueError, match="an adapter is merged"):
        quantize(tied)


def test_adapters_are_found_on_a_quantised_base_by_name() -> None:
    """`add_lora` knows a quantised projection by its path and by its published parts, and refuses what isn't there."""
    model = tiny()
    quantize(model)
    assert add_lora(model, LoRAConfig(rank=2, targets=("c_fc",))) == ("layers.0.up", "layers.1.up")
    assert torch.equal(model(IDS), decoded(model)(IDS))
    with pytest.raises(ValueError, match="matches no layer"):
        add_lora(model, LoRAConfig(rank=2, targets=("nothing",)), name="b")

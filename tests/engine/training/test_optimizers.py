"""`train.optimizer`: which update each parameter gets, Muon and AdamW in eight bits on the engine's masters, resume."""

from collections import OrderedDict

import pytest
import torch
from small_runs import CHAT, examples, gpt2
from torch import Tensor, nn

from handtune.engine import LoRAConfig, TrainConfig, add_lora, train, trainable_report
from handtune.engine.data.batches import Collate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.training.optim import Optimizer
from handtune.engine.training.optimizers import OPTIMIZERS, hidden_matrices, states_for
from handtune.kernels.optim.adamw8bit_state import AdamW8bitParam
from handtune.kernels.optim.adamw_state import AdamWParam
from handtune.kernels.optim.muon import MuonParam
from handtune.models import Llama

HYPERPARAMETERS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def llama() -> Llama:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "d_ff": 48}
    return Llama.from_name("SmolLM2-135M", **sizes)


def network() -> nn.Sequential:
    """Two layers whose weights are above the least size of eight bits, and a head below it."""
    torch.manual_seed(0)
    layers = {"up": nn.Linear(64, 80), "tanh": nn.Tanh(), "down": nn.Linear(80, 64), "head": nn.Linear(64, 3)}
    return nn.Sequential(OrderedDict(layers))


def optimizer_of(name: str, model: nn.Module) -> Optimizer:
    named = dict(model.named_parameters())
    return Optimizer(named.items(), **HYPERPARAMETERS, states=states_for(name, model, named, ()))


def step_once(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    for part in x.split(4):
        model(part).square().sum().backward()
        optimizer.accumulate()
    optimizer.scale_gradients(8, 1.0)
    optimizer.step(0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_memory_is_what_the_report_says(name: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = optimizer_of(name, model)
    step_once(model, optimizer, 0)
    kept = 0
    for param in optimizer.trained.values():
        kept += sum(getattr(param, field).nbytes for field in param.state if field != "step")
        kept += param.weight.nbytes if param.copy is not None else 0
    assert trainable_report(model, name).optimizer == kept


def test_muon_takes_the_matrices_between_embedding_and_head() -> None:
    model = llama()
    found = hidden_matrices(model)
    expected = {"qkv": (32, 16, 16), "o": (32,), "gate_up": (48, 48), "down": (32,)}
    assert found == {f"layers.{i}.{name}.weight": rows for i in range(2) for name, rows in expected.items()}

    add_lora(model, LoRAConfig(rank=3, targets=("q_proj", "v_proj", "down")))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    states = states_for("muon", model, trained, ())
    assert states.keys() == trained.keys()
    assert states["layers.0.qkv.lora.default.a"](torch.zeros(6, 32)).rows == (3, 3)
    with pytest.raises(ValueError, match='train.optimizer = "muon": it updates the matrices between'):
        states_for("muon", model, {"embed.tokens.weight": model.embed.tokens.weight}, ())


def test_small_parameters_and_chosen_rows_keep_fp32_moments() -> None:
    model = network()
    named = dict(model.named_parameters())
    assert states_for("adamw8bit", model, named, ()) == {"up.weight": AdamW8bitParam, "down.weight": AdamW8bitParam}
    assert states_for("adamw8bit", model, named, ("up.weight",)).keys() == {"down.weight"}
    assert states_for("adamw", model, named, ()) == {}


def test_muon_equals_torchs_step_by_step() -> None:
    """Bitwise on matrices, at learning rates that change; vectors and the head are AdamW's."""
    ours, theirs = network(), network()
    mine = optimizer_of("muon", ours)
    assert {name for name, param in mine.trained.items() if type(param) is MuonParam} == {"up.weight", "down.weight"}
    matrices = [theirs.up.weight, theirs.down.weight]
    muon = torch.optim.Muon(matrices, lr=1.0, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": [theirs.head.weight], "weight_decay": 0.1}]
    adamw = torch.optim.AdamW(groups, lr=1.0, foreach=False)
    for step in range(5):
        for i, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            b.grad = torch.randn(b.shape, generator=torch.Generator().manual_seed(10 * step + i))
            a.grad = b.grad.clone()
        rate = 0.01 / (1 + step)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        muon.step()
        adamw.step()
        mine.step(rate)
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if name in ("up.weight", "down.weight"):
                assert torch.equal(a, b)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_comes_back_bitwise(name: str, dtype: torch.dtype) -> None:
    first, second = network().to(dtype), network().to(dtype)
    mine, other = optimizer_of(name, first), optimizer_of(name, second)
    for seed in range(3):
        step_once(first, mine, seed)
    state = {key: value.clone() for key, value in mine.state_dict().items()}
    step_once(second, other, 9)
    other.load_state_dict(state)
    for seed in range(3, 5):
        step_once(first, mine, seed)
        step_once(second, other, seed)
    for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def state_bytes(param: AdamWParam | AdamW8bitParam | MuonParam) -> int:
    tensors: list[Tensor] = [getattr(param, key) for key in param.state if key != "step"]
    return sum(x.numel() * x.element_size() for x in tensors)


def test_bytes_of_the_states() -> None:
    """AdamW keeps twice a weight's fp32 bytes, in eight bits half of them and a scale a block, Muon as many."""
    weight = nn.Parameter(torch.zeros(64, 128))
    size = weight.numel() * 4
    assert state_bytes(AdamWParam(weight)) == 2 * size
    assert state_bytes(AdamW8bitParam(weight)) == size // 2 + 2 * 4 * (64 * 128 // 256)
    assert state_bytes(MuonParam(weight, (64,))) == size


@pytest.mark.parametrize("name", ["adamw8bit", "muon"])
def test_a_killed_run_resumes_bitwise_and_learns(name: str, tmp_path) -> None:
    """A run that stops after 5 of 10 steps and goes on, against one that went through; the loss falls to a half."""
    rows, results = examples(CHAT, "sft"), []
    config = {"lr": 2e-2, "optimizer": name, "batch_size": 4, "best": "last", "save_every": 3, "weight_decay": 0.0}
    for out, steps in (("whole", (10,)), ("cut", (5, 10))):
        for max_steps in steps:
            model = gpt2()
            calls = iter(range(max_steps))

            def loss(model, batch, calls=calls):
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return causal_lm_loss(model, batch)

            settings = TrainConfig(epochs=10, **config)
            try:
                result = train(model, rows, loss, settings, collate=Collate(), run_dir=tmp_path / out)
            except KeyboardInterrupt:
                continue
        results.append((result, model))
    (whole, expected), (cut, model) = results
    assert whole.steps == cut.steps == 10
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    first = causal_lm_loss(gpt2(), Collate()(rows))[0].item()
    assert causal_lm_loss(model, Collate()(rows))[0].item() < first / 2

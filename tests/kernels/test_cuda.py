"""On a GPU: every kernel against its CPU result in float64, packed attention, and a training step. `make test-gpu`."""

import pytest
import torch
from static_steps import assert_static_is_plain

from handtune.engine import LoRAConfig, TrainConfig, add_lora, freeze, generate, quantize, train, use_adapter
from handtune.engine.data.batches import Collate
from handtune.engine.generation import decoding, static_step
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.kernels import attention, layer_norm, linear_cross_entropy, lora_linear, rms_norm, rope, swiglu
from handtune.kernels.dropout import dropout
from handtune.models import GPT2, Bloom, Llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]

N, K, M, R = 33, 48, 72, 8


def cases() -> dict:
    """Name → (function, shapes of its float inputs)."""
    targets = torch.arange(N) % M
    angles = torch.arange(N)[:, None] / (1 + torch.arange(8))
    cos, sin = angles.cos(), angles.sin()
    return {
        "lora_linear": (
            lambda x, w, b, a, low: lora_linear(x, w, b, a, low, scale=0.5),
            [(N, K), (M, K), (M,), (R, K), (M, R)],
        ),
        "linear_cross_entropy": (
            lambda x, w: linear_cross_entropy(x, w, targets.to(x.device)) / N,
            [(N, K), (M, K)],
        ),
        "layer_norm": (layer_norm, [(N, K), (K,), (K,)]),
        "rms_norm": (rms_norm, [(N, K), (K,)]),
        "swiglu": (swiglu, [(N, K)]),
        "rope": (
            lambda q, k: torch.cat(rope(q, k, cos.to(q.device), sin.to(q.device)), 2),
            [(2, N, 4, 16), (2, N, 2, 16)],
        ),
        "attention": (lambda q, k, v: attention(q, k, v), [(2, N, 4, 16), (2, N, 2, 16), (2, N, 2, 16)]),
        "packed attention": (
            lambda q, k, v: attention(q, k, v, cu_seqlens=torch.tensor([0, 5, N], dtype=torch.int32, device=q.device)),
            [(1, N, 4, 16), (1, N, 2, 16), (1, N, 2, 16)],
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", cases())
def test_kernels_equal_float64_on_cpu(name: str, dtype: torch.dtype) -> None:
    function, shapes = cases()[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    exact = [x.double().requires_grad_() for x in inputs]
    ours = [x.cuda().requires_grad_() for x in inputs]
    wanted, got = function(*exact), function(*ours)
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    got.backward(grad.to(got))
    tolerance = 2e-3 if dtype == torch.float32 else 6e-2
    for a, b in [(got, wanted), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]:
        assert a is not None and b is not None
        assert (a.double().cpu() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_small_model_learns(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 32, "vocab_size": 64, "max_positions": 32}
    model = GPT2.from_name("gpt2", **sizes).to("cuda", dtype)
    add_lora(model, LoRAConfig(rank=8))
    rows = [{"input_ids": [i, 2, 3, 4, 5], "targets": [2, 3, 4, 5, i]} for i in range(8)]
    config = TrainConfig(epochs=60, batch_size=8, micro_batch_size=4, lr=2e-2)
    before = causal_lm_loss(model, {"inputs": {"input_ids": torch.tensor([[1, 2]]).cuda()}, **_targets()})[0].item()
    train(model, rows, causal_lm_loss, config, collate=Collate())
    after = causal_lm_loss(model, {"inputs": {"input_ids": torch.tensor([[1, 2]]).cuda()}, **_targets()})[0].item()
    assert after < 0.5 * before


def _targets() -> dict[str, torch.Tensor]:
    return {"index": torch.tensor([0, 1]).cuda(), "targets": torch.tensor([2, 3]).cuda()}


def test_a_graph_refuses_dropout() -> None:
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="number of the host"), torch.cuda.graph(graph):
        dropout(x, 0.1)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"seed": 3}, {"seed": 3, "samples": 2}], ids=str)
def test_a_graph_writes_what_is_written_without(monkeypatch, settings: dict) -> None:
    """Padded prompts, an adapter or none for each row, rows that leave: the same tokens, with and without graphs."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 64, "d_ff": 96, "vocab_size": 64}
    model = Llama.from_name("SmolLM2-135M", **sizes).to("cuda")
    for name in ("a", "b"):
        add_lora(model, LoRAConfig(rank=4), name)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ids = torch.randint(1, 64, (4, 5), device="cuda")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1], [1] * 5], device="cuda")

    graphs: list[torch.device] = []
    record = static_step.record
    monkeypatch.setattr(static_step, "record", lambda step, device: graphs.append(device) or record(step, device))
    found = []
    n_graphs = []
    for devices in (("cuda",), ()):
        monkeypatch.setattr(static_step, "GRAPHS", devices)
        with use_adapter(model, ["a", None, "b", "a"]):
            found.append(generate(model, ids, mask, 40, eos_id=(7, 9), **settings))
        n_graphs.append(len(graphs))
    assert n_graphs[0] >= 1 and n_graphs[1] == n_graphs[0]
    assert torch.equal(*found)


SIZES = {"n_layer": 2, "n_head": 4, "d_model": 64, "vocab_size": 64}
DECODERS = {
    "gpt2": lambda: GPT2.from_name("gpt2", max_positions=64, **SIZES),
    "llama": lambda: Llama.from_name("SmolLM2-135M", n_kv_head=2, d_ff=96, max_positions=64, **SIZES),
    "bloom": lambda: Bloom.from_name("bloom-560m", **SIZES),
    "4 bits": lambda: Llama.from_name("SmolLM2-135M", n_kv_head=2, d_ff=128, max_positions=64, **SIZES),
    "DoRA": lambda: Llama.from_name("SmolLM2-135M", n_kv_head=2, d_ff=96, max_positions=64, **SIZES),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_by_graphs_are_those_without(monkeypatch, name: str, dtype: torch.dtype) -> None:
    """Graphs that are made anew every eight tokens."""
    torch.manual_seed(0)
    model = DECODERS[name]().to("cuda", dtype).eval()
    if name == "4 bits":
        freeze(model, "*")
        quantize(model)
    if name == "DoRA":
        add_lora(model, LoRAConfig(rank=4, dora=True))
        for path, parameter in model.named_parameters():
            if ".lora." in path:
                parameter.data += 0.1 * torch.randn_like(parameter)
    monkeypatch.setattr(decoding, "BLOCK", 8)
    monkeypatch.setattr(static_step, "MIN_REPLAYS", 1)
    graphs: list[torch.device] = []
    record = static_step.record
    monkeypatch.setattr(static_step, "record", lambda step, device: graphs.append(device) or record(step, device))
    text = torch.randint(1, 64, (1, 40), device="cuda")
    assert_static_is_plain(model, text, 4e-2 if dtype == torch.bfloat16 else 2e-3)
    assert len(graphs) > 5

"""torch.compile takes a block of each family whole: no graph break in our autograd functions, and the same numbers."""

import pytest
import torch

from handtune.engine import LoRAConfig, add_lora
from handtune.kernels.backend import INTERPRETED
from handtune.models import GPT2, Bert, Llama
from handtune.models.layers.rope_scaling import Rope

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the compiler doesn't trace Triton's interpreter")
SIZES = {"n_layer": 1, "d_model": 32, "n_head": 4, "vocab_size": 50, "max_positions": 32}
BLOCKS = {
    "gpt2": (lambda: GPT2.from_name("gpt2", **SIZES), (None, None, None, None, None)),
    "llama": (
        lambda: Llama.from_name("SmolLM2-135M", n_kv_head=2, d_ff=48, **SIZES),
        (Rope().tables(torch.arange(16)[None], 8), None, None, None, None, None),
    ),
    "bert": (lambda: Bert.from_name("bert-base-uncased", task="embedding", d_ff=64, **SIZES), (None, None, None)),
}


@pytest.mark.parametrize(("family", "dora"), [*((family, False) for family in BLOCKS), ("bert", True)])
def test_a_block_compiles_without_a_graph_break(family: str, dora: bool) -> None:
    build, rest = BLOCKS[family]
    torch.manual_seed(0)
    model = build()
    add_lora(model, LoRAConfig(rank=4, dora=dora))
    block = model.train().layers[0]
    for name, parameter in block.named_parameters():
        if ".b." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    compiled = torch.compile(lambda x: block(x, *rest), fullgraph=True, backend="aot_eager")
    x, grad = torch.randn(2, 16, 32), torch.randn(2, 16, 32)
    found = []
    for function in (compiled, lambda x: block(x, *rest)):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(grad)
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters() if p.requires_grad)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)

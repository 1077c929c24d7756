"""How many bytes does a LoRA block keep for its backward pass, a token, next to transformers + PEFT?

    python benchmarks/saved_bytes.py [--out FILE.json]

A block of each decoder of Llama's kind (GQA, gated) and one of GPT-2, bf16, R 16 on every projection, by
`saved_tensors_hooks`: each storage counted once, weights and adapters left out. A block is what the second layer of a
model adds to the first. PEFT stands twice: as it comes (adapters in fp32), and with `autocast_adapter_dtype=False`.
Ours does too, the second time with the feed-forward recomputed; what that costs stands beside it, as a share of the
block's products in a step.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RANK, LENGTH = 16, 256
_LLAMA = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "smollm3": {**_LLAMA, "pad_token_id": None},
    "gemma2": {**_LLAMA, "head_dim": 64, "layer_types": ["full_attention", "sliding_attention"]},
    "gemma3_text": {**_LLAMA, "head_dim": 64, "layer_types": ["full_attention", "sliding_attention"]},
    "phi3": {**_LLAMA, "pad_token_id": None},
    "olmo2": _LLAMA,
    "gpt2": {"n_embd": 768, "n_head": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip
# The products of `up`, of the block's two passes (D² each); OLMo has no norm in front of it to make it again from.
RECOMPUTED = dict.fromkeys(("llama", "smollm3", "gemma2", "gemma3_text", "phi3"), 7 / (2 * 13)) | {"gpt2": 4 / (2 * 12)}
DROPOUTS = (0.0, 0.05)


@contextmanager
def counted() -> Iterator[dict[int, int]]:
    """Storages that autograd keeps inside the block: address → bytes; those that inner hooks keep, too."""
    found: dict[int, int] = {}
    alive = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def count(kept: Any) -> Any:
        if isinstance(kept, Tensor):
            storage = kept.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # kept, so that no address is used twice
        return kept

    def inner(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        return hooks(lambda tensor: count(pack(tensor)), unpack)

    with hooks(count, lambda kept: kept), mock.patch.object(torch.autograd.graph, "saved_tensors_hooks", inner):
        yield found


def kept(model: Any, call: Callable[[], Any]) -> int:
    """Bytes kept for the backward pass of `call`, without the model's own weights and the adapters' bf16 copies."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    copies = {p.numel() * 2 for name, p in model.named_parameters() if "lora" in name}
    with counted() as found:
        call()
    return sum(size for address, size in found.items() if address not in own and size not in copies)


def ours(folder: Path, dropout: float, recompute: bool) -> int:
    from handtune.engine import LoRAConfig, add_lora
    from handtune.models import load

    model, _ = load(folder, "causal-lm")
    add_lora(model, LoRAConfig(RANK, 2 * RANK, dropout=dropout))
    for block in model.train().layers:
        block.recompute = recompute
    return kept(model, lambda: model.hidden(torch.arange(LENGTH)[None]))


def theirs(folder: Path, dropout: float, narrow: bool) -> int:
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=RANK, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=not narrow).train()
    body = model.base_model.model.base_model
    return kept(model, lambda: body(input_ids=torch.arange(LENGTH)[None], use_cache=False))


def measure(kind: str, dropout: float) -> dict[str, float]:
    """Bytes a token and block of each provider."""
    import transformers

    found: dict[str, list[int]] = {}
    for layers in (1, 2):
        sizes = {**SHAPES[kind], "num_hidden_layers": layers, "vocab_size": 512, "use_cache": False}
        if "layer_types" in sizes:
            sizes["layer_types"] = sizes["layer_types"][:layers]
        config = transformers.AutoConfig.for_model(kind, **sizes)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
            for provider, call in PROVIDERS.items():
                if "recompute" in provider and kind not in RECOMPUTED:
                    continue
                found.setdefault(provider, []).append(call(folder, dropout))
    return {provider: (two - one) / LENGTH for provider, (one, two) in found.items()}


PROVIDERS: dict[str, Callable[[Path, float], int]] = {
    "handtune": lambda folder, dropout: ours(folder, dropout, False),
    "handtune, recompute": lambda folder, dropout: ours(folder, dropout, True),
    "peft": lambda folder, dropout: theirs(folder, dropout, False),
    "peft, adapters in bf16": lambda folder, dropout: theirs(folder, dropout, True),
}


def main() -> None:
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    options = parser.parse_args()
    results = {f"{kind}, dropout {dropout:g}": measure(kind, dropout) for kind in SHAPES for dropout in DROPOUTS}
    for name, row in results.items():
        print(f"\n{name:28}{'bytes a token':>14}{'of PEFT':>9}{'of PEFT in bf16':>17}")
        for provider, size in row.items():
            price = f"   + {RECOMPUTED[name.partition(',')[0]]:.0%} products" if "recompute" in provider else ""
            ratios = f"{size / row['peft']:9.2f}{size / row['peft, adapters in bf16']:17.2f}"
            print(f"  {provider:26}{size:14.0f}{ratios}{price}")
    if options.out:
        facts = {"benchmark": "saved_bytes", "torch": torch.__version__, "results": results}
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

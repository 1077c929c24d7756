"""What do many adapters in one batch cost, next to one adapter for all, and next to PEFT's mixed batches?

    python benchmarks/adapters.py [--device cpu] [--dtype float32 bfloat16] [--adapters 64] [--rounds 7] [--out FILE]

Layers of GPT-2 small or of TinyLlama-1.1B with random weights and an R 16 adapter a row on all projections, the same in
PEFT, which reads what `save_adapter` wrote; how far the logits differ is shown. `tokens` tokens a row pass through the
model without gradients, as often as in a generation: what a `use_adapter` block prepares in its first pass, the stacked
factors, is timed apart, in later passes. The base alone, against PEFT's mixed batch, is what adapters that cost nothing
would come to. Training is a pass forward and backward over one batch of all rows against one pass a row with its
adapter, of which the gradients are the same; PEFT refuses mixed batches there. They take turns; medians.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 1024


def main() -> None:
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--model", nargs="*", default=["gpt2", "tinyllama"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for model, dtype in product(options.model, options.dtype):
        with tempfile.TemporaryDirectory() as folder:
            models = providers(Path(folder), model, getattr(torch, dtype), options)
            for tokens in options.tokens:
                results[f"{model}, {dtype}, {tokens} a row"] = serve(*models, tokens, options)
            results[f"{model}, {dtype}, training"] = learn(models[0], max(options.tokens), options)
    print(table(results))
    if options.out:
        facts = {"benchmark": "adapters", **environment(options)}
        Path(options.out).write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", encoding="utf-8")


def names_of(options: argparse.Namespace) -> list[str]:
    return [f"adapter{i}" for i in range(options.adapters)]


def base_model(name: str, layers: int) -> Any:
    """transformers' model of these widths, with a small vocabulary: the head has no adapter."""
    import transformers

    if name == "gpt2":
        ids = {"bos_token_id": None, "eos_token_id": None}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers, vocab_size=VOCAB, **ids))
    widths = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes = {"num_hidden_layers": layers, "vocab_size": VOCAB, "max_position_embeddings": 2048}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**widths, **sizes))


def providers(folder: Path, model: str, dtype: torch.dtype, options: argparse.Namespace) -> tuple[Any, nn.Module]:
    """Ours and PEFT's model with the same base and the same adapters."""
    import peft

    from handtune.engine import LoRAConfig, add_lora, save_adapter
    from handtune.models import load

    torch.manual_seed(0)
    base = base_model(model, options.layers).eval().to(options.device, dtype)
    base.save_pretrained(folder / "base")
    ours, _ = load(folder / "base", "causal-lm", device=options.device)
    theirs: Any = None
    for name in names_of(options):
        add_lora(ours, LoRAConfig(rank=16), name)
        for key, parameter in ours.named_parameters():
            if f".lora.{name}.b." in key:
                parameter.data.normal_(0, 0.02)
        save_adapter(ours, folder / name, name)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(base, folder / name, name)
        else:
            theirs.load_adapter(folder / name, name)
    return ours, theirs.eval()


def serve(ours: Any, theirs: nn.Module, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a pass: no adapter, one for all rows, one a row, and PEFT's mixed batch; the largest difference."""
    from handtune.engine import use_adapter

    names = names_of(options)
    ids = torch.randint(VOCAB, (len(names), tokens), generator=torch.Generator().manual_seed(1)).to(options.device)

    def first() -> None:
        with use_adapter(ours, names):
            ours(ids)

    def peft_mixed() -> Tensor:
        return theirs(input_ids=ids, adapter_names=names, use_cache=False).logits

    seconds: dict[str, list[float]] = {}
    with torch.no_grad():
        first()
        expected = peft_mixed()
        for _ in range(options.rounds):
            timed("first pass", first, seconds, options)
            timed("peft", peft_mixed, seconds, options)
            for name, chosen in (("base", None), ("one", names[0]), ("mixed", names)):
                with use_adapter(ours, chosen):
                    logits = ours(ids)
                    timed(name, lambda: ours(ids), seconds, options)
    return {"seconds": seconds, "largest difference": (logits - expected).abs().max().item()}


def learn(ours: Any, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a pass forward and backward over all rows together, and row by row."""
    from handtune.engine import unfreeze, use_adapter
    from handtune.engine.data.batches import Collate, to_device
    from handtune.engine.tasks.causal_lm import causal_lm_loss
    from handtune.engine.tasks.common import ByAdapter

    unfreeze(ours, "*.lora.*")
    ours.train()
    ids = torch.randint(VOCAB, (options.adapters, tokens), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [
        {"input_ids": row, "targets": [*row[1:], -100], "adapter": name}
        for row, name in zip(ids, names_of(options), strict=True)
    ]
    device = torch.device(options.device)
    batch = to_device(Collate()(rows), device)
    single = [to_device(Collate()([row]), device) for row in rows]

    def together() -> None:
        ByAdapter(causal_lm_loss)(ours, batch)[0].backward()
        ours.zero_grad()

    def one_by_one() -> None:
        for one in single:
            with use_adapter(ours, one["adapters"][0]):
                loss, _ = causal_lm_loss(ours, one)
            loss.backward()
        ours.zero_grad()

    together()
    seconds: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        timed("mixed", together, seconds, options)
        timed("one by one", one_by_one, seconds, options)
    ours.eval()
    return {"seconds": seconds}


def timed(name: str, call: Callable[[], Any], seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Add the seconds of a call to those of its name."""
    began = time.perf_counter()
    call()
    if options.device == "cuda":
        torch.cuda.synchronize()
    seconds.setdefault(name, []).append(time.perf_counter() - began)


def table(results: dict[str, dict[str, Any]]) -> str:
    heads = ("× one adapter", "first pass", "× PEFT mixed", "× PEFT, base", "× one by one", "difference")
    lines = [f"{'':32}" + "".join(f"{head:>15}" for head in heads)]
    for name, row in results.items():
        median = {side: statistics.median(times) for side, times in row["seconds"].items()}
        shown = [""] * len(heads)
        if "one" in median:
            shown[:4] = [
                f"{median['mixed'] / median['one']:.2f}",
                f"{median['first pass'] / median['one']:.2f}",
                f"{median['peft'] / median['mixed']:.2f}",
                f"{median['peft'] / median['base']:.2f}",
            ]
            shown[5] = f"{row['largest difference']:.1e}"
        else:
            shown[4] = f"{median['one by one'] / median['mixed']:.2f}"
        lines.append(f"{name:32}" + "".join(f"{value:>15}" for value in shown))
    return "\n".join(lines)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    import peft

    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "peft": peft.__version__, "device": name}
    sizes = {"adapters": options.adapters, "layers": options.layers, "threads": torch.get_num_threads()}
    return {**versions, **sizes, "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    main()

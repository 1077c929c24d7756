"""What `train.py` measures: one provider in one process, which runs a step for each line it reads.

handtune                  this engine: packed rows, its losses, its optimizer; "recompute": feed-forwards computed
                          once more in the backward pass
peft                      transformers + PEFT: padded rows, labels −100 outside the completion, torch's AdamW;
                          "grouped": rows of similar length together
floor                     the matrix products and the attention of a step, and nothing else
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saved_bytes import kept

RANK, ALPHA = 16, 32
SFT_ROWS, SFT_BATCH = 32, 8
WORKS = {
    "half": "rows of one length, half of them prompt",
    "12 %": "rows of one length, 12 % of them prompt",
    "alpaca": "instruction data with Alpaca-like lengths, 8 rows a batch",
}
_LLAMA3 = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3", "rope_theta": 500000.0,
}  # fmt: skip


def _llama(vocab: int, layers: int, width: int, heads: int, kv_heads: int, inner: int) -> tuple[str, dict]:
    sizes = {"vocab_size": vocab, "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner}
    more = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 131072}
    return "llama", {**sizes, **more, "tie_word_embeddings": True, "rope_parameters": _LLAMA3}


def _decoder(kind: str) -> tuple[str, dict]:
    """Another decoder in the sizes of the Llama, and otherwise as transformers has it."""
    _, sizes = _llama(32000, 12, 768, 12, 4, 2048)
    del sizes["rope_parameters"]
    return kind, {**sizes, "head_dim": 64, "max_position_embeddings": 4096, "pad_token_id": None}


MODELS = {  # transformers' model type and configuration
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama-small": _llama(32000, 12, 768, 12, 4, 2048),  # GPT-2 small's width, a Llama's ways
    **{f"{kind}-small": _decoder(kind) for kind in ("smollm3", "gemma2", "gemma3_text", "phi3", "olmo2")},
}


@dataclass(frozen=True)
class Task:
    """What to do: the provider, the kind of work, the model's folder, and how."""

    provider: str
    work: str
    folder: Path
    dtype: str
    rows: int
    length: int


@dataclass(frozen=True)
class Sizes:
    """Of the model's layers: (inputs, outputs) of each projection, heads, and of the head."""

    layers: int
    projections: list[tuple[int, int]]
    heads: int
    kv_heads: int
    head_width: int
    d_model: int
    vocab: int


def main() -> None:
    provider, work, folder, dtype, rows, length = sys.argv[1:]
    task = Task(provider, work, Path(folder), dtype, int(rows), int(length))
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the package from a bare clone
    serve(task)


def serve(task: Task) -> None:
    """Warm up, run, tell facts: whatever the parent asks for, a line each."""
    import torch

    torch.manual_seed(0)
    start = status("VmRSS")
    step, model = PROVIDERS[task.provider.partition(",")[0]](task)
    weights = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for line in sys.stdin:
        began = time.perf_counter()
        if line.strip() == "facts":
            answer: dict[str, Any] = {"tokens": real_tokens(batches_of(task)), "flops": flops(task), "rate": rate(task)}
            if model is not None:
                highest = status("VmHWM")
                answer |= {"peak_over_start": highest - start, "peak_over_weights": highest - weights}
                answer["saved_per_token"] = kept(model, lambda: step(1)) / real_tokens(batches_of(task)[:1])
        else:
            answer = {"loss": step(None)}
            answer["seconds"] = time.perf_counter() - began
        print(json.dumps(answer), flush=True)


def rows_of(task: Task) -> list[tuple[list[int], int]]:
    """Token rows with the number of prompt tokens in front, the same for every provider."""
    import numpy as np

    generator, vocab = np.random.default_rng(0), sizes_of(task).vocab
    if task.work != "alpaca":
        prompt = task.length // 2 if task.work == "half" else round(0.12 * task.length)
        return [(generator.integers(0, vocab, task.length + 1).tolist(), prompt) for _ in range(task.rows)]
    # Log-normals fitted by eye to Alpaca: median prompt about 20 tokens, median answer about 50, tail to 512.
    prompts = np.clip(generator.lognormal(3.0, 0.5, SFT_ROWS), 6, 128).astype(int)
    answers = np.clip(generator.lognormal(3.9, 0.95, SFT_ROWS), 4, 512 - prompts).astype(int)
    pairs = zip(prompts.tolist(), answers.tolist(), strict=True)
    return [(generator.integers(0, vocab, p + a).tolist(), p) for p, a in pairs]


def batches_of(task: Task) -> list[list[tuple[list[int], int]]]:
    """The rows cut into batches; grouped by length first, where wanted."""
    rows = rows_of(task)
    if task.work != "alpaca":
        return [rows]
    if task.provider.endswith("grouped"):
        rows = sorted(rows, key=lambda row: len(row[0]))
    return [rows[start : start + SFT_BATCH] for start in range(0, len(rows), SFT_BATCH)]


def real_tokens(batches: list[list[tuple[list[int], int]]]) -> int:
    return sum(len(row) - 1 for batch in batches for row, _ in batch)


def sizes_of(task: Task) -> Sizes:
    """The model's sizes, from its config.json."""
    c = json.loads((task.folder / "config.json").read_text(encoding="utf-8"))
    if c["model_type"] == "gpt2":
        d = c["n_embd"]
        shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
        return Sizes(c["n_layer"], shapes, c["n_head"], c["n_head"], d // c["n_head"], d, c["vocab_size"])
    d, f, heads, kv_heads = (
        c[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    width = c.get("head_dim") or d // heads
    shapes = [(d, (heads + 2 * kv_heads) * width), (heads * width, d), (d, 2 * f), (f, d)]
    return Sizes(c["num_hidden_layers"], shapes, heads, kv_heads, width, d, c["vocab_size"])


def flops(task: Task) -> float:
    """Of the model's own products, forward and to the inputs backward (frozen weights have no other), and attention."""
    sizes, batches = sizes_of(task), batches_of(task)
    scored = sum(len(row) - p for batch in batches for row, p in batch)
    weights = sum(k * m for k, m in sizes.projections) * sizes.layers
    pairs = sum((len(row) - 1) ** 2 / 2 for batch in batches for row, _ in batch) * sizes.layers  # causal
    attended = 3.5 * 4 * pairs * sizes.heads * sizes.head_width
    return 4.0 * real_tokens(batches) * weights + 4.0 * scored * sizes.d_model * sizes.vocab + attended


def rate(task: Task) -> float:
    """FLOPs a second of a square product."""
    import torch

    n = 2048
    a = torch.randn(n, n, dtype=getattr(torch, task.dtype))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def handtune_steps(task: Task) -> tuple[Callable[[int | None], float], Any]:
    from handtune.engine import LoRAConfig, add_lora
    from handtune.engine.data.batches import Collate
    from handtune.engine.tasks.causal_lm import causal_lm_loss
    from handtune.engine.training.optim import Optimizer
    from handtune.models import load

    model, _ = load(task.folder, device="cpu")
    if task.provider.endswith("recompute"):
        for block in model.layers:
            block.recompute = True
    add_lora(model, LoRAConfig(RANK, ALPHA))
    model.train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Optimizer(trained, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    batches = batches_of(task)
    examples = [
        [{"input_ids": row[:-1], "targets": [-100] * (p - 1) + row[p:]} for row, p in batch] for batch in batches
    ]

    def step(count: int | None) -> float:
        first = None
        for batch in examples[:count]:
            loss, targets = causal_lm_loss(model, Collate()(batch))
            loss.backward()
            optimizer.accumulate()
            optimizer.scale_gradients(targets, 1.0)
            optimizer.step(1e-4)
            first = first or loss.item() / targets
        return first or 0.0

    return step, model


def peft_steps(task: Task) -> tuple[Callable[[int | None], float], Any]:
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(task.folder, dtype=getattr(torch, task.dtype))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    batches = batches_of(task)

    def step(count: int | None) -> float:
        first = None
        for batch in batches[:count]:
            width = max(len(row) for row, _ in batch)
            ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
            for i, (row, p) in enumerate(batch):
                ids[i, : len(row)], labels[i, p : len(row)] = torch.tensor(row), torch.tensor(row[p:])
            inputs = {"input_ids": ids, "labels": labels}
            if task.work == "alpaca":
                inputs["attention_mask"] = torch.tensor([[j < len(row) for j in range(width)] for row, _ in batch])
            else:  # none is padded, and the last token is only a label: `shift_labels` are what `labels` would become
                inputs = {
                    "input_ids": ids[:, :-1],
                    "labels": labels[:, :-1],
                    "shift_labels": labels[:, 1:].contiguous(),
                }
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            first = first or loss.item()
        return first or 0.0

    return step, model


def floor_steps(task: Task) -> tuple[Callable[[int | None], float], None]:
    """Products forward, and dx where something below trains; the adapters' six; attention forward and backward."""
    import torch
    import torch.nn.functional as F

    from handtune.kernels import attention

    sizes, batches = sizes_of(task), batches_of(task)
    n, scored = real_tokens(batches), sum(len(row) - p for row, p in batches[0])

    def new(*shape: int, grad: bool = False) -> Any:
        return torch.randn(shape).to(getattr(torch, task.dtype)).requires_grad_(grad)

    sets = [(new(n, k), new(m, k), new(n, m), new(RANK, k), new(m, RANK)) for k, m in sizes.projections]
    out = [(torch.empty_like(y), torch.empty_like(x)) for x, _, y, _, _ in sets]
    head, states, logits = new(sizes.vocab, sizes.d_model), new(scored, sizes.d_model), new(scored, sizes.vocab)
    shape = (len(batches[0]), task.length)
    q = new(*shape, sizes.heads, sizes.head_width, grad=True)
    k, v = (new(*shape, sizes.kv_heads, sizes.head_width, grad=True) for _ in range(2))
    grad = new(*q.shape)

    def fused() -> None:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        gqa = sizes.heads != sizes.kv_heads
        F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=gqa).transpose(1, 2).backward(grad)

    def timed(attend: Callable[[], None]) -> float:
        attend()
        began = time.perf_counter()
        attend()
        return time.perf_counter() - began

    attend = min((fused, lambda: attention(q, k, v).backward(grad)), key=timed)

    def step(count: int | None) -> float:
        for layer in range(sizes.layers):
            for i, ((x, w, y, a, b), (to_y, to_x)) in enumerate(zip(sets, out, strict=True)):
                torch.mm(x, w.T, out=to_y)
                s = x @ a.T
                to_y.addmm_(s, b.T)
                ds = y @ b
                y.T @ s, ds.T @ x
                if layer or i:
                    torch.mm(y, w, out=to_x)
                    to_x.addmm_(ds, a)
            attend()
        torch.mm(states, head.T, out=logits)
        torch.mm(logits, head)
        return 0.0

    return step, None


PROVIDERS = {"handtune": handtune_steps, "peft": peft_steps, "floor": floor_steps}

if __name__ == "__main__":
    main()

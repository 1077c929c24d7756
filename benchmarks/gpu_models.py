"""The sections of `gpu.py` about models: the LoRA step of a Llama-8B, of smaller ones, decoding, a GRPO round.

Our model and the peer's share their weights in memory; adapters reach the peer through a file in PEFT's format. A step
is timed after its loss, and the norm of its gradients, have agreed with transformers + PEFT on the same rows.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_bench import Bench
from torch import Tensor, nn

from handtune.engine import LoRAConfig, PPOConfig, add_lora, freeze, generate, ppo, quantize, save_adapter
from handtune.engine.data.batches import Collate, to_device
from handtune.engine.generation import static_step
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.training.optim import Optimizer
from handtune.models import Llama
from handtune.models.checkpoint.weights import blocks, stored_tensors

Row = dict[str, list[int]]
LOSS_BOUND, NORM_BOUND = 0.01, 0.05  # how far a step may be from the peer's, as a share
NF4_BOUND = 0.05  # the same of a loss on quantised weights
LR = 0.0  # every step does all its work, and the next one begins at the weights that were compared


def step(bench: Bench) -> None:
    """An 8B LoRA step at 8,192 tokens, half of them prompt: ours in its ways, PEFT's, where ours spends its time."""
    n = bench.sizes.tokens
    whole, packed = rows(bench, [n]), rows(bench, [n // 8, n * 3 // 8, n // 2])
    compared_steps(bench, "step", "Llama-3.1-8B", {"one row": whole, "three packed rows": packed}, in_detail=True)


def smaller(bench: Bench) -> None:
    """The same for 3B and 1B, at 2,048 and 8,192 tokens."""
    for name in ("Llama-3.2-1B", "Llama-3.2-3B"):
        lengths = (bench.sizes.tokens // 4, bench.sizes.tokens)
        compared_steps(bench, "smaller", name, {f"{name}, {n} tokens": rows(bench, [n]) for n in lengths})


def recipe(bench: Bench) -> None:
    """NeMo-Automodel's LoRA recipe for Llama-3.1-8B: 12,473 tokens/s there, on an H100.

    R 16 on all projections, bf16, rows of 4,096, two a micro-batch, 32 a step, dropout 0.1. Timed alone: what it does
    is compared in `step`, but for the masks of dropout, which `lora` compares.
    """
    length = bench.sizes.tokens // 2
    model = llama(bench, "Llama-3.1-8B")
    add_lora(model, LoRAConfig(bench.sizes.rank, 2 * bench.sizes.rank, dropout=0.1))
    micro_batches = [rows(bench, [length, length], prompt=0.0) for _ in range(2 if bench.small else 16)]
    one = our_step(model, micro_batches)
    timed(bench, "recipe", "32 rows of 4,096", one, len(micro_batches) * 2 * length, rounds=1)


def compared_steps(bench: Bench, section: str, name: str, work: dict[str, list[Row]], in_detail: bool = False) -> None:
    """Ours and PEFT's on the same weights and rows; what differs from PEFT isn't timed.

    `in_detail` adds, for the first of the work, ours recomputed and on 4 bits, a profile, and PEFT's other ways.
    """
    first_label, first = next(iter(work.items()))
    model = adapted(bench, llama(bench, name))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        peer = peft_model(bench, model, folder)
        expected = {label: peer_reference(peer, given) for label, given in work.items()}

        for label, given in work.items():
            right(bench, section, f"handtune, {label}", model, given, *expected[label])
        if in_detail:
            profile(bench, section, our_step(model, [first]))
            for block in model.layers:
                block.recompute = True
            right(bench, section, f"handtune, recompute, {first_label}", model, first, *expected[first_label])
        del model

        ways = ("plain", "adapters in bf16", "checkpointed") if in_detail else ("plain",)
        for way in ways:
            peer = peft_model(bench, None, folder, peer, way)
            for label, given in {first_label: first}.items() if in_detail else work.items():
                timed(bench, section, f"PEFT, {way}, {label}", peer_step(peer, given), n_tokens(given))
        del peer
    collect(bench)

    # Last, because four bits take the place of the weights that the peer shared. Gradients differ by them, too.
    if in_detail:
        model = llama(bench, name)
        freeze(model, "*")
        quantize(model)
        loss = expected[first_label][0]
        right(bench, section, f"handtune, NF4, {first_label}", adapted(bench, model), first, loss, None, NF4_BOUND)


def adapted(bench: Bench, model: Llama) -> Llama:
    """With an adapter that does something: with B at zero, as it begins, half of what it costs would not be seen."""
    add_lora(model, LoRAConfig(bench.sizes.rank, 2 * bench.sizes.rank))
    for name, parameter in model.named_parameters():
        if ".lora." in name and ".b." in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def n_tokens(given: list[Row]) -> int:
    return sum(len(row["input_ids"]) for row in given)


def right(
    bench: Bench, section: str, name: str, model: Any, given: list[Row], expected_loss: float,
    expected_norm: float | None, loss_bound: float = LOSS_BOUND,
) -> None:  # fmt: skip
    """Time our step, if its loss and the norm of its gradients are the peer's."""
    loss, norm = loss_and_norm(model, given)
    facts = {"loss": loss, "expected_loss": expected_loss, "norm": norm, "expected_norm": expected_norm}
    close = abs(loss / expected_loss - 1) <= loss_bound
    if expected_norm is not None:
        close = close and abs(norm / expected_norm - 1) <= NORM_BOUND
    if close:
        timed(bench, section, name, our_step(model, [given]), n_tokens(given), **facts)
    else:
        bench.tell(section, name, wrong=True, **facts)


def timed(
    bench: Bench, section: str, name: str, one: Callable[[], Any], tokens: int, rounds: int = 3, **facts: Any
) -> None:
    """Seconds of a step by the wall clock, of the host alone, of the first, which compiles; tokens a second, peak."""
    began = time.perf_counter()
    try:
        one()
    except torch.OutOfMemoryError:
        bench.tell(section, name, failed="out of memory", **facts)
        return
    bench.synchronize()
    facts["first_seconds"] = round(time.perf_counter() - began, 2)

    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, host = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        one()
        host.append(time.perf_counter() - began)
        bench.synchronize()
        seconds.append(time.perf_counter() - began)
    if bench.on_gpu:
        facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    median = statistics.median(seconds)
    bench.tell(
        section, name, seconds=[round(s, 4) for s in seconds], host_seconds=round(statistics.median(host), 4),
        tokens_per_second=round(tokens / median), **facts,
    )  # fmt: skip


def profile(bench: Bench, section: str, one: Callable[[], Any]) -> None:
    """The 25 kernels that a step of ours spends the most time in."""
    if not bench.on_gpu:
        return
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    one()
    with recorded(activities=[ProfilerActivity.CUDA]) as found:
        one()
        bench.synchronize()
    for event in sorted(found.key_averages(), key=lambda event: -event.device_time_total)[:25]:
        milliseconds = round(event.device_time_total / 1e3, 3)
        bench.tell(section, f"profile: {event.key[:90]}", milliseconds=milliseconds, launches=event.count)


def decoding(bench: Bench) -> None:
    """Greedy tokens a second of a 1B model with 128 tokens of prompt, next to transformers on the same weights."""
    model = llama(bench, "Llama-3.2-1B").eval()
    peer = transformers_model(bench, model).eval()
    prompt, new = (8, 4) if bench.small else (128, 64)
    for batch in (1, 16):
        ids = torch.randint(bench.sizes.vocab, (batch, prompt), device=bench.device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        ours = partial(generate, model, ids, max_new_tokens=new, temperature=0.0)
        theirs = partial(peer.generate, ids, max_new_tokens=new, **options)

        def without_graphs(call: Callable[[], Tensor] = ours) -> Tensor:
            with mock.patch.object(static_step, "GRAPHS", ()):
                return call()

        with torch.no_grad():
            expected = peer(ids).logits[:, -1].float()  # (B, V)
            error = ((model(ids)[:, -1].float() - expected).norm() / expected.norm()).item()
        if not error <= 0.05:
            bench.tell("decoding", f"{batch} rows", wrong=True, error=error)
            continue
        for name, call in (("handtune", ours), ("without graphs", without_graphs), ("transformers", theirs)):
            timed(bench, "decoding", f"{name}, {batch} rows", call, batch * new, error=round(error, 5))


def grpo(bench: Bench) -> None:
    """Rounds of GRPO with a 1B model: 32 completions of 48 tokens in groups of 8, one step a round.

    With one step, the policy is still the one that wrote: every ratio of probabilities must be 1, exactly.
    """
    n_rounds, new, prompt = (2, 4, 8) if bench.small else (4, 48, 64)
    model = llama(bench, "Llama-3.2-1B")
    prompts = torch.randint(bench.sizes.vocab, (16, prompt)).tolist()
    config = PPOConfig(
        episodes=32 * n_rounds, rollout_batch_size=32, batch_size=32, epochs=1, max_new_tokens=new, group_size=8,
        micro_batch_size=None, lora=LoRAConfig(bench.sizes.rank, 2 * bench.sizes.rank), save_every=10**6,
    )  # fmt: skip

    def reward(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
        return torch.tensor([len(set(completion)) / len(completion) for completion in completions])

    with tempfile.TemporaryDirectory() as folder:
        ppo(model, prompts, reward, config, run_dir=folder)
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    ratios = [line[key] for line in logged for key in ("ratio_min", "ratio_max")]
    parts = {key: [round(line[key], 4) for line in logged[1:]] for key in logged[-1] if key.endswith("_seconds")}
    if all(ratio == 1 for ratio in ratios):
        bench.tell("grpo", "rounds of 32 completions", **parts)
    else:
        bench.tell("grpo", "rounds of 32 completions", wrong=True, ratios=ratios)


def rows(bench: Bench, lengths: list[int], prompt: float = 0.5) -> list[Row]:
    """Rows of random tokens, the first share of each without targets."""
    found = []
    for length in lengths:
        ids = torch.randint(bench.sizes.vocab, (length + 1,)).tolist()
        hidden = int(prompt * length)
        found.append({"input_ids": ids[:-1], "targets": [-100] * hidden + ids[hidden + 1 :]})
    return found


def llama(bench: Bench, name: str) -> Llama:
    """A published size with random weights, made on the device."""
    s = bench.sizes
    sizes: dict[str, Any] = {}
    if bench.small:
        sizes = {
            "n_layer": 2, "d_model": s.width, "d_ff": s.inner, "n_head": s.heads, "n_kv_head": s.kv_heads,
            "vocab_size": s.vocab,
        }  # fmt: skip
    torch.manual_seed(0)  # so that a second one has the weights of the first
    torch.set_default_dtype(bench.dtype)
    try:
        with bench.device:
            return Llama.from_name(name, **sizes).train()
    finally:
        torch.set_default_dtype(torch.float32)


def our_step(model: Any, micro_batches: list[list[Row]]) -> Callable[[], Any]:
    """A step of our engine's parts, as its loop makes it."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Optimizer(trained, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    device = trained[0][1].device
    collate = Collate()

    def one() -> None:
        count = 0
        for given in micro_batches:
            loss, targets = causal_lm_loss(model, to_device(collate(given), device))
            loss.backward()
            optimizer.accumulate()
            count += targets
        optimizer.scale_gradients(count, 1.0)
        optimizer.step(LR)

    return one


def loss_and_norm(model: Any, given: list[Row]) -> tuple[float, float]:
    """Mean loss a target, and the norm of all gradients, of a forward and backward pass of ours."""
    trained = [p for p in model.parameters() if p.requires_grad]
    loss, count = causal_lm_loss(model, to_device(Collate()(given), trained[0].device))
    (loss / count).backward()
    return loss.item() / count, pop_norm(trained)


def pop_norm(trained: list[nn.Parameter]) -> float:
    """The norm of all gradients, which are dropped."""
    norm = torch.stack([p.grad.float().norm() for p in trained if p.grad is not None]).norm().item()
    for p in trained:
        p.grad = None
    return norm


def transformers_model(bench: Bench, model: Llama) -> Any:
    """transformers' model around our weights: nothing is copied."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**model.write_config(), attn_implementation="sdpa")
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(config)
    ours = stored_tensors(model)
    published = {
        name: source.as_stored(part)
        for key, source in model.key_map().items()
        for name, part in zip(source.names, blocks(ours[key], source), strict=True)
    }
    peer.load_state_dict(published, strict=False, assign=True)
    peer.tie_weights()
    peer.model.rotary_emb = LlamaRotaryEmbedding(config).to(bench.device)
    assert not any(p.is_meta for p in peer.parameters())
    return peer


def peft_model(bench: Bench, model: Llama | None, adapter: str, before: Any = None, way: str = "checkpointed") -> Any:
    """PEFT's model with the adapter of a file, around our weights, or around those of the one `before`."""
    import peft

    base = transformers_model(bench, model) if model is not None else before.unload()
    if way == "checkpointed":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    narrow = way == "adapters in bf16"
    peer = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True, autocast_adapter_dtype=not narrow)
    return peer.train()


def peer_losses(peer: Any, given: list[Row]) -> tuple[float, int]:
    """The backward pass of the mean loss, a row at a time; the sum of the losses and the number of targets."""
    device = next(peer.parameters()).device
    count = sum(target != -100 for row in given for target in row["targets"])
    total = 0.0
    for row in given:
        ids, targets = (torch.tensor(row[key], device=device)[None] for key in ("input_ids", "targets"))
        out = peer(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False, num_items_in_batch=count)
        out.loss.backward()
        total += out.loss.item() * count
    return total, count


def peer_reference(peer: Any, given: list[Row]) -> tuple[float, float]:
    """Loss and norm of the gradients, as `loss_and_norm` of ours."""
    total, count = peer_losses(peer, given)
    return total / count, pop_norm([p for p in peer.parameters() if p.requires_grad])


def peer_step(peer: Any, given: list[Row]) -> Callable[[], Any]:
    trained = [p for p in peer.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def one() -> None:
        peer_losses(peer, given)
        nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()

    return one


def collect(bench: Bench) -> None:
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()

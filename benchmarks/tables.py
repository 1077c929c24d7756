"""The tables of benchmarks/README.md, out of benchmarks/results: no figure is typed by hand.

python benchmarks/tables.py            # writes benchmarks/README.md, and the small table of README.md
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- by benchmarks/tables.py -->", "<!-- end -->"
MODELS = {"gpt2": "GPT-2 small", "llama-small": "Llama", "tinyllama": "TinyLlama"}
DECODERS = {  # in the sizes of the Llama
    "smollm3": "SmolLM3", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3", "phi3": "Phi-3", "olmo2": "OLMo 2",
}  # fmt: skip
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def main() -> None:
    (HERE / "README.md").write_text(page(), encoding="utf-8")
    front = HERE.parent / "README.md"
    front.write_text(with_table(front.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(text: str) -> str:
    """README.md's text with the small table of today's results between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{small()}\n{END}{after}"


def results(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return facts


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def training_rows() -> list[list[str]]:
    """A row for each kind of work, model and dtype: speed and memory beside PEFT's."""
    rows = []
    for work, ours, label in (
        ("half", "handtune", "4 × 256 tokens, half of them prompt"),
        ("half", "handtune, recompute", "the same, feed-forwards recomputed"),
        ("12 %", "handtune", "12 % prompt"),
    ):
        for model in ("gpt2", "llama-small"):
            for dtype in DTYPES:
                run = results(f"train_{model}_cpu_{dtype}")["results"][work]
                rows.append([label, f"{MODELS[model]}, {DTYPES[dtype]}", *beside(run[ours], run["peft"], run["floor"])])

    lengths = results("train_gpt2_alpaca_cpu_float32")["results"]["alpaca"]
    for peer, label in (
        ("peft", "instruction data with Alpaca-like lengths, 8 rows a batch, against padding"),
        ("peft, grouped", "the same, against padding with rows grouped by length"),
    ):
        rows.append([label, "GPT-2 small, fp32", *beside(lengths["handtune"], lengths[peer], None)])
    return rows


def beside(ours: dict[str, Any], peer: dict[str, Any], floor: dict[str, Any] | None) -> list[str]:
    """Speed, share of the floor, peak, tight peak and saved bytes, of a peer's."""
    speed = "tokens_per_second"

    def share(field: str) -> str:
        return f"{ours[field] / peer[field]:.2f}" if field in ours and field in peer else ""

    return [
        f"{ours[speed] / peer[speed]:.2f}",
        "" if floor is None else f"{floor[speed] / peer[speed]:.2f}",
        "" if floor is None else percent(ours[speed] / floor[speed]),
        share("peak_over_weights"),
        share("peak_over_weights_tight"),
        share("saved_per_token"),
    ]


def small() -> str:
    """What README.md shows."""
    rows = [[label, model, speed, peak] for label, model, speed, _, _, peak, _, _ in training_rows()]
    chosen = [row for row in rows if row[0].startswith(("4 ×", "instruction"))]
    shown = table(["work", "model, dtype", "tokens/s, times PEFT", "peak memory above weights, of PEFT's"], chosen)
    run = results("sft_peers_cpu")["results"]["sft"]
    ratios, losses = run["times as fast, and of the peak"], run["referee's loss"]
    return f"""{shown}

A step of SFT on SmolLM2 is {ratios["step_seconds"]:.1f} times as fast as TRL's, at {ratios["peak"]:.2f} of the
process's peak; the loss on held-out rows is {losses["handtune"]:.4f} after ours and {losses["trl"]:.4f} after TRL's."""


BESIDE = (
    "tokens/s, times PEFT", "the floor, times PEFT", "share of the floor", "peak memory above weights, of PEFT's",
    "tight", "bytes saved for backward",
)  # fmt: skip


def training() -> str:
    return table(["work", "model, dtype", *BESIDE], training_rows())


def decoders() -> str:
    rows = []
    for kind, name in DECODERS.items():
        for dtype, short in DTYPES.items():
            run = results(f"train_{kind}-small_cpu_{dtype}")["results"]["half"]
            rows.append([f"{name}, {short}", *beside(run["handtune"], run["peft"], run["floor"])])
    return table(["model, dtype", *BESIDE], rows)


BLOCKS = {"llama": "Llama", **DECODERS, "gpt2": "GPT-2 small"}


def saved() -> str:
    rows = []
    for name, run in results("saved_bytes")["results"].items():
        block, dropout = name.split(", dropout ")
        ours, peft, half = run["handtune"], run["peft"], run["peft, adapters in bf16"]
        again = f"{run['handtune, recompute'] / peft:.2f}" if "handtune, recompute" in run else "—"
        rows.append([BLOCKS[block], dropout, f"{ours / peft:.2f}", f"{ours / half:.2f}", again])
    return table(["block", "dropout", "of PEFT's", "of PEFT's with adapters in bf16", "recomputed, of PEFT's"], rows)


def apart(*columns: str) -> str:
    """The largest number of these columns in the matrix of families."""
    cells = [row[column] for row in results("families_cpu")["results"].values() for column in columns]
    return f"{max(cell for cell in cells if isinstance(cell, float)):.0e}"


def adapters() -> str:
    rows = []
    for name, run in results("adapters_cpu")["results"].items():
        model, dtype, width = name.split(", ")
        seconds = {key: statistics.median(values) for key, values in run["seconds"].items()}
        label = f"{MODELS[model]}, {DTYPES[dtype]}"
        if width == "training":
            rows.append(
                [label, "64, training", f"{seconds['one by one'] / seconds['mixed']:.2f} times one by one", "", ""]
            )
            continue
        rows.append([
            label, width.split()[0], f"{seconds['mixed'] / seconds['one']:.2f}",
            f"{seconds['peft'] / seconds['mixed']:.2f}", f"{seconds['peft'] / seconds['base']:.2f}",
        ])  # fmt: skip
    return table(
        ["model, dtype", "tokens a row", "beside one adapter", "PEFT beside it", "PEFT beside the base alone"], rows
    )


def methods() -> str:
    rows = []
    for name, method in results("methods_cpu")["results"].items():
        runs = method["runs"]
        accuracy = [100 * run["accuracy"] for run in runs]
        first = runs[0]
        rows.append([
            name, f"{first['trainable']:,}", f"{first['optimizer_bytes'] / 1e6:.1f} MB",
            f"{first['stored_bytes'] / 1e6:.1f} MB",
            f"{statistics.mean(accuracy):.1f} % ({min(accuracy):.1f} to {max(accuracy):.1f})",
        ])  # fmt: skip
    return table(["", "trained", "optimizer", "stored", "accuracy"], rows)


def ppo_memory() -> str:
    rows = [
        [run["model"], *(f"{run[key] / 1e9:.2f} GB" for key in ("base", "ours", "four"))]
        for run in results("ppo_memory")["results"]
    ]
    return table(["model, bf16", "base", "handtune", "four models, two of them trained in full"], rows)


def ppo_speed() -> str:
    runs = {(run["task"], run["name"]): run for run in results("ppo_cpu")["results"]}
    rows = []
    for task, name in (
        ("text", "all layers"),
        ("text", "upper half"),
        ("walks", "all layers"),
        ("walks", "upper half"),
    ):
        ours, trl = runs[task, name], runs[task, f"TRL, {name}"]
        parts = [ours[f"{part}_seconds"] for part in ("rollout", "assess", "update")]
        rows.append([
            f"{task}, adapters in the {name}" if name == "upper half" else f"{task}, adapters in {name}",
            f"{ours['episodes_per_second'] / trl['episodes_per_second']:.2f}",
            ", ".join(f"{100 * part / sum(parts):.0f}" for part in parts) + " %",
            f"{ours['peak'] / trl['peak']:.2f}",
        ])  # fmt: skip
    return table(["task", "episodes/s, times TRL", "rollout, assessment, updates", "peak memory, of TRL's"], rows)


def beside_trl() -> str:
    """Fine-tuning and GRPO of a chat model: how many times as fast as TRL, and of its memory."""
    rows = []
    for work, run in results("sft_peers_cpu")["results"].items():
        ratios = run["times as fast, and of the peak"]
        rows.append([
            {"sft": "fine-tuning", "grpo": "GRPO"}[work], f"{ratios['step_seconds']:.2f}",
            f"{ratios['process_seconds']:.2f}", f"{ratios['peak']:.2f}",
        ])  # fmt: skip
    return table(["", "a step, times TRL", "the process, times TRL", "peak memory, of TRL's"], rows)


def optimum() -> str:
    """How far PPO goes from the reference to the known optimum, by β and kind of scores."""
    runs = results("enumerable_cpu")["results"]
    rows = []
    for scores, beta in dict.fromkeys((run["scores"], run["beta"]) for run in runs):
        shares = [100 * run["share"] for run in runs if (run["scores"], run["beta"]) == (scores, beta)]
        rows.append([scores, beta, f"{min(shares):.1f} to {max(shares):.1f} %"])
    return table(["scores", "β", "of the way from the reference to the optimum"], rows)


def generation() -> str:
    rows = []
    for name, run in results("generation_cpu")["results"].items():
        dtype, batch = name.split(", batch ")
        speed = run["tokens_per_second"]
        ratio = speed["handtune"] / speed["transformers"]
        rows.append([f"{DTYPES[dtype]}, {batch}", f"{ratio:.2f}", percent(run["agreed"])])
    return table(["dtype, rows", "tokens/s, times transformers", "tokens that agree"], rows)


def loading() -> str:
    rows = []
    for name, run in results("load_cpu")["results"].items():
        ours, theirs = run["handtune"], run["transformers"]
        rows.append([
            name, f"{ours['size'] / 1e9:.2f} GB", f"{ours['load peak']:.2f}", f"{theirs['load peak']:.2f}",
            f"{ours['load seconds'] / run['floor']['load seconds']:.1f}",
        ])  # fmt: skip
    return table(["model", "size", "peak, of the size", "transformers' peak", "seconds, times reading alone"], rows)


def chat_masks() -> str:
    totals = results("chat_masks")["totals"]
    return table(
        [f"dialogues of {sum(totals.values()):,}", *totals], [["", *(f"{count:,}" for count in totals.values())]]
    )


def page() -> str:
    """The whole of benchmarks/README.md."""
    versions, peers = results("train_gpt2_cpu_float32"), results("sft_peers_cpu")
    trained = peers["results"]["sft"]
    losses = trained["referee's loss"]
    frozen, adapted = (results("block_bytes")["results"][name] for name in ("frozen", "LoRA"))
    return f"""# Benchmarks

One question a script, answered in `results/*.json` with the device and the versions that it was measured with. This
page is written by `python benchmarks/tables.py` from these files. Absolute times are those of a noisy machine; the
ratios count, and those alone are shown.

On CUDA: not measured. `gpu.py` measures it, where there is a GPU. What a block of Llama-3.1-8B launches and moves there
at 8,192 tokens is counted (`block_bytes.py`): {frozen["launches"]} launches and {frozen["gigabytes"]:.1f} GB with
frozen weights, {adapted["launches"]} and {adapted["gigabytes"]:.1f} with LoRA of R 16 on them all, without attention.

## Training

`make bench`: a LoRA training step (R 16 on every projection) against transformers {versions["transformers"]} and PEFT
{versions["peft"]} on the same weights and tokens, on {versions["threads"]} cores of an {versions["device"]}. Both take
turns in one run; figures are medians. The floor is what the matrix products and the attention alone take: where PEFT is
near it, nobody can be much faster. "Tight" is the same peak with MALLOC_MMAP_THRESHOLD_=65536 on both sides, without
the holes that glibc's heap keeps. The Llama is of GPT-2 small's width, with 4 key/value heads for 12 query heads.

{training()}

The same step, half of it prompt, on other decoders in the sizes of that Llama, and six layers of them. transformers
computes Gemma 2's soft-capped attention with all scores in memory; the floor leaves the soft-cap out.

{decoders()}

What a block keeps for the backward pass, bf16, weights and adapters left out (`python benchmarks/saved_bytes.py`):

{saved()}

## Many adapters in one batch

`python benchmarks/adapters.py`: 64 of R 16 on every projection, one a row, two layers of the model, without gradients;
medians of rounds in turn. What a batch costs beside one with the same adapter for all rows, and PEFT's mixed batch
(`adapter_names`) beside it. With a token a row the adapters are read once for it, like the weights: memory bounds what
is left. Training has no counterpart in PEFT.

{adapters()}

## A chat model, beside TRL

`python benchmarks/sft_peers.py MODEL ROWS --trl PYTHON`: SmolLM2-135M-Instruct, widened from 4 bits, in
{DTYPES[peers["dtype"]]} on {peers["threads"]} cores, LoRA of R 16 on every projection. Ours are `handtune train` and
`handtune ppo`, TRL {trained["versions"]["trl"]}'s are SFTTrainer and GRPOTrainer, with the padding that they choose.
Medians of three processes each, in turn. Fine-tuning: 160 rows of Alpaca's shape, 8 a step, cut at 512 tokens, the same
factors, order and optimizer on both sides. Of 64 rows held out, transformers and PEFT find a loss of
{losses["before"]:.4f} before, {losses["handtune"]:.4f} after ours and {losses["trl"]:.4f} after TRL's. GRPO: 32
completions a round, of 32 tokens, in groups of 8.

{beside_trl()}

## What LoRA spares, at equal quality

`python benchmarks/methods.py MODEL TRAIN TEST`: MiniLM on the sentences of SST-2, one epoch, the best of three learning
rates for each by held-out training rows, three seeds.

{methods()}

## PPO

On a task small enough to list, where the best policy is known (`benchmarks/enumerable.py`, three seeds each, equal
time). "independent": each completion has a score of its own, which tells nothing of another.

{optimum()}

What a base with three adapters holds, in bytes of storages with gradients and optimizer (`benchmarks/ppo_memory.py`):

{ppo_memory()}

A round beside the last PPOTrainer of TRL (`python benchmarks/ppo.py --trl PYTHON`): a GPT-2 of 6 layers with a reward
model, LoRA of R 16, 4 epochs; "text", 32 new tokens after prompts of 8 to 48, at width 384, and "walks", the sizes of
the random walks of `benchmarks/random_walks.py`. Medians of rounds, in processes that took turns.

{ppo_speed()}

With adapters in all layers the matrix products of the updates take most of their time, and both sides have to do them.

## Generation

`python benchmarks/generation.py`: greedy, on GPT-2 small's shape with random weights, prompts of 128 tokens, 64 new
ones. Products of few rows take most of the time; ours reads weights that it packs for that when it begins to write, and
holds twice while it does. The tokens of random weights part at bf16's rounding.

{generation()}

## Loading

`python benchmarks/load.py`: transformers maps a file that it need not convert, and is faster there.

{loading()}

## Exchange

`python benchmarks/families.py` prints what each of {len(results("families_cpu")["results"])} families can do: logits
and gradients that are transformers', adapters that are PEFT's, training with an adapter, in full and on four bits,
merging. The largest difference from transformers' outputs is {apart("logits", "left", "heads")}, from PEFT's
{apart("PEFT out", "PEFT in")}.

`python benchmarks/exchange.py` prints the grid of families and heads: what is stored here gives transformers, PEFT and
sentence-transformers the numbers that it gives here, and the other way round. `benchmarks/chat_model.py` compares what
a trained chat model writes here and in transformers.

`benchmarks/chat_masks.py` compares the loss masks of published chat templates (those of
{results("chat_masks")["templates"]}) with twins of them that mark what the assistant writes. "By rule": equal but for
what a written rule decides, such as a line end behind the turn's last token. "Refused": the template drops or refuses
something.

{chat_masks()}
"""


if __name__ == "__main__":
    main()

"""Supervised fine-tuning and GRPO of a real chat model, beside TRL's SFTTrainer and GRPOTrainer.

    python benchmarks/sft_peers.py MODEL ROWS --trl PYTHON [--work sft grpo] [--repeats 3] [--out FILE]

MODEL is a chat model of the Llama family (a folder), ROWS a file of Alpaca rows, PYTHON an interpreter with trl and
peft (`sft_peers_trl.py` runs there; measured with trl 1.16). Ours is `handtune train` and `handtune ppo`, as a user
types them. Both sides start from the same LoRA factors (R 16 on every projection), see the same rows in the same order,
and have the same optimizer, schedule, batch size and dtype; each goes through the chat template and cuts batches by its
own rules: ours without padding, TRL's by its defaults.

Quality first: what both adapters make of rows that were held out is judged by one referee, transformers with PEFT.
Then a step's seconds (the median without the first two), the seconds of the whole process, imports and tokenization
included, and its peak memory. The processes take turns; medians over them, and ratios alone count.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEER = HERE / "sft_peers_trl.py"
RANK = 16
EVAL_ROWS = 64
SFT = {"rows": 160, "batch_size": 8, "lr": 2e-4, "max_length": 512}
GRPO = {"rounds": 6, "completions": 32, "group": 8, "new_tokens": 32, "lr": 1e-4, "kl": 0.04}
# A reward that both sides can call: an answer of about twenty words.
JUDGE = """
def about_twenty_words(prompts, completions):
    return [-abs(len(text.split()) - 20) / 20 for text in completions]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--trl", required=True, help="an interpreter with trl and peft")
    parser.add_argument("--work", nargs="+", default=["sft", "grpo"], choices=("sft", "grpo"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for work in options.work:
            results[work] = measured(work, Path(folder), options)
            print(json.dumps({work: results[work]}, indent=1), flush=True)
    if options.out:
        facts = {"benchmark": "sft_peers", "device": "cpu", "machine": platform.processor() or platform.machine(),
                 "threads": os.cpu_count(), "model": options.model.name, "rows": options.rows.name,
                 "dtype": options.dtype, "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        options.out.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n", encoding="utf-8")


def measured(work: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of both sides' processes, and what their results are worth."""
    spec = write_inputs(work, folder, options)
    runs: dict[str, list[dict[str, Any]]] = {"handtune": [], "trl": []}
    for repeat in range(options.repeats):
        # Each run has a folder of its own, because a finished one would only be looked at.
        out = folder / f"{work}-{repeat}"
        runs["handtune"].append(timed(work, our_command(work, folder, out), out))
        theirs = [options.trl, str(PEER), work, str(spec), str(out) + "-trl"]
        runs["trl"].append(timed(work, theirs, Path(f"{out}-trl")))

    sides = {side: {key: statistics.median(run[key] for run in each) for key in each[0]} for side, each in runs.items()}
    ratios = {key: sides["trl"][key] / sides["handtune"][key] for key in ("step_seconds", "process_seconds")}
    ratios["peak"] = sides["handtune"]["peak"] / sides["trl"]["peak"]
    facts = {**sides, "times as fast, and of the peak": ratios}
    if work == "sft":
        adapters = [str(folder / "start"), str(folder / "sft-0/adapter"), str(folder / "sft-0-trl")]
        told = subprocess.run([options.trl, str(PEER), "judge", str(spec), *adapters], check=True, capture_output=True,
                              text=True)  # fmt: skip
        losses = json.loads(told.stdout.splitlines()[-1])
        facts["referee's loss"] = dict(zip(("before", "handtune", "trl"), losses["losses"], strict=True))
        facts["versions"] = losses["versions"]
    return facts


def write_inputs(work: str, folder: Path, options: argparse.Namespace) -> Path:
    """The rows of both sides, the adapter that they start from, the order of rows; the peer's settings as a file."""
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    messages = [
        {"messages": [
            {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row.get("input"))))},
            {"role": "assistant", "content": row["output"]},
        ]}
        for row in rows
    ]  # fmt: skip
    parts = {"eval": messages[:EVAL_ROWS], "train": messages[EVAL_ROWS : EVAL_ROWS + SFT["rows"]]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (folder / "judges.py").write_text(JUDGE)
    (folder / "sft.toml").write_text(
        f'method = "sft"\nout = ""\n[model]\npath = "{options.model.resolve()}"\ndtype = "{options.dtype}"\n'
        f'[data]\ntrain = "{folder}/train.jsonl"\neval = "{folder}/eval.jsonl"\nmax_length = {SFT["max_length"]}\n'
        f"[lora]\nrank = {RANK}\nalpha = {RANK}\n[train]\nbatch_size = {SFT['batch_size']}\nlr = {SFT['lr']}\n"
        f'schedule = "linear"\nwarmup = 0\nweight_decay = 0\nbest = "last"\n'
    )
    (folder / "grpo.toml").write_text(
        f'out = ""\nprompts = "{folder}/train.jsonl"\nreward = "judges:about_twenty_words"\n'
        f'[model]\npath = "{options.model.resolve()}"\ndtype = "{options.dtype}"\n'
        f"[ppo]\nepisodes = {GRPO['rounds'] * GRPO['completions']}\nrollout_batch_size = {GRPO['completions']}\n"
        f"batch_size = {GRPO['completions']}\ngroup_size = {GRPO['group']}\nepochs = 1\n"
        f"max_new_tokens = {GRPO['new_tokens']}\nlr = {GRPO['lr']}\nkl_coef = {GRPO['kl']}\n"
        f"[ppo.lora]\nrank = {RANK}\nalpha = {RANK}\n"
    )

    order = start_and_order(folder, options) if work == "sft" else []
    spec = folder / f"{work}.json"
    spec.write_text(json.dumps({
        "model": str(options.model.resolve()), "dtype": options.dtype, "rank": RANK, "folder": str(folder),
        "start": str(folder / "start"), "order": order, "sft": SFT, "grpo": GRPO,
    }))  # fmt: skip
    return spec


def start_and_order(folder: Path, options: argparse.Namespace) -> list[int]:
    """Store the adapter that our run begins with; returns the order in which it sees its rows."""
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    from handtune.config import read_config
    from handtune.engine import save_adapter
    from handtune.engine.training.loop import training_batches
    from handtune.prepare import choose_trained, prepare, run_base

    config = read_config(folder / "sft.toml")
    ready = prepare(config, run_base(config), folder)
    choose_trained(ready, config)
    save_adapter(ready.model, folder / "start")
    if len(ready.examples) != SFT["rows"]:
        raise SystemExit("a row became no example or several: the peer would not see the same rows")
    return [int(i) for step in training_batches(ready.examples, ready.collate, config.train).plan(0) for i in step]


def our_command(work: str, folder: Path, out: Path) -> list[str]:
    command = {"sft": "train", "grpo": "ppo"}[work]
    return [sys.executable, "-m", "handtune", command, str(folder / f"{work}.toml"), f"out={out}"]


def timed(work: str, command: list[str], out: Path) -> dict[str, float]:
    """Run a process to its end: its seconds, its peak, and the median of its steps, which it logs to metrics.jsonl."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{out.parent}", "TOKENIZERS_PARALLELISM": "false"}
    log = out.parent / "log.txt"
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=out.parent)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{log.read_text(errors='replace')[-3000:]}")

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if work == "grpo":
        steps = [line["round_seconds"] if "round_seconds" in line else our_round(line) for line in lines]
    else:
        steps = [line["tokens"] / line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    facts = {"step_seconds": statistics.median(steps[2:]), "process_seconds": seconds, "peak": usage.ru_maxrss * 1024}
    losses = [line["eval"]["loss"] for line in lines if "eval" in line]
    if losses:
        facts["its_own_eval_loss"] = losses[-1]
    scores = [line["score"] for line in lines if "score" in line]
    if scores:
        facts |= {"first_score": scores[0], "last_score": scores[-1]}
    return facts


def our_round(line: dict[str, float]) -> float:
    return sum(line[key] for key in ("rollout_seconds", "assess_seconds", "update_seconds"))


if __name__ == "__main__":
    main()

"""Every method on several processes: its tiny run from a configuration file, and what two runs have left compared."""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from many_ranks import on_ranks
from small_methods import RUNS, base_folder, method_config
from small_runs import CHAT, gpt2, write_config, write_rows

from handtune.cli import main
from handtune.engine.generation.completions import first_end
from handtune.engine.generation.sampling import continuations
from handtune.engine.parallel.ranks import rank, spread
from handtune.engine.parallel.sharding import Sharding, is_sharded
from handtune.engine.parallel.tree import GradientTree
from handtune.engine.runtime import begin_draws
from handtune.engine.training import evaluation, loop

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports for seconds at its first call: before the forks

# What depends on the clock, on memory, and on how many processes there were.
ASIDE = {
    "seconds", "peak_memory", "started", "world_size", "folder", "tokens_per_second", "images_per_second",
    "shard", "episodes_per_second", "rollout_seconds", "assess_seconds", "update_seconds",
}  # fmt: skip
HEAD = {"freeze": {"names": ["*"], "except": ["head.*"]}}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"lora": {"rank": 2, "dropout": 0.1}},
    "dora": {"lora": {"rank": 2, "dora": True}},
    "nf4": {"lora": {"rank": 2}, "model": {"quantize": "nf4"}},
    "full": {},
    "gradual": {"train": {"unfreeze": {"*norm*": 0, "*layers*": 1, "*": 1.5}}},
    "head": HEAD,
}
# PPO with a critic, and GRPO, whose reward depends on what is written.
POLICIES: dict[str, dict[str, Any]] = {
    "ppo": {"batch_size": 4, "micro_batch_size": 1, "epochs": 2, "rollout_micro_batch_size": 2},
    "ppo, one step a round": {"batch_size": 8, "micro_batch_size": 2, "epochs": 1, "rollout_micro_batch_size": 3},
    "grpo": {"batch_size": 8, "micro_batch_size": 2, "epochs": 1, "group_size": 2, "rollout_micro_batch_size": 2},
}


def _mean_over_processes() -> None:
    finish = GradientTree.finish

    def averaged(tree: GradientTree) -> None:
        n = max(1, len(tree.shares))
        finish(tree)
        for weight in tree.weights:
            if weight.grad is not None:
                weight.grad /= n

    GradientTree.finish = averaged  # type: ignore[method-assign]


def _seed_of_each_process() -> None:
    for module in (loop, evaluation):
        module.begin_draws = lambda *position: begin_draws(*position, rank())  # type: ignore[attr-defined]


def _order_of_processes() -> None:
    def reduced(tree: GradientTree) -> None:
        sums = tree.nodes.values()
        for i, weight in enumerate(tree.weights):
            terms = [node[i] for node in sums if i in node] + ([weight.grad] if weight.grad is not None else [])
            weight.grad = torch.stack([*terms, torch.zeros_like(weight)]).sum(0)
            dist.all_reduce(weight.grad)
        tree.reset()

    GradientTree.finish = reduced  # type: ignore[method-assign]


MISTAKES = {
    "a mean over processes": _mean_over_processes,
    "a seed of each process": _seed_of_each_process,
    "the order of processes": _order_of_processes,
}


def without_cell(name: str, variant: str) -> str | None:
    """Why there is no such run, if there is none."""
    family, method, _ = RUNS[name]
    if variant == "head" and method not in ("classify", "tag", "qa", "reward"):
        return "its head is tied to the embedding, or it has none"
    if variant == "nf4" and family == "resnet":
        return "convolutions are not kept in four bits"
    return None


def divided(
    name: str, variant: str, n: int, folder: Path, mistake: str | None = None, shard: str = "none", **train: Any
) -> Path:
    """The run of a method on n processes, with a mistake planted in them; gives its folder."""
    config = configuration(name, variant, folder, shard, **train)
    on_ranks(n, folder / "ranks", in_process, "train", str(config), "", mistake)
    return folder / "run"


def configuration(name: str, variant: str, folder: Path, shard: str = "none", **train: Any) -> Path:
    """The file of the run of a method, whose micro-batches are single rows."""
    folder.mkdir()
    tables = {key: dict(table) for key, table in VARIANTS[variant].items()}
    family = RUNS[name][0]
    base = base_folder(family, folder)
    tables["train"] = {"batch_size": 6, "micro_batch_size": 1, **tables.get("train", {}), **train}
    tables["parallel"] = {"shard": shard}
    if "model" in tables:
        tables["model"]["path"] = str(base)
    return method_config(name, folder, base, **tables)


def divided_policy(
    name: str, n: int, folder: Path, shard: str = "none", reward: Path | None = None, model: Any = None, **settings: Any
) -> Path:
    """A policy trained on n processes, by vowels or what a run has learnt to score; gives the run's folder."""
    folder.mkdir()
    scores = "def vowels(prompts, texts):\n    return [sum(map(text.count, 'aeiou')) for text in texts]\n"
    (folder / "divided_scores.py").write_text(scores)
    ppo = {
        "episodes": 24, "rollout_batch_size": 8, "max_new_tokens": 5, "lr": 1e-2, "save_every": 1, "keep_last": 3,
        "lora": {"rank": 2}, **POLICIES[name], **settings,
    }  # fmt: skip
    tables = {"model": {"path": str(base_folder("gpt2", folder)), **(model or {})}, "parallel": {"shard": shard}}
    config = write_config(
        folder / "ppo.toml", prompts=str(write_rows(folder / "rows.jsonl", CHAT)),
        reward=str(reward or "divided_scores:vowels"), out=str(folder / "run"), ppo=ppo, **tables,
    )  # fmt: skip
    on_ranks(n, folder / "ranks", in_process, "ppo", str(config), str(folder))
    return folder / "run"


def written_in_shards(shard: str) -> list[list[int]]:
    """What a model writes behind its prompts, each in one of the processes; most texts end early, each at its time."""
    model = gpt2()
    Sharding(shard, 0, torch.device("cpu")).finish(model, ())

    def write(i: int, prompt: list[int]) -> list[int]:
        return continuations(model, [prompt], 20, seed=i, eos_id=range(40))[0]

    texts = spread([[50 + i] * (i + 1) for i in range(7)], write, is_sharded(model))
    return [text[: first_end(text, range(40)) + 1] for text in texts]


def in_process(name: str, config: str, path: str = "", mistake: str | None = None) -> None:
    """A command of handtune in a process of several."""
    sys.path.insert(0, path)
    if mistake is not None:
        MISTAKES[mistake]()
    assert main([name, config, "--debug"]) == 0


def typed(arguments: list[str]) -> str:
    """What a command prints in a process of several."""
    output = io.StringIO()
    with redirect_stdout(output):
        assert main([*arguments, "--debug"]) == 0
    return output.getvalue()


def left(run: Path) -> dict[str, Any]:
    """What a run has left, by the names of its files: what does not depend on the clock or the number of processes."""
    files: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        if path.suffix in (".json", ".jsonl"):
            files[str(path.relative_to(run))] = [_lasting(json.loads(line)) for line in _documents(path)]
        elif path.is_file() and path.name != "SHA256SUMS":
            files[str(path.relative_to(run))] = path.read_bytes()
    return files


def _documents(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(entry) for key, entry in value.items() if key not in ASIDE and not _is_path(entry)}
    if isinstance(value, list):
        return [_lasting(entry) for entry in value if not _is_path(entry)]
    return value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("/")


def assert_same_left(one: Path, other: Path) -> None:
    """Bitwise the same adapter or model, checkpoints, metrics and result."""
    ours, theirs = left(one), left(other)
    assert ours.keys() == theirs.keys()
    assert len([name for name in ours if name.endswith(".safetensors")]) >= 2
    assert [name for name in ours if ours[name] != theirs[name]] == []

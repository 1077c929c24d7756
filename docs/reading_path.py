"""The files to read to understand LoRA fine-tuning of GPT-2 and Llama, from the file to the kernel.

    python docs/reading_path.py            # writes the list into ARCHITECTURE.md

They are what `handtune/commands/train.py` imports, directly or through others, without what is about something else:
other families, other methods, other kinds of adapters and data, and the care that is taken of damaged files.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- by docs/reading_path.py -->", "<!-- end -->"
START = "handtune/commands/train.py"
TASK = "engine/tasks/causal_lm.py"  # of the many that the table of methods leads to
# What another path would be about. A folder stands for all that is in it.
ELSEWHERE = {
    "other families": [
        "models/bloom", "models/encoder.py", "models/image_model.py", "models/bert.py", "models/roberta.py",
        "models/distilbert.py",
        "models/mpnet.py", "models/modernbert.py", "models/gemma", "models/smollm3.py", "models/olmo.py",
        "models/phi3.py", "models/t5", "models/xlnet", "models/resnet", "models/vit",
        "models/checkpoint/renamed.py",
    ],
    "other methods": [
        "engine/rlhf", "engine/tasks/preferences.py", "engine/tasks/permutation_lm.py", "engine/tasks/seq2seq.py",
        "engine/tasks/masked_lm.py", "engine/tasks/classification.py", "engine/tasks/tagging.py",
        "engine/tasks/question_answering.py", "engine/tasks/embedding.py", "engine/tasks/metrics.py",
        "engine/tasks/step_loss.py",
        "engine/tasks/objectives.py", "engine/generation", "models/layers/heads.py", "models/layers/kv_cache.py",
        "models/checkpoint/tasks.py", "kernels/matmul_cpu.py", "kernels/cross_entropy/token_losses.py",
    ],
    "other adapters": [
        "kernels/conv.py", "kernels/quant", "kernels/lora/batched.py", "kernels/lora/batched_torch.py",
        "kernels/lora/batched_triton.py", "kernels/lora/row_groups.py", "kernels/lora/per_row.py",
        "kernels/lora/dora.py", "kernels/lora/matrix_factors.py", "engine/adapters/embedding.py",
        "engine/adapters/token_rows.py",
        "engine/adapters/combine.py", "engine/adapters/qlora.py", "engine/adapters/tied.py",
        "engine/adapters/rounding.py", "engine/adapters/modules_to_save.py", "engine/adapters/switch.py",
        "engine/adapters/locking.py", "engine/adapters/module_patterns.py", "engine/training/freezing.py",
        "engine/adapters/wrapping.py",
    ],
    "other options": [
        "kernels/dropout.py", "kernels/attn/blocks.py", "models/layers/dropout.py",
        "kernels/optim/adamw8bit.py", "kernels/optim/adamw8bit_state.py",
        "kernels/optim/adamw8bit_triton.py", "kernels/optim/blockwise.py", "kernels/optim/muon.py",
        "engine/training/optimizers.py", "models/layers/initialization.py",
    ],
    "other data": [
        "engine/chat", "engine/formats", "engine/data/columns.py", "engine/data/corpus.py", "engine/data/images.py",
        "engine/data/mixing.py",
        "engine/data/row_fields.py", "engine/data/schema.py", "engine/data/labels.py",
        "models/tokenizer", "models/checkpoint/gguf.py", "models/tensors/gguf_file.py",
        "models/tensors/quantized.py", "models/tensors/decoding.py",
        "models/layers/image_processor.py", "models/checkpoint/pooling.py", "models/layers/relative_positions.py",
        "models/layers/rope_scaling.py", "models/llama/config.py",
    ],
    "the parts of a block once more, put together for a GPU": [
        "kernels/mlp/fused.py", "kernels/mlp/fused_triton.py", "kernels/lora/norms_triton.py",
    ],
    "attention beyond torch's": [
        "kernels/attn/cpu.py", "kernels/attn/rows.py", "kernels/attn/forward_triton.py",
        "kernels/attn/backward_triton.py",
    ],
    "many processes": ["engine/parallel", "models/checkpoint/local_rows.py"],
    "care": [
        "handtune", "engine/finite.py", "engine/runtime.py", "engine/data/fingerprints.py",
        "engine/data/placed_rows.py",
        "engine/training/cached_features.py", "engine/training/guards.py",
        "engine/training/journal.py", "engine/training/run_folder.py", "engine/training/state.py",
        "engine/training/watching.py",
        "models/checkpoint/hub.py", "models/checkpoint/nearest.py", "models/checkpoint/saving.py",
    ],
}  # fmt: skip
STEPS = {
    "handtune": "the command", "engine/data": "rows and batches", "engine/tasks": "examples and losses",
    "models": "the models", "engine/adapters": "adapters", "engine/training": "training", "engine": "the process",
    "kernels": "the kernels",
}  # fmt: skip


def main() -> None:
    page = ROOT / "ARCHITECTURE.md"
    page.write_text(with_list(page.read_text(encoding="utf-8")), encoding="utf-8")


def with_list(text: str) -> str:
    """ARCHITECTURE.md's text with the list of today's files between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{listing()}\n{END}{after}"


def listing() -> str:
    sizes = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in files()}
    lines = [f"{sum(sizes.values()):,} lines in {len(sizes)} files.", ""]
    left = dict(sizes)
    for folder, step in STEPS.items():
        chosen = [path for path in left if path.startswith(f"{folder}/")]
        named = ", ".join(f"[`{path.removeprefix(folder + '/')}`]({path}) {left.pop(path)}" for path in sorted(chosen))
        lines.append(f"- **{step}**, `{folder}/`: {named}")
    return "\n".join(lines)


def files() -> list[str]:
    """The files of the path: breadth first from the command and the task, with the Triton twins of what is read."""
    found, queue = [START, TASK], [START, TASK]
    while queue:
        path = queue.pop(0)
        twin = path.replace(".py", "_triton.py")
        for other in [*imported(path), *([twin] if (ROOT / twin).is_file() else [])]:
            if other not in found and not is_elsewhere(other):
                found.append(other)
                queue.append(other)
    return found


def is_elsewhere(path: str) -> bool:
    if path == "handtune/prepare.py":
        return False
    return any(path == place or path.startswith(f"{place}/") for places in ELSEWHERE.values() for place in places)


def imported(path: str) -> Iterator[str]:
    """The files that a file of ours imports by name; what is imported from a package is the package's `__init__`."""
    parts = Path(path).with_suffix("").parts
    inside = parts if parts[0] == "handtune" else ("handtune", *parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = (*inside[: -node.level], *(node.module.split(".") if node.module else ()))
        for alias in node.names:
            for module in ((*base, alias.name), base):
                place = "/".join(module[1:] if len(module) > 1 and (ROOT / module[1]).is_dir() else module)
                if (ROOT / f"{place}.py").is_file():
                    yield f"{place}.py"
                    break
            else:
                yield from exported("/".join(base[1:] if len(base) > 1 else base), alias.name)


def exported(package: str, name: str) -> Iterator[str]:
    """The file in which a name that a package exports is defined."""
    init = ROOT / package / "__init__.py"
    if not init.is_file():
        return
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and any(alias.name == name for alias in node.names):
            yield f"{package}/{node.module.replace('.', '/')}.py"


if __name__ == "__main__":
    main()

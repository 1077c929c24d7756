"""Does a chat model that was fine-tuned here mean to transformers what it means here?

    python benchmarks/chat_model.py MODEL ROWS [--rows 80] [--steps 50] [--out FILE]

MODEL is a chat model (a folder), ROWS a file of prompt/completion or Alpaca rows. Three questions, in fp32:

- Are the losses of the answers' tokens, one by one, those of transformers, which tokenises by its own chat template?
- After some LoRA steps, does an answer end with its turn, here and in transformers, from the merged folder and from
  the adapter's, and are the greedy answers the same?
- The same for a copy of the model whose files say that texts end with another token than turns do, as those of a base
  model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Write one sentence about the moon.",
    "How many days does a week have?",
)
TOKENS = 160  # of an answer, at most


def main() -> None:
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--text-end", default="<|endoftext|>", help="the end of texts in the copy (default <|endoftext|>)"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from handtune.models import load, save

    facts: dict[str, Any] = {"benchmark": "chat_model", **environment(), "model": options.model.name}
    facts |= {"data": options.data.name, "rows": options.rows, "steps": options.steps}
    facts["loss"] = losses(options)
    print(json.dumps(facts["loss"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("as it is", "texts end otherwise"):
            base = Path(folder) / name.replace(" ", "-")
            save(*load(options.model, dtype="float32"), base)  # in bf16 a merge would lose most of so small a change
            if name != "as it is":
                end_texts_with(base, options.text_end)
            facts[name] = fine_tuned(base, options)
            print(name, json.dumps(facts[name], indent=1, ensure_ascii=False), flush=True)
    if options.out:
        options.out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def losses(options: argparse.Namespace) -> dict[str, Any]:
    """Our loss of each target token beside transformers', over the first rows."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from handtune.engine.data.readers import read_rows
    from handtune.engine.data.schema import as_dialogue
    from handtune.engine.tasks.encode import encode
    from handtune.models import load
    from handtune.prompts import template_of

    model, tokenizer = load(options.model, dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    theirs, rows = AutoTokenizer.from_pretrained(options.model), read_rows(options.data)[: options.rows]
    worst, ours_sum, their_sum, tokens = 0.0, 0.0, 0.0, 0
    for row in rows:
        (example,), _ = encode(
            [as_dialogue(row)], tokenizer, "sft", max_length=model.config.max_positions, eos=model.tokens.eos_id,
            template=template_of(model),
        )  # fmt: skip
        targets = torch.tensor(example["targets"])
        with torch.no_grad():
            ours = F.cross_entropy(
                model(torch.tensor([example["input_ids"]]))[0].float(), targets, reduction="none", ignore_index=-100
            )

        # transformers' side: its own rendering and tokens; the answer is what follows the prompt, to the turn's end.
        messages = as_dialogue(row)["messages"]
        prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        whole = theirs.apply_chat_template(messages, return_dict=False)
        stop = len(whole) - whole[::-1].index(theirs.eos_token_id)
        ids = torch.tensor([whole[:stop]])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(prompt) - 1 : -1].float()
        answer = F.cross_entropy(logits, ids[0, len(prompt) :], reduction="none")
        mine = ours[targets >= 0]
        if mine.shape != answer.shape:
            raise SystemExit(f"{len(mine)} targets here, {len(answer)} in transformers: {row['prompt'][:60]!r}")
        worst = max(worst, float((mine - answer).abs().max()))
        ours_sum, their_sum, tokens = ours_sum + float(mine.sum()), their_sum + float(answer.sum()), tokens + len(mine)
    return {
        "tokens": tokens, "ours": ours_sum / tokens, "transformers": their_sum / tokens, "largest difference": worst,
    }  # fmt: skip


def end_texts_with(folder: Path, token: str) -> None:
    """Make `token` the end of texts in all files of a checkpoint."""
    from tokenizers import Tokenizer

    number = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
    for name, change in (
        ("config.json", {"eos_token_id": number}),
        ("generation_config.json", {"eos_token_id": number}),
        ("tokenizer_config.json", {"eos_token": token}),
    ):
        contents = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(contents | change, indent=1), encoding="utf-8")


def fine_tuned(base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train an adapter, merge it, and ask all of them."""
    run, merged = base.with_name(base.name + "-run"), base.with_name(base.name + "-merged")
    (base.parent / "run.toml").write_text(
        f'method = "sft"\nout = "{run}"\n[model]\npath = "{base}"\ndtype = "float32"\n[data]\n'
        f'train = "{options.data}"\nmax_length = 256\n[lora]\nrank = 8\nalpha = 16\n[train]\n'
        f"max_steps = {options.steps}\nbatch_tokens = 256\nlr = 2e-4\n"
    )
    handtune("train", base.parent / "run.toml")
    handtune("merge", base, run / "adapter", merged)

    prompts = base.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    ours = answers_of(run, prompts)
    return {
        "answers": ours,
        "ended, merged": by_transformers(merged, merged, ours),
        "ended, adapter": by_transformers(run / "adapter", run / "adapter", ours),
    }


def handtune(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "handtune", *map(str, arguments)], cwd=ROOT, check=True)


def answers_of(run: Path, prompts: Path) -> list[str]:
    """The run's greedy answers, by the command line."""
    out = run.with_suffix(".jsonl")
    handtune("generate", run, "--prompts", prompts, "--out", out, "--temperature", 0, "--max-new-tokens", TOKENS,
             "--batch-size", 1)  # fmt: skip
    return [json.loads(line)["completion"] for line in out.read_text(encoding="utf-8").splitlines()]


def by_transformers(folder: Path, files: Path, ours: list[str]) -> str:
    """How many of transformers' greedy answers end before the limit with a token of `files`, and are ours."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, settings = AutoTokenizer.from_pretrained(files), GenerationConfig.from_pretrained(files)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    ended = same = 0
    for question, answer in zip(QUESTIONS, ours, strict=True):
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, max_new_tokens=TOKENS, do_sample=False
        )
        new = out[0, ids.shape[1] :].tolist()
        ended += new[-1] in ends
        same += tokenizer.decode(new, skip_special_tokens=True) == answer
    return f"{ended} of {len(ours)} ended, {same} are ours"


def environment() -> dict[str, Any]:
    import platform

    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()

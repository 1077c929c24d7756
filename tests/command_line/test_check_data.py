"""`handtune check-data`: rows as the model will see them, for every method, without the model's weights."""

import re
from pathlib import Path

import pytest
from small_methods import RUNS, base_folder, method_config
from small_runs import CHAT, write_config, write_rows
from small_tokenizers import byte_level

from handtune.cli import main
from handtune.engine.tasks.encode import encode
from handtune.engine.tasks.preferences import SIDES, PairCollate

# What is said of the loss, and the first example, or what it ends with.
SHOWN = {
    "pretrain": ("the loss is on the tokens in [brackets]", "[Answer]|[:]"),
    "sft": ("the loss is on the tokens in [brackets]", "France|?|↵|↵|[Answer]|[:]|[ Paris]|[<|end|>]"),
    "masked-lm": ("the loss is on tokens that are masked anew", "answ|##er|:|paris|[SEP]"),
    "classify": ("the loss is on the label of the whole row", "[CLS]|the|good|morn|##ing|[SEP]"),
    "tag": ("the loss is on the tag of each word", "[look:O]|##ed|[at:O]|[paris:B-PLACE]|[SEP]"),
    "qa": ("the answer is in [brackets]", "the|cat|sat|on|the|[mat]|[SEP]"),
    "embed": ("near its positive", "positive:|[CLS]|what|is|the|cat|?|[SEP]"),
    "reward": ("the scores of both sides, read at their last tokens", "you| are| welcome|[<|end|>]"),
    "dpo": ("the loss is on the answers, in [brackets], of both sides", "[ you]|[ are]|[ welcome]|[<|end|>]"),
    "seq2seq": ("the loss is on the tokens in [brackets]", "writes:|[Answer]|[:]|[Paris]|[</s>]"),
    "span-corruption": ("the loss is on spans of tokens", "A|n|s|w|e"),
}
COUNTED = {
    "classify": "classes: down 12 (50.0 %), up 12 (50.0 %)",
    "tag": "tags: O 16 (61.5 %), B-ANIMAL 4 (15.4 %), B-PLACE 6 (23.1 %)",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Configuration and tokenizer alone."""
    folder = tmp_path_factory.mktemp("bases")
    found = {family: base_folder(family, folder) for family in {family for family, _, _ in RUNS.values()}}
    for base in found.values():
        (base / "model.safetensors").unlink()
    return found


@pytest.mark.parametrize("name", RUNS)
def test_every_method_without_weights(name, bases, tmp_path, capsys) -> None:
    """A legend, how often each class and tag is there, an example; and nothing is left behind."""
    config = method_config(name, tmp_path, bases[RUNS[name][0]])
    before = sorted(tmp_path.rglob("*"))
    assert main(["check-data", str(config), "-n", "1"]) == 0
    told = capsys.readouterr()
    assert sorted(tmp_path.rglob("*")) == before
    if name == "images":
        assert "train: 6 images in 2 classes: sea 3, sky 3" in told.err
        return

    loss, example = SHOWN[name]
    legend, note, last = told.out.splitlines()[-4], told.out.splitlines()[-2], told.out.splitlines()[-1]
    assert legend.startswith("tokens are parted by |, ↵ is a line end, → is a tab; ")
    assert loss in legend
    assert note.startswith(f"example 1 of {2 if 'windows' in told.err else len(RUNS[name][2])}: ")
    assert last.endswith(example)
    for part in ("train", "eval"):
        assert f"{part}: " in told.err
        assert (f"{part} {COUNTED.get(name)}\n" in told.out) == (name in COUNTED)
    assert "example 2 of" not in told.out
    assert main(["train", str(config)]) == 2
    assert "the weights are missing" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_the_marks_of_a_comparison_are_what_is_trained_on(method, bases, tmp_path, capsys) -> None:
    """Of both sides the tokens that DPO's batch has as targets, and the last ones, which a reward model reads."""
    rows = [
        {"prompt": CHAT[0]["prompt"], "chosen": " the cat", "rejected": " the dog and the cat", "margin": 0.5},
        {"prompt": "good morning", "chosen": " capital", "rejected": "", "tie": True},
        {"prompt": "", "chosen": "the cat", "rejected": "a", "tie": True},
    ]
    data = {"train": str(write_rows(tmp_path / "pairs.jsonl", rows)), "max_length": 48}
    assert main(["check-data", str(method_config(method, tmp_path, bases["gpt2"], data=data))]) == 0
    shown = capsys.readouterr().out.splitlines()
    notes = [text for text in shown if text.startswith("example")]
    assert [note.rpartition("; ")[2] for note in notes] == ["margin 0.5", "a tie"]  # the row with an empty side is none

    words = byte_level()
    examples, _ = encode(rows, words, "pairs", max_length=48, eos=0)
    for example, line in zip(examples, [text for text in shown if "rejected:" in text], strict=True):
        batch = PairCollate()([example])
        texts = line.removeprefix("chosen:|").split("|rejected:|")
        for side, targets, text in zip(SIDES, batch["targets"].split(batch["counts"]), texts, strict=True):
            ids = [example[side][-1]] if method == "reward" else targets.tolist()
            marked = [piece[1:-1] for piece in re.findall(r"\[.*?\](?=\||$)", text)]
            assert marked == [words.decode([token], skip_special_tokens=False) for token in ids]


def test_nothing_is_computed_by_the_model(bases, tmp_path, capsys) -> None:
    """Tokens that are added are there, 4 bits need no weights, and a preset none either; what is wrong is refused."""
    model = {"path": str(bases["gpt2"]), "add_tokens": ["<|tool|>"], "quantize": "nf4", "recompute": True}
    data = {"train": str(write_rows(tmp_path / "tools.jsonl", [{"prompt": "the ", "completion": "cat<|tool|>"}]))}
    config = method_config("sft", tmp_path, bases["gpt2"], model=model, data=data, lora={"rank": 2})
    assert main(["check-data", str(config)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("|[at]|[<|tool|>]|[<|end|>]")
    assert main(["check-data", str(config), "data.max_length=100"]) == 2
    assert "exceeds the model's 64 positions" in capsys.readouterr().err

    byte_level().save(str(tmp_path / "tokenizer.json"))
    preset = {"preset": "Llama-3.1-8B", "tokenizer": str(tmp_path / "tokenizer.json")}  # 32 GB in fp32
    config = write_config(tmp_path / "new.toml", method="sft", out="run", model=preset, data=data)
    assert main(["check-data", str(config), "data.max_length=64"]) == 0

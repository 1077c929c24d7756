"""One flipped bit in what a run or a session has stored is noticed; a damaged line is named, and kept beside."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_lines import ROWS, line
from small_tokenizers import byte_level

from handtune.comparison.session import Item, Session, make_items
from handtune.engine import load_checkpoint, save_checkpoint
from handtune.engine.data.corpus import token_corpus
from handtune.engine.training.checkpoint import checkpoints
from handtune.engine.training.run_folder import finished, read_facts, read_result
from handtune.reporting.side_by_side import comparison_table


def flips(path: Path, count: int | None) -> Iterator[tuple[int, int]]:
    """The file with one bit changed, one after another: all bits, or some at random; at last as it was."""
    data = path.read_bytes()
    bits = [(at, bit) for at in range(len(data)) for bit in range(8)]
    for at, bit in bits if count is None else random.Random(0).sample(bits, min(count, len(bits))):
        changed = bytearray(data)
        changed[at] ^= 1 << bit
        path.write_bytes(changed)
        yield at, bit
    path.write_bytes(data)


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path) -> None:
    path = tmp_path / "step-00000002"
    tensors = {"weight": torch.arange(40.0), "n": torch.tensor(7)}
    save_checkpoint(tmp_path / "step-00000001", tensors, {})
    save_checkpoint(path, tensors, {"step": 2, "loss": 0.1})
    for name in ("tensors.safetensors", "state.json", "SHA256SUMS"):
        for at, bit in flips(path / name, 100):
            with pytest.raises(
                ValueError, match=r"damaged \((tensors\.safetensors|state\.json) has not the checksum"
            ) as error:
                load_checkpoint(path)
            assert str(error.value).endswith("remove it, and the run goes on from step-00000001"), (name, at, bit)
    sums = (path / "SHA256SUMS").read_bytes()
    for more in (b"\n", b"0" * 64 + b"  other\n"):
        (path / "SHA256SUMS").write_bytes(sums + more)
        with pytest.raises(ValueError, match=r"damaged \(SHA256SUMS holds more than the checksums of .*json\); remove"):
            load_checkpoint(path)
    (path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"step-00000002: the checkpoint is damaged \(SHA256SUMS is missing\)"):
        load_checkpoint(path)


def test_a_run_does_not_go_on_from_a_damaged_checkpoint(tmp_path) -> None:
    """Nor does it end with damaged best weights."""
    out = tmp_path / "run"
    line(epochs=2, save_every=5, keep_last=2, run_dir=out, eval_data=ROWS, best="loss")
    newest = checkpoints(out / "checkpoints")[-1]
    for path, remedy in ((newest, "goes on from step-00000005"), (out / "best", "restore it from a copy")):
        for _ in flips(path / "tensors.safetensors", 1):
            with pytest.raises(ValueError, match=rf"{path.name}: the checkpoint is damaged .*{remedy}"):
                line(epochs=2, save_every=5, keep_last=2, run_dir=out, eval_data=ROWS, best="loss")


def test_every_flipped_bit_of_a_token_cache_is_noticed(tmp_path) -> None:
    text = "the cat sat on the mat\n" * 20
    expected = token_corpus([text], byte_level(), tmp_path, 10, 0).tokens.tolist()
    for name in (".bin", ".json"):
        (path,) = tmp_path.glob(f"*{name}")
        data = path.read_bytes()
        for at, bit in flips(path, 30):
            assert token_corpus([text], byte_level(), tmp_path, 10, 0).tokens.tolist() == expected
            assert path.read_bytes() == data, (name, at, bit)  # it was made again


def test_a_damaged_line_of_the_log_is_named_and_kept_aside(tmp_path, caplog) -> None:
    """In its middle, where no kill cuts; what stands behind it stays. A last one cut short is as if never begun."""
    out = tmp_path / "run"
    line(epochs=2, save_every=5, run_dir=out)
    path, aside = out / "metrics.jsonl", out / "metrics.damaged.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    broken = [lines[2].replace(b'"step": 3', b'"step": "3"'), lines[5][:9] + b"\xff" + lines[5][10:]]
    text = b"".join([*lines[:2], broken[0], *lines[3:5], broken[1], *lines[6:], b'{"step": 11, "lo'])
    path.write_bytes(text)

    assert "run" in comparison_table([out])  # which changes nothing, but says so
    assert path.read_bytes() == text
    assert f"{path} line 3, 6: damaged, left out" in caplog.text
    with pytest.raises(ValueError, match="holds a run with"):  # a run that has begun, whatever its log says
        line(epochs=2, lr=0.2, save_every=5, run_dir=out)

    caplog.clear()
    line(epochs=2, save_every=5, run_dir=out)
    assert caplog.messages == [f"{path} line 3, 6: damaged, moved to {aside}"]
    assert path.read_bytes() == b"".join([*lines[:2], *lines[3:5], *lines[6:]])
    assert aside.read_bytes() == b"".join(broken)
    path.write_bytes(b"null\n" + path.read_bytes())
    line(epochs=2, save_every=5, run_dir=out)
    assert aside.read_bytes() == b"".join([*broken, b"null\n"])


def session(folder: Path) -> Session:
    begun = Session(folder, make_items([(f"prompt {i}", f"good {i}", f"bad {i}") for i in range(4)], repeat=0)[0])
    for item, answer in enumerate(("right", "left", "tie")):
        begun.answer(item, answer)
    return begun


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"right"', b'"rigit"'), (b'"right"', b'"left"'), (b'"right"', b'null'), (b'"item": 0', b'"item": 3'),
        (b'"item": 0', b'"item": 9'), (b'"item": 0', b'"item": 0.0'), (b'"answer"', b'"answes"'), (b"{", b"\xff"),
        (b"{", b'{"item": 3, '),
    ],
)  # fmt: skip
def test_a_damaged_answer_is_none(before, after, tmp_path, caplog) -> None:
    """It is not read as the opposite one, nor as one about another item: it is named, kept aside and asked again."""
    session(tmp_path / "s")
    path = tmp_path / "s/answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[0] = lines[0].replace(before, after, 1)
    path.write_bytes(b"".join(lines) + b'{"item": 3, "ans')
    again = Session(tmp_path / "s")
    assert again.answers == {1: "left", 2: "tie"}
    with again.alone():
        assert again.next() == again.items[0]
        assert again.answer(0, "right")
    aside = tmp_path / "s/answers.damaged.jsonl"
    assert f"{path} line 1: damaged, moved to {aside}" in caplog.text
    assert aside.read_bytes() == lines[0]
    assert len(path.read_bytes().splitlines()) == 3
    assert Session(tmp_path / "s").answers == {1: "left", 2: "tie", 0: "right"}


def test_a_flipped_bit_gives_no_other_answers(tmp_path) -> None:
    begun = session(tmp_path / "s")
    answers, items = tmp_path / "s/answers.jsonl", tmp_path / "s/items.jsonl"
    for at, bit in flips(answers, 120):
        found = Session(tmp_path / "s").answers
        assert found.items() < begun.answers.items() or answers.read_bytes()[at : at + 1].isspace(), (at, bit)
    for at, bit in flips(items, 120):
        with pytest.raises(ValueError, match=r"items\.jsonl line \d: damaged; restore the file"):
            Session(tmp_path / "s")
            pytest.fail(f"byte {at}, bit {bit}")
    items.write_bytes(b"".join(items.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"items\.jsonl: a line is missing"):
        Session(tmp_path / "s")
    assert isinstance(begun.items[0], Item)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("run.json", "config", []), ("run.json", "inputs", [1]), ("run.json", "inputs", {"data.train": [{"path": 3}]}),
        ("run.json", "labels", "up"), ("run.json", "versions", "2.13"), ("result.json", "best", [1]),
        ("result.json", "best", {"step": "4", "metric": "loss", "value": 1.0}), ("result.json", "steps", "many"),
        ("result.json", "stored_bytes", "3 MB"), ("result.json", "seconds", [2]),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_named(name, field, value, tmp_path) -> None:
    line(run_dir=tmp_path / "run")
    path = tmp_path / "run" / name
    facts = json.loads(path.read_text()) if path.exists() else {"best": {}, "steps": 5, "stored_bytes": 9}
    path.write_text(json.dumps(facts | {field: value}))
    reader = read_facts if name == "run.json" else read_result
    with pytest.raises(
        ValueError, match=rf"{name}: (inputs\.data\.train is damaged|(best: step|{field}): expected .*); restore"
    ):
        reader(path)
    with pytest.raises(ValueError, match=name):
        comparison_table([tmp_path / "run"])
    known = read_facts(tmp_path / "run/run.json") if name != "run.json" else None
    with pytest.raises(ValueError, match=name):
        finished(tmp_path / "run", known["config"] if known else {}, known["inputs"] if known else {})

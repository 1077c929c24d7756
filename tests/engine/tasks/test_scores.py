"""Scores of an evaluation count all gold: what encoding cuts or drops has no prediction, and is wrong."""

import json

import pytest
import torch
import torch.nn.functional as F
from small_runs import bert_folder, examples, write_config, write_rows
from small_tokenizers import byte_level, word_piece

from handtune.cli import main
from handtune.engine import evaluate
from handtune.engine.data.batches import Batches, Collate
from handtune.engine.tasks.embedding import EmbeddingCollate, candidates, embedding_loss
from handtune.engine.tasks.encode import encode
from handtune.engine.tasks.objectives import OBJECTIVES
from handtune.engine.tasks.preferences import PairCollate, reward_loss

TAGS = ("O", "B-ANIMAL", "I-ANIMAL", "B-PLACE")


class Perfect(torch.nn.Module):
    """A model whose head knows each example's answer: the field `name` of the example, one of `n` classes."""

    def __init__(self, encoded: list[dict], name: str, n: int):
        super().__init__()
        self.weight, self.encoded, self.name, self.n = torch.nn.Parameter(torch.zeros(1)), iter(encoded), name, n

    def hidden(self, input_ids, **others):
        return input_ids[..., None].float()

    def pool(self, states, ids, mask, bounds):
        return states

    def head(self, states: torch.Tensor) -> torch.Tensor:
        answer = torch.tensor(next(self.encoded)[self.name]).flatten()
        return 10.0 * F.one_hot(answer[answer >= 0], self.n).float()


def perfect_scores(method: str, rows: list[dict], labels: tuple[str, ...], name: str, max_length: int) -> dict:
    """What a perfect model earns on rows of which it sees `max_length` tokens."""
    encoded = examples(rows, method, labels, max_length=max_length, evaluation=True)
    objective, batches = OBJECTIVES[method], Batches(encoded, Collate(), rows=1, shuffle=False)
    model = Perfect(encoded, name, len(labels))
    return evaluate(model, batches, objective.loss, objective.score(labels, encoded, rows))


def test_words_behind_max_length_are_missed() -> None:
    rows = [
        {"tokens": ["the", "cat", "dog", "sat", "book"], "tags": ["O", "B-ANIMAL", "I-ANIMAL", "O", "B-PLACE"]},
        {"tokens": ["Paris", "\u200b", "cat"], "tags": ["B-PLACE", "O", "B-ANIMAL"]},
        {"tokens": ["\u200b"], "tags": ["B-PLACE"]},  # a word of no token: the row has no example
    ]
    whole = perfect_scores("tag", rows[:1], TAGS, "targets", 64)
    assert whole["f1"] == whole["token_accuracy"] == 1.0
    # [CLS] the cat [SEP] and [CLS] Paris cat [SEP]: the first entity is cut in two
    cut = perfect_scores("tag", rows, TAGS, "targets", 4)
    assert (cut["precision"], cut["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 5))
    assert cut["f1"] == pytest.approx(2 * 2 / (3 + 5))
    assert cut["token_accuracy"] == pytest.approx(4 / 9)
    assert cut["loss"] < 1e-3  # a mean over what the model sees


def test_rows_without_text_are_classified_wrongly() -> None:
    rows = [{"text": text, "label": label} for text, label in (("cat", "a"), ("", "a"), ("dog", "b"), ("\u200b", "b"))]
    found = perfect_scores("classify", rows, ("a", "b"), "label", 64)
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx(2 / 3)  # of each class 1 right, 1 missed
    assert found["confusion"] == [[1, 0, 1], [0, 1, 1]]
    assert perfect_scores("classify", rows[::2], ("a", "b"), "label", 64)["confusion"] == [[1, 0], [0, 1]]


def test_a_perfect_retrieval_of_some_rows() -> None:
    """Rows that are dropped are not found; twins of the positive and other answers to the anchor are not wrong."""
    texts = [("the cat", "mat"), ("the dog", "mat"), ("the cat", "book"), ("", "Paris"), ("mat", "the dog")]
    rows = [{"anchor": anchor, "positive": positive} for anchor, positive in texts]
    encoded = examples(rows, "embed", evaluation=True)
    score = OBJECTIVES["embed"].score((), encoded, rows)
    vectors = dict.fromkeys(("the cat", "mat", "book"), torch.tensor([1.0, 0.0])) | {
        "the dog": torch.tensor([0.9, 0.1])
    }
    known = {tuple(word_piece().encode(text).ids): vector for text, vector in vectors.items()}

    class Known(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = torch.nn.Parameter(torch.zeros(1)), torch.nn.Identity()

        def hidden(self, input_ids, cu_seqlens, **others):
            rows = input_ids[0].split(cu_seqlens.diff().tolist())
            return torch.stack([known[tuple(row.tolist())] for row in rows])

        def pool(self, states, ids, mask, bounds):
            return states

    found = evaluate(Known(), Batches(encoded, EmbeddingCollate(), rows=2, shuffle=False), embedding_loss, score)
    # The cat: mat and book are level, and both are right. The dog: its mat is level with a wrong book. The mat: the dog
    # comes after a wrong book, and after the mat itself, which doesn't count.
    assert found["accuracy@1"] == pytest.approx((1 + 0.5 + 1 + 0 + 0) / 5)
    assert found["mrr"] == pytest.approx((1 + (1 + 1 / 2) / 2 + 1 + 0 + 1 / 2) / 5)


def test_candidates_by_hand() -> None:
    anchors, positives = ["q1", "q2", "q1", "p1"], ["p1", "p1", "p2", "q1"]
    found = candidates(anchors, positives, ["n", "p1", "n", "p2"])
    assert found.first == [0, 2, 3, 4]  # p1, p2, q1, n
    assert found.target == [0, 0, 1, 2]
    assert found.also_right == [[1, 2], [], [0, 2], [0]]


def test_comparisons_that_the_model_cannot_tell_apart() -> None:
    """Cut to the same tokens they are half right; ties count for nothing, as ever."""
    cut = {"prompt": "cat", "chosen": " sat on the mat", "rejected": " sat on the book"}
    rows = [{"prompt": "cat", "chosen": " sat", "rejected": " dog"}, cut, {**cut, "tie": True}]
    encoded, _ = encode(rows, byte_level(), "pairs", max_length=3, eos=0, evaluation=True)
    assert [example["row"] for example in encoded] == [0]
    score = OBJECTIVES["reward"].score((), encoded, rows)
    score.compare = lambda model, batch: torch.tensor([2.0])
    model = torch.nn.Linear(1, 1)
    found = evaluate(model, Batches(encoded, PairCollate(), rows=2, shuffle=False), reward_loss, score)
    assert found["accuracy"] == pytest.approx((1 + 0.5) / 2)


def test_a_score_needs_to_know_the_rows() -> None:
    with pytest.raises(ValueError, match="evaluation=True"):
        OBJECTIVES["classify"].score(("a",), [{"input_ids": [1], "label": 0}], [{"text": "cat", "label": "a"}])


def test_from_the_command_line(tmp_path, capsys) -> None:
    """Training on numbers, evaluation on a table that writes them otherwise, with rows without text."""
    train = [{"text": "cat", "label": 0}, {"text": "dog", "label": 1.0}]
    table = tmp_path / "eval.csv"
    table.write_text("text,label\ncat,0.0\ndog,1e0\n,1.00\n,0\n", encoding="utf-8")
    config = write_config(
        tmp_path / "run.toml", method="classify", out=str(tmp_path / "run"),
        model={"path": str(bert_folder(tmp_path / "bert"))},
        data={"train": str(write_rows(tmp_path / "train.jsonl", train)), "eval": str(table), "max_length": 8},
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] <= 0.5
    assert [(sum(row), row[2]) for row in found["confusion"]] == [(2, 1), (2, 1)]

"""Losses: each against the formula written out, sums that can be added, and the scores of an evaluation."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_runs import CHAT, PAIRS, QUESTIONS, SENTIMENT, TAGGED, bert, examples, gpt2
from small_tokenizers import word_piece
from tokenizers import Tokenizer, models

from handtune.engine import evaluate
from handtune.engine.data.batches import Batches, Collate
from handtune.engine.data.readers import label_names
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.classification import classification_loss
from handtune.engine.tasks.embedding import (
    EmbeddingCollate,
    RetrievalScore,
    embedding_loss,
    embedding_loss_of,
    embeddings,
    step_embedding_loss,
)
from handtune.engine.tasks.encode import encode
from handtune.engine.tasks.masked_lm import MaskedCollate, masked_lm_loss, masked_rows
from handtune.engine.tasks.objectives import METHODS, OBJECTIVES
from handtune.engine.tasks.question_answering import AnswerScore, best_span, qa_loss
from handtune.engine.tasks.tagging import TaggingScore, tagging_loss
from handtune.models.tokenizer.special_tokens import SpecialTokens

TAGS = ("O", "B-ANIMAL", "B-PLACE")


def case(name: str):
    """A model, encoded examples, the loss function and a collate function for the method."""
    if name == "sft":
        return gpt2(), examples(CHAT, "sft"), causal_lm_loss
    if name == "classify":
        return bert(labels=("down", "up")), examples(SENTIMENT, "classify", ["down", "up"]), classification_loss
    if name == "tag":
        return bert("token-classification", TAGS), examples(TAGGED, "tag", TAGS), tagging_loss
    if name == "qa":
        return bert("question-answering"), examples(QUESTIONS, "qa"), qa_loss
    assert name == "embed"
    return bert("embedding"), examples(PAIRS, "embed"), step_embedding_loss


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["sft", "classify", "tag", "qa"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_batch_is_the_sum_of_its_rows(name, layout) -> None:
    """Packed or padded, the loss, its count and its gradient are those of the rows one by one: nothing leaks."""
    model, rows, loss_fn = case(name)
    rows = rows[:6]
    loss, count = loss_fn(model, Collate(layout)(rows))
    together = gradients(model, loss)
    alone = [loss_fn(model, Collate(layout)([row])) for row in rows]
    assert count == sum(n for _, n in alone) > 0
    total = sum(value for value, _ in alone)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for key, gradient in gradients(model, total).items():
        assert (together[key] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, key


def test_causal_lm_is_cross_entropy_of_the_next_token() -> None:
    model, rows, _ = case("sft")
    for row in rows:
        loss, count = causal_lm_loss(model, Collate()([row]))
        logits = model(torch.tensor([row["input_ids"]]))[0]
        targets = torch.tensor(row["targets"])
        assert count == int((targets >= 0).sum())
        assert loss.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5)


def test_masked_lm_reads_only_the_masked_positions() -> None:
    model = bert("masked-lm")
    rows = examples([{"text": row["text"]} for row in SENTIMENT], "masked-lm")
    torch.manual_seed(1)
    batch = MaskedCollate(4, 100, (0, 2, 3))(rows[:5])
    loss, count = masked_lm_loss(model, batch)
    logits = model(**batch["inputs"])[0, batch["index"]]
    assert count == len(batch["index"])
    assert loss.item() == pytest.approx(F.cross_entropy(logits, batch["targets"], reduction="sum").item(), rel=1e-5)


def test_question_answering_is_the_mean_of_start_and_end() -> None:
    model, rows, _ = case("qa")
    row = rows[0]
    loss, count = qa_loss(model, Collate()([row]))
    start, end = model(torch.tensor([row["input_ids"]]), token_type_ids=torch.tensor([row["token_type_ids"]]))[0].T
    expected = -(start.log_softmax(0)[row["start"]] + end.log_softmax(0)[row["end"]]) / 2
    assert (count, loss.item()) == (1, pytest.approx(expected.item(), rel=1e-5))


def test_embedding_loss_is_info_nce() -> None:
    anchors, others = torch.randn(3, 8), torch.randn(5, 8)
    batch = {"targets": torch.arange(3), "also_right": torch.zeros(3, 5, dtype=torch.bool)}
    loss, count = embedding_loss_of(anchors, others, batch)
    expected = 0.0
    for i in range(3):
        scores = [F.cosine_similarity(anchors[i], others[j], dim=0).item() / 0.05 for j in range(5)]
        expected += math.log(sum(math.exp(s) for s in scores)) - scores[i]
    assert (count, loss.item()) == (3, pytest.approx(expected, rel=1e-4))
    model, rows, loss_fn = case("embed")
    for row in rows:
        row["negative"] = row["anchor"]
    found, others = embeddings(model, EmbeddingCollate()(rows))
    assert (found.shape, others.shape) == ((6, 32), (12, 32))
    torch.testing.assert_close(found, others[6:])
    assert loss_fn(model, EmbeddingCollate()(rows))[1] == 6


def test_twins_do_not_repel_each_other() -> None:
    """A row's answer in another row is no wrong answer: the loss of right embeddings goes to 0, without a gradient."""
    model = Lookup(torch.eye(4)[[0, 1, 2, 2, 3]] * 3)
    rows = pairs_of((0, 0, 4), (0, 0, 4), (1, 1, 0), (2, 3, 3))  # two twins; a negative that is its row's positive
    loss, count = embedding_loss(model, EmbeddingCollate()(rows))
    assert (count, loss.item()) == (4, pytest.approx(0.0, abs=1e-6))
    torch.testing.assert_close(gradients(model, loss)["weight"], torch.zeros(5, 4), atol=1e-6, rtol=0)
    # Without the twin's row, which adds what the first one does, nothing else changes.
    vectors = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    first, together = (embedding_loss(Lookup(vectors), EmbeddingCollate()(part))[0] for part in (rows[1:], rows))
    twin = embedding_loss(Lookup(vectors), EmbeddingCollate()([rows[0], *rows[2:]]))[0]
    one = F.cross_entropy(F.cosine_similarity(vectors[:1], vectors[[0, 1, 3, 4]])[None] / 0.05, torch.tensor([0]))
    assert first.item() == pytest.approx(twin.item(), rel=1e-5)
    assert together.item() - first.item() == pytest.approx(one.item(), abs=1e-4)


def test_evaluation_is_one_mean_over_all_targets() -> None:
    """Not a mean of the batches' means, and the same however the rows are cut."""
    model, rows, loss_fn = case("sft")
    assert len({sum(t >= 0 for t in row["targets"]) for row in rows}) > 2
    parts = [loss_fn(model, Collate()([row])) for row in rows]
    expected = sum(loss.item() for loss, _ in parts) / sum(n for _, n in parts)
    for cut in (1, 2, 3, 4):
        found = evaluate(model, Batches(rows, Collate(), rows=cut, shuffle=False), loss_fn)
        assert found == {"loss": pytest.approx(expected, rel=1e-5)}


def test_evaluation_leaves_model_and_generator_alone() -> None:
    model = bert("masked-lm").train()
    rows = examples([{"text": row["text"]} for row in SENTIMENT], "masked-lm")
    data = Batches(rows, MaskedCollate(4, 100, (0, 2, 3)), rows=4, shuffle=False)
    state = torch.get_rng_state()
    first = evaluate(model, data, masked_lm_loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    torch.rand(5)
    assert evaluate(model, data, masked_lm_loss) == first  # the noise is the same each time
    with pytest.raises(ValueError, match="nothing was left after masking"):
        evaluate(model, [], masked_lm_loss)


@pytest.mark.parametrize(
    ("name", "known"),
    [("sft", {"perplexity"}), ("classify", {"accuracy"}), ("tag", {"f1"}), ("qa", {"f1"}), ("embed", {"accuracy@1"})],
)
def test_scores_give_the_loss_and_the_metrics(name, known) -> None:
    model, rows, loss_fn = case(name)
    labels = {"classify": ("down", "up"), "tag": TAGS}.get(name, ())
    objective = OBJECTIVES[name]
    assert objective.loss is loss_fn
    texts = {"sft": CHAT, "classify": SENTIMENT, "tag": TAGGED, "qa": QUESTIONS, "embed": PAIRS}[name]
    rows = examples(texts, name, labels or None, evaluation=True)
    collate = EmbeddingCollate() if name == "embed" else Collate()
    data = Batches(rows, collate, rows=3, shuffle=False)
    found = evaluate(model, data, loss_fn, objective.score(labels, rows, texts))
    assert known | {"loss"} <= found.keys()
    assert found["loss"] == pytest.approx(evaluate(model, data, loss_fn)["loss"], rel=1e-5)
    assert objective.best in found
    if name == "sft":
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-6)


class Oracle(torch.nn.Module):
    """A model that knows the answers: its head's outputs are given."""

    def __init__(self, logits: list[torch.Tensor]):
        super().__init__()
        self.logits, self.weight = iter(logits), torch.nn.Parameter(torch.zeros(1))

    def head(self, states: torch.Tensor) -> torch.Tensor:
        return next(self.logits)


def test_tagging_score_of_an_oracle() -> None:
    rows = examples(TAGGED, "tag", TAGS, evaluation=True)
    targets = [torch.tensor([t for t in row["targets"] if t >= 0]) for row in rows]
    assert [len(t) for t in targets] == [len(row["tags"]) for row in TAGGED]
    right = Oracle([10.0 * F.one_hot(t, 3).float() for t in targets])
    batch = [Collate()([row]) for row in rows]
    for one in batch:
        one["features"] = torch.zeros(1, len(one["inputs"]["input_ids"][0]), 4)
    found = evaluate(right, batch, tagging_loss, TaggingScore(TAGS, rows, TAGGED))
    assert found["f1"] == found["token_accuracy"] == 1.0
    assert found["loss"] < 1e-3


def test_answers_of_an_oracle_are_the_gold_texts() -> None:
    rows = examples(QUESTIONS, "qa")
    logits = [torch.full((1, len(row["input_ids"]), 2), -5.0) for row in rows]
    for row, table in zip(rows, logits, strict=True):
        table[0, row["start"], 0] = table[0, row["end"], 1] = 5.0
        table[0, 0] = 9.0  # no span of the question or [CLS] can win
    batch = [Collate()([row]) for row in rows]
    for one in batch:
        one["features"] = torch.zeros(1, 1)
    found = evaluate(Oracle(logits), batch, qa_loss, AnswerScore((), rows, QUESTIONS))
    assert found["exact_match"] == found["f1"] == 1.0


def test_best_span_ends_after_it_begins_and_is_short() -> None:
    words = [f"w{i}" for i in range(50)]
    context = " ".join(words)
    offsets = [None, None]
    for i, word in enumerate(words):
        begin = len(" ".join(words[:i])) + (i > 0)
        offsets.append((begin, begin + len(word)))
    logits = torch.full((52, 2), -1.0).numpy()
    logits[30, 0], logits[10, 1] = 9.0, 8.0  # the end before the beginning
    logits[31, 1] = 4.0
    span = best_span(logits, offsets)
    assert (span.score, context[span.start : span.end]) == (13.0, "w28 w29")
    logits[31, 1], logits[5, 0], logits[51, 1] = -1.0, 20.0, 20.0  # 47 tokens apart
    span = best_span(logits, offsets)
    assert (span.score, context[span.start : span.end]) == (29.0, " ".join(words[28:]))
    assert best_span(logits[:2], offsets[:2]) == (-math.inf, 0, 0)


class Lookup(torch.nn.Module):
    """An embedding model: of a text the vector with the number of its first token."""

    task = "embedding"

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.weight, self.head = torch.nn.Parameter(vectors), torch.nn.Identity()

    def hidden(self, input_ids, cu_seqlens, **others):
        return self.weight[input_ids[0, cu_seqlens[:-1].long()]]

    def pool(self, states, ids, mask, bounds):
        return states


def pairs_of(*texts: tuple[int, ...]) -> list[dict]:
    """Examples of one token a text: anchor, positive and, where there is one, negative; and the number of their row."""
    names = ("anchor", "positive", "negative")
    rows = [{name: [token] for name, token in zip(names, row, strict=False)} for row in texts]
    return [row | {"row": i} for i, row in enumerate(rows)]


def test_retrieval_ranks_over_all_batches() -> None:
    """Positives of other batches count as wrong answers too."""
    anchors = torch.eye(4)
    crossed = anchors[[0, 1, 3, 2]] + 0.3 * anchors  # of the last two, each is nearer to the other's positive
    rows = pairs_of((0, 4), (1, 5), (2, 6), (3, 7))
    texts = [{"anchor": f"question {i}", "positive": f"answer {i}"} for i in range(4)]
    model, data = Lookup(torch.cat([anchors, crossed])), Batches(rows, EmbeddingCollate(), rows=2, shuffle=False)
    found = evaluate(model, data, embedding_loss, RetrievalScore((), rows, texts))
    assert found["accuracy@1"] == 0.5
    assert found["mrr"] == pytest.approx(0.75)


def test_every_method_is_described() -> None:
    assert sorted(METHODS) == ["classify", "dpo", "embed", "masked-lm", "pretrain", "qa", "reward", "sft", "tag"]
    assert set(METHODS) <= set(OBJECTIVES)
    assert label_names(TAGGED)[0] == "O"
    assert word_piece().token_to_id("[MASK]") == 4


UNANSWERABLE = {**QUESTIONS[0], "answers": {"text": [], "answer_start": []}}


def answer_score(rows, tables, encoded=None):
    """Score logits (T, 2), one for each window; gives the score and what it came to."""
    encoded = examples(rows, "qa") if encoded is None else encoded
    batch = [Collate()([row]) for row in encoded]
    for one in batch:
        one["features"] = torch.zeros(1, 1)
    score = AnswerScore((), encoded, rows)
    return score, evaluate(Oracle([table[None] for table in tables]), batch, qa_loss, score)


def tables_of(encoded) -> list[torch.Tensor]:
    """What training teaches: start and end of the answer, or position 0."""
    tables = [torch.full((len(row["input_ids"]), 2), -5.0) for row in encoded]
    for row, table in zip(encoded, tables, strict=True):
        table[max(0, row["start"]), 0] = table[max(0, row["end"]), 1] = 5.0
    return tables


def test_unanswerable_questions_can_be_right() -> None:
    rows = [UNANSWERABLE, *QUESTIONS, UNANSWERABLE]
    tables = tables_of(examples(rows, "qa"))
    score, found = answer_score(rows, tables)
    assert found["exact_match"] == found["f1"] == 1.0
    assert [score.answer(i) for i in range(3)] == ["", "mat", "book"]
    tables[-1][-2] = 6.0  # a span that beats it
    assert answer_score(rows, tables)[1]["exact_match"] == pytest.approx(5 / 6)


def test_no_answer_needs_all_windows_of_the_question() -> None:
    """Two windows, in both of which [CLS] (10 and 6, then 10 and 2) is to be higher than the best span (4)."""
    (one,) = examples([UNANSWERABLE], "qa")
    rows = [UNANSWERABLE]
    tables = [torch.full((len(one["input_ids"]), 2), -5.0) for _ in range(2)]
    tables[0][0] = tables[1][0] = 5.0
    assert answer_score(rows, tables, [one, one])[0].answer(0) == ""
    tables[1][0], tables[1][-2] = 3.0, 2.0
    assert answer_score(rows, tables, [one, one])[0].answer(0) == ""
    tables[1][0] = 1.0
    assert answer_score(rows, tables, [one, one])[0].answer(0) == "mat"


def test_questions_whose_answer_no_window_holds_count() -> None:
    """In an evaluation they stay, without loss, and can be right or wrong; a context without words is answered ""."""
    lost = {**QUESTIONS[0], "answers": {"text": [" "], "answer_start": [3]}}
    empty = {**UNANSWERABLE, "context": ""}
    rows = [lost, *QUESTIONS]
    assert len(examples(rows, "qa")) == 4
    encoded, report = encode(rows, word_piece(), "qa", max_length=64, evaluation=True)
    assert (len(encoded), report.n_kept, len(report.dropped), report.targets) == (5, 5, 0, 4)
    assert (encoded[0]["start"], encoded[0]["end"]) == (-100, -100)
    tables = tables_of(encoded)
    tables[0][-2] = 6.0  # the last word of the context, which " " is not
    _, found = answer_score(rows, tables, encoded)
    assert found["exact_match"] == pytest.approx(4 / 5)
    assert found["loss"] == pytest.approx(answer_score(QUESTIONS, tables[1:])[1]["loss"])
    assert answer_score([*QUESTIONS, empty], tables[1:], examples(QUESTIONS, "qa"))[1]["exact_match"] == 1.0
    assert answer_score([*QUESTIONS, QUESTIONS[0]], tables[1:], examples(QUESTIONS, "qa"))[1]["exact_match"] == 0.8


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("<mask>", {"mask_token": "<mask>"}, 2),
        ("<mask>", {}, 2),
        ("[MASK]", {"mask_token": "[MASK]"}, 2),
        ("<m>", {}, None),
    ],
)
def test_the_mask_token_is_the_tokenizer_s(text, names, expected) -> None:
    """RoBERTa's is another than BERT's."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, text: 2}, unk_token="a"))
    model = SimpleNamespace(tokens=SpecialTokens(names=names))
    if expected is None:
        with pytest.raises(ValueError, match=r"a mask token \(\[MASK\] or <mask>\), and this one has none"):
            masked_rows(model, words, True)
    else:
        assert masked_rows(model, words, True).mask_id == expected

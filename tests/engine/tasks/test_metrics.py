"""Scores: worked examples with known answers, and brute-force definitions on random input."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from nltk.stem.porter import PorterStemmer
from project import ROOT
from rouge_score.tokenizers import DefaultTokenizer

from handtune.engine.tasks.classification import classification
from handtune.engine.tasks.embedding import retrieval
from handtune.engine.tasks.metrics import WordTokenizer, perplexity, rouge
from handtune.engine.tasks.question_answering import answers
from handtune.engine.tasks.tagging import entity_f1

# classification


def test_classification_worked_example():
    # gold 0: 2 of 3 right; gold 1: 1 of 2; gold 2: 0 of 1. F1: 0.8, 0.5, 0
    got = classification([0, 0, 1, 1, 2, 1], [0, 0, 0, 1, 1, 2], 3)
    assert got["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 1, 0]]
    assert got["accuracy"] == pytest.approx(3 / 6)
    assert got["macro_f1"] == pytest.approx((4 / 5 + 2 / 5 + 0) / 3)


def test_macro_f1_leaves_out_only_classes_that_never_occur():
    assert classification([0, 1], [0, 1], 5)["macro_f1"] == 1.0
    # class 2 is predicted but never gold: it counts, with F1 0
    assert classification([0, 2], [0, 0], 5)["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_rows_without_prediction_are_wrong():
    got = classification([0, -1, 1, -1], [0, 0, 1, 1], 2)
    assert (got["accuracy"], got["macro_f1"]) == (0.5, pytest.approx(2 / 3))
    assert got["confusion"] == [[1, 0, 1], [0, 1, 1]]
    assert classification([-1, 0], [1, 0], 3)["macro_f1"] == pytest.approx((1 + 0) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_classification_brute_force(seed):
    rng = np.random.default_rng(seed)
    n_classes = int(rng.integers(2, 9))
    gold, predicted = rng.integers(0, n_classes, 40), rng.integers(0, n_classes, 40)
    scores = []
    for c in set(gold.tolist()) | set(predicted.tolist()):
        tp = sum(1 for g, p in zip(gold, predicted, strict=True) if g == c and p == c)
        precision = tp / max(1, sum(1 for p in predicted if p == c))
        recall = tp / max(1, sum(1 for g in gold if g == c))
        scores.append(0.0 if tp == 0 else 2 * precision * recall / (precision + recall))
    got = classification(predicted, gold, n_classes)
    assert got["macro_f1"] == pytest.approx(sum(scores) / len(scores))
    assert got["accuracy"] == pytest.approx(sum(gold == predicted) / 40)
    for g, p in itertools.product(range(n_classes), repeat=2):
        assert got["confusion"][g][p] == sum((gold == g) & (predicted == p))
    json.dumps(got)


@pytest.mark.parametrize(
    ("predictions", "labels", "says"),
    [
        ([0, 3], [0, 1], r"predictions\[1\] is 3"),
        ([0, 1], [0, -1], r"labels\[1\] is -1"),
        ([0], [0, 1], "1 predictions for 2 labels"),
        ([], [], "non-empty"),
        ([0.5], [0], "float64"),
    ],
)
def test_classification_refuses(predictions, labels, says):
    with pytest.raises(ValueError, match=says):
        classification(predictions, labels, 3)


# entities


def tags(text):
    return [row.split() for row in text.split("|")]


def test_entity_f1_worked_example():
    gold = tags("B-PER I-PER O B-LOC | O B-ORG O")
    predicted = tags("B-PER I-PER O B-ORG | O B-ORG I-ORG")
    # right: PER only. LOC has the wrong type, ORG one word too many: 1 of 3 found, 1 of 3 wanted
    got = entity_f1(predicted, gold)
    assert got["precision"] == got["recall"] == got["f1"] == pytest.approx(1 / 3)
    assert got["token_accuracy"] == pytest.approx(5 / 7)


@pytest.mark.parametrize(
    ("gold", "same"),
    [
        ("O I-PER I-PER O", "O B-PER I-PER O"),  # a stray I- begins an entity
        ("B-PER I-LOC I-LOC", "B-PER B-LOC I-LOC"),  # and so does one of another type
        ("I-PER | I-PER", "B-PER | B-PER"),  # a row's end closes an entity
        ("O B-PER I-PER E-PER S-LOC O", "O B-PER I-PER I-PER B-LOC O"),  # BIOES
        ("S-PER I-PER", "B-PER B-PER"),
        ("E-PER E-PER", "B-PER B-PER"),
        ("B I O I", "B I O B"),  # one type without a name
    ],
)
def test_conlleval_rules(gold, same):
    assert entity_f1(tags(same), tags(gold))["f1"] == 1.0


@pytest.mark.parametrize(
    ("gold", "other"),
    [("B-PER B-PER", "B-PER I-PER"), ("B-PER I-PER", "B-PER I-LOC"), ("B-PER O I-PER", "B-PER I-PER I-PER")],
)
def test_conlleval_differences(gold, other):
    assert entity_f1(tags(other), tags(gold))["f1"] < 1.0


def conlleval(rows):
    """The perl scorer's chunk counter, word by word, with its two predicates spelled out."""
    chunks, position = set(), 0
    for row in rows:
        previous, previous_type, start = "O", "", None
        for tag in [*row, "O"]:
            mark, kind = (tag, "") if tag == "O" else tag.split("-")
            ends = (
                (previous in "BI" and mark in "BO") or (previous != "O" and previous_type != kind)
            ) and previous != "O"
            starts = mark == "B" or (previous == "O" and mark == "I") or (mark != "O" and previous_type != kind)
            if ends:
                chunks.add((start, position, previous_type))
            if starts:
                start = position
            previous, previous_type, position = mark, kind, position + 1
    return chunks


@pytest.mark.parametrize("seed", range(20))
def test_entity_f1_brute_force(seed):
    rng = np.random.default_rng(seed)
    names = ["O", "O", "B-A", "I-A", "B-B", "I-B"]
    gold = [[names[i] for i in rng.integers(0, 6, rng.integers(0, 9))] for _ in range(12)]
    predicted = [[tag if rng.random() < 0.7 else names[rng.integers(6)] for tag in row] for row in gold]
    found, wanted = conlleval(predicted), conlleval(gold)
    got = entity_f1(predicted, gold)
    precision, recall = len(found & wanted) / len(found), len(found & wanted) / len(wanted)
    assert got["precision"] == pytest.approx(precision)
    assert got["recall"] == pytest.approx(recall)
    assert got["f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_plain_tags_are_one_word_entities():
    got = entity_f1([["DET", "NOUN", "VERB"]], [["DET", "NOUN", "NOUN"]])
    assert got == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "token_accuracy": 2 / 3}


def test_each_scheme_counts_the_same_entities():
    """BIOES, BILOU and BMES twins of two sentences; types may be named like marks."""
    gold, predicted = tags("B-L E-L O S-U | S-U S-U O"), tags("B-L E-L O O | S-U S-U S-O")
    right = entity_f1(predicted, gold)
    assert (right["precision"], right["recall"]) == (pytest.approx(3 / 4), pytest.approx(3 / 4))

    def twin(rows, last, single, sign):
        marks = {"E": last, "S": single}
        return [[tag if tag == "O" else marks.get(tag[0], tag[0]) + sign + tag[2:] for tag in row] for row in rows]

    for spelling in (("L", "U", "-"), ("E", "S", "_"), ("L", "U", "_")):
        assert entity_f1(twin(predicted, *spelling), twin(gold, *spelling)) == right
    assert entity_f1(tags("B-X M-X M-X E-X"), tags("B-X I-X I-X L-X"))["f1"] == 1.0
    assert entity_f1([["U-LOC", "L-PER"]], [["U-LOC", "U-PER"]])["f1"] == 1.0  # no B among them
    assert entity_f1([["B-L", "I-L"]], [["B-L", "L-L"]])["f1"] == 1.0
    assert entity_f1(tags("U-X L-X L-X I-X"), tags("U-X U-X U-X U-X"))["f1"] == 1.0  # both end what they mark


@pytest.mark.parametrize(
    ("gold", "predicted", "f1"),
    [
        ("U L U", "L L U", 2 / 3),  # single letters that form no scheme are plain tags
        ("S B S", "B B S", 2 / 3),
        ("N V S", "N V I", 2 / 3),
        ("B E O", "B I O", 1.0),  # a B and what may follow it are one
        ("e-mail", "e-mail", 1.0),
        ("-LRB- NN", "-LRB- VB", 1 / 2),
    ],
)
def test_tags_that_look_like_marks(gold, predicted, f1):
    assert entity_f1(tags(predicted), tags(gold))["f1"] == pytest.approx(f1)


@pytest.mark.parametrize(
    ("gold", "says"),
    [
        ("0 3 4 0", "tags are numbers"),
        ("b-per i-per o", "'b-per' looks like another spelling"),
        ("PER-B PER-I O", "'PER-B' looks like another spelling"),
        ("B:PER I:PER O", "'B:PER' looks like another spelling"),
        ("B-PER i-PER O", "'i-PER' has no prefix and 'B-PER' has one"),
    ],
)
def test_tags_that_would_flatter_are_refused(gold, says):
    with pytest.raises(ValueError, match=says):
        entity_f1(tags(gold), tags(gold))


def test_a_word_without_prediction_is_wrong():
    got = entity_f1([["B-PER", None, None]], [["B-PER", "I-PER", "O"]])
    assert got == {"precision": 0, "recall": 0, "f1": 0, "token_accuracy": pytest.approx(1 / 3)}
    assert entity_f1([["U", "L"]], [["L", "L"]], names=["B", "I", "L", "U", "O"])["f1"] == 1.0


def test_no_entities_at_all():
    assert entity_f1([["O", "O"]], [["O", "O"]]) == {"precision": 0, "recall": 0, "f1": 0, "token_accuracy": 1}


def test_entity_f1_refuses():
    with pytest.raises(ValueError, match="row 1 has 1 predicted tags for 2 words"):
        entity_f1([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(ValueError, match="'NN' has no prefix and 'S-PER' has one"):
        entity_f1([["S-PER", "NN"]], [["S-PER", "O"]])
    with pytest.raises(ValueError, match="no words"):
        entity_f1([[]], [[]])
    with pytest.raises(ValueError, match="2 predicted for 1 gold"):
        entity_f1([["O"], ["O"]], [["O"]])


# answers


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in Paris, France", ["Paris"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("Paris", ["London", "Paris"], 1, 1),  # the best gold answer counts
        ("Paris France", ["Paris Texas", "France and Paris"], 0, 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("the the cat cat", ["cat"], 0, 2 * 0.5 * 1 / 1.5),  # a bag, not a set
        ("cat cat", ["cat cat dog"], 0, 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("Lyon", ["Paris"], 0, 0),
        ("theatre", ["atre"], 0, 0),  # articles go as words only
        ("U.S.", ["us"], 1, 1),  # punctuation goes without leaving a space
        ("well-known", ["well known"], 0, 0),
        ("a\tb  c", ["b c"], 1, 1),
        ("", ["Paris"], 0, 0),
        ("", [], 1, 1),  # unanswerable
        ("Paris", [], 0, 0),
    ],
)
def test_answers(prediction, golds, exact, f1):
    got = answers([prediction], [golds])
    assert got["exact_match"] == exact
    assert got["f1"] == pytest.approx(f1)


def test_answers_without_spaces():
    """Each character of such a script is a word; others are SQuAD's."""
    assert answers(["\u5317\u4eac"], [["\u5317\u4eac\u5e02"]])["f1"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert answers(["город"], [["гор"]])["f1"] == 0


def test_answers_mean_over_rows():
    got = answers(["Paris", "big red dog", "x"], [["paris"], ["red dog"], ["y"]])
    assert got == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx((1 + 0.8 + 0) / 3)}


def test_answers_refuses():
    with pytest.raises(ValueError, match="no rows"):
        answers([], [])
    with pytest.raises(ValueError, match="1 predictions for 2 golds"):
        answers(["a"], [["a"], ["b"]])
    with pytest.raises(TypeError, match="not one string"):
        answers(["a"], ["a"])


# retrieval


def different(n: int) -> list[tuple[str, str]]:
    """Texts of n rows, none of which stands in two of them."""
    return [(f"anchor {i}", f"positive {i}") for i in range(n)]


def test_retrieval_worked_example():
    anchors = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    positives = [[2.0, 0.1], [0.0, 5.0], [1.0, -0.2]]  # the third anchor ranks its own positive last
    got = retrieval(anchors, positives, different(len(anchors)))
    assert got == {"accuracy@1": pytest.approx(2 / 3), "mrr": pytest.approx((1 + 1 + 1 / 3) / 3)}


@pytest.mark.parametrize("n", [1, 2, 37, 1100])
def test_retrieval_brute_force(n):
    rng = np.random.default_rng(n)
    anchors = rng.standard_normal((n, 6))
    positives = (anchors + rng.standard_normal((n, 6))).astype(np.float32)
    ranks = []
    for i in range(n):
        cosine = (positives * anchors[i]).sum(1) / np.sqrt((positives**2).sum(1))
        ranks.append(np.argsort(-cosine).tolist().index(i) + 1)
    got = retrieval(anchors, positives, different(len(anchors)))
    assert got["accuracy@1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert got["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_collapsed_embeddings_earn_chance_level():
    same = np.ones((4, 3))
    mrr = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    assert retrieval(same, same, different(4)) == {"accuracy@1": pytest.approx(1 / 4), "mrr": pytest.approx(mrr)}
    assert retrieval(np.zeros((4, 3)), same, different(4))["accuracy@1"] == pytest.approx(1 / 4)


def test_two_rows_with_one_positive_share_the_first_rank():
    anchors = np.eye(3)
    positives = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]])
    got = retrieval(anchors, positives, different(len(anchors)))
    # anchor 1: first place shared by two. anchor 2: its cosine is 0, level with both others
    assert got["accuracy@1"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_a_twin_of_the_positive_is_found():
    """By their texts two positives are one, for each anchor that has it; the third anchor has two that are right."""
    anchors, positives = np.eye(3)[[0, 0, 1, 1]], np.eye(3)[[0, 0, 1, 1]]
    assert retrieval(anchors, positives, different(len(anchors)))["accuracy@1"] == 0.5
    twins = [("a", "x"), ("b", "x"), ("c", "y"), ("c", "z")]
    assert retrieval(anchors, positives, twins) == {"accuracy@1": 1.0, "mrr": 1.0}
    assert retrieval(anchors, positives, twins, 4) == {"accuracy@1": 0.5, "mrr": 0.5}
    # Vectors that are equal without being one text still share their rank.
    assert retrieval(anchors, positives, [("a", "x"), ("b", "w"), ("c", "y"), ("d", "z")])["accuracy@1"] == 0.5
    collapsed = retrieval(np.ones((4, 3)), np.ones((4, 3)), twins)
    assert collapsed["accuracy@1"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    with pytest.raises(ValueError, match="3 texts for 4 anchors"):
        retrieval(anchors, positives, twins[:3])


def test_retrieval_refuses():
    with pytest.raises(ValueError, match="differ in shape"):
        retrieval(np.ones((2, 3)), np.ones((3, 3)), different(2))
    with pytest.raises(ValueError, match="one embedding a row"):
        retrieval(np.ones(3), np.ones(3), different(3))
    with pytest.raises(ValueError, match=r"positives\[1\] is not finite"):
        retrieval(np.ones((2, 2)), [[1.0, 1.0], [float("nan"), 1.0]], different(2))


# perplexity


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50257)) == pytest.approx(50257)
    assert math.isnan(perplexity(float("nan")))
    for loss in (709.0, 710.0, 1e9, float("inf")):
        assert math.isfinite(perplexity(loss))
        json.dumps(perplexity(loss), allow_nan=False)
    assert perplexity(709.0) < perplexity(710.0) == perplexity(float("inf"))


def test_rouge_worked_example():
    """Of 3 words 2 are among the gold 5, of 2 pairs 1 among the gold 4; "the cat" is the longest common subsequence."""
    got = rouge(["The cat sat."], ["the cats on the mat"])
    assert got == {"rouge1": pytest.approx(0.5), "rouge2": pytest.approx(1 / 3), "rougeL": pytest.approx(0.5)}
    assert rouge(["The cat sat.", "no"], ["the cats on the mat", "yes"])["rouge1"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="1 predictions for 2 golds"):
        rouge(["a"], ["a", "b"])


WORDS = {
    "Café cafe\u0301 naïve_x": ["café", "café", "naïve", "x"],  # an accent typed either way
    "Река, река!": ["река", "река"],
    "\u0928\u092e\u0938\u094d\u0924\u0947 1": ["\u0928\u092e\u0938\u094d\u0924\u0947", "1"],  # vowel signs are marks
    "\u6cb3\u6d41\u3002iPhone\u624b": ["\u6cb3", "\u6d41", "iphon", "\u624b"],
    "\u0e17\u0e35\u0e48\u0e19": ["\u0e17\u0e35\u0e48", "\u0e19"],  # a Thai letter with its marks
    "\u0645\u06cc\u200c\u062e\u0648": ["\u0645\u06cc\u062e\u0648"],  # an invisible joiner
    "a\u200bb co\u00adop don\u2019t": ["a", "b", "coop", "don", "t"],
    "\U0001f44d\U0001f3fd\u2764\ufe0f ok": ["\U0001f44d", "\u2764", "ok"],
}


@pytest.mark.parametrize("text", WORDS)
def test_words_of_other_scripts(text):
    assert WordTokenizer(PorterStemmer()).tokenize(text) == WORDS[text]
    assert rouge([text], [text])["rouge1"] == 1.0


def test_words_of_ascii_are_those_of_rouge_score():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(map(chr, rng.integers(0, 128, 40))) + " running flies THE_cats o'clock 3.14"
        assert WordTokenizer(PorterStemmer()).tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


def test_rouge_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match=r"pip install handtune\[rouge\]"):
        rouge(["a"], ["a"])


def test_metrics_need_no_torch():
    code = "import sys, handtune.engine.tasks.metrics as m; m.perplexity(1); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

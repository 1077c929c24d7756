"""Scores of finished predictions: classification, entities, answers, retrieval, perplexity.

Everything here takes plain lists or numpy arrays, so that a score can be recomputed from a predictions file without a
model (and without torch). Every score is a fraction between 0 and 1; only `perplexity` is not. Each function names the
source of its definition, because "F1" means something else in each of the fields it is used in.

    classification(predictions, labels, n_classes)   accuracy, macro_f1, confusion
    entity_f1(predicted, gold)                       precision, recall, f1 (entities), token_accuracy
    answers(predictions, golds)                      exact_match, f1 (words)
    retrieval(anchors, positives, texts)             accuracy@1, mrr
    comparisons(differences, ties)                   accuracy, calibration_error
    perplexity(loss)                                 exp(loss)
    rouge(predictions, golds)                        rouge1, rouge2, rougeL (summaries)

All gold counts: where a model gave no prediction (a row without text, a word beyond the length that it reads), the
caller says so, and it counts as wrong.
"""

import math
import operator
import re
import string
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence, Sized
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data.candidates import candidates
from .tag_schemes import entities, tags_are_plain
from .word_tokenizer import WordTokenizer, with_spaces

LOWER_IS_BETTER = ("loss", "perplexity")
NO_PREDICTION = -1  # in the place of a predicted class
TIE = 1e-6  # cosines closer than this are one score: a float32 model's noise must not decide a rank


def classification(predictions: ArrayLike, labels: ArrayLike, n_classes: int) -> dict[str, Any]:
    """Accuracy, macro F1 and confusion matrix of class ids.

    Macro F1 is the unweighted mean of the classes' F1 = 2·TP / (2·TP + FP + FN) (van Rijsbergen 1979; scikit-learn's
    `f1_score(average="macro")`), over the classes that occur in the labels or the predictions: a class that occurs in
    neither has no F1 and does not count.

    predictions, labels: (N,) ints in 0..n_classes-1; a prediction may be NO_PREDICTION (-1), which is wrong. Returns
    accuracy, macro_f1 and confusion, n_classes lists of n_classes counts, `confusion[gold][predicted]`; where rows have
    no prediction, each list ends with their number. Raises ValueError for no rows, unequal lengths, or an id out of
    range.
    """
    predicted = _class_ids("predictions", predictions, n_classes, lowest=NO_PREDICTION)
    gold = _class_ids("labels", labels, n_classes)
    _same_length("classification", "predictions", predicted, "labels", gold)

    # The confusion matrix as one histogram of gold × predicted, with a last column for rows without prediction.
    width = n_classes + 1
    column = np.where(predicted == NO_PREDICTION, n_classes, predicted)  # (N,)
    counts = np.bincount(gold * width + column, minlength=n_classes * width).reshape(n_classes, width)  # (C, C + 1)
    hits = np.diag(counts)
    occurs = counts.sum(0)[:n_classes] + counts.sum(1)  # 2·TP + FP + FN of each class
    f1 = 2 * hits[occurs > 0] / occurs[occurs > 0]

    confusion = counts if counts[:, n_classes].any() else counts[:, :n_classes]
    return {
        "accuracy": float(hits.sum() / len(gold)),
        "macro_f1": float(f1.mean()),
        "confusion": confusion.tolist(),
    }


def entity_f1(
    predicted: Sequence[Sequence[str | None]], gold: Sequence[Sequence[str]], names: Iterable[str] = ()
) -> dict[str, float]:
    """Precision, recall and F1 over whole entities (micro), and the share of words whose tag is right.

    The definition is that of CoNLL-2000/2003's scorer, conlleval (Tjong Kim Sang and Buchholz 2000): an entity counts
    when its first word, its last word and its type all match. An I- tag that follows O, or another type, begins an
    entity. Tags are BIO, BIOES, BILOU or BMES, the marks of each read by the same rules (L as E, U as S, M as I), with
    "-" or "_" in front of the type. Where tags have no such prefix (parts of speech), every word but O is an entity of
    its own, as with `conlleval -r`. A score with nothing to divide by is 0.

    predicted, gold: one sequence of tags a row, equally long. None in the place of a predicted tag belongs to no
    entity, and is wrong whatever the gold tag is. names: all tags of the set, where more may occur than do here.
    Returns precision, recall, f1, token_accuracy. Raises ValueError for no words, unequal lengths, and for tags from
    which `tags_are_plain` can't tell what an entity is.
    """
    _same_length("entity_f1", "predicted", predicted, "gold", gold)
    for row, (p, g) in enumerate(zip(predicted, gold, strict=True)):
        if len(p) != len(g):
            raise ValueError(f"entity_f1: row {row} has {len(p)} predicted tags for {len(g)} words; give one a word")

    n_words = sum(map(len, gold))
    if n_words == 0:
        raise ValueError("entity_f1: no words to score; give at least one row with tags")

    # Which scheme it is can only be told from all tags together.
    tags = {tag for rows in (predicted, gold) for row in rows for tag in row if tag}
    plain = tags_are_plain({*names, *tags})
    predicted_entities = [entities([tag or "O" for tag in row], plain) for row in predicted]
    gold_entities = [entities(row, plain) for row in gold]
    hits = sum(len(p & g) for p, g in zip(predicted_entities, gold_entities, strict=True))
    n_predicted = sum(map(len, predicted_entities))
    n_gold = sum(map(len, gold_entities))

    n_right = sum(sum(map(operator.eq, p, g)) for p, g in zip(predicted, gold, strict=True))
    return {
        "precision": _ratio(hits, n_predicted),
        "recall": _ratio(hits, n_gold),
        "f1": _ratio(2 * hits, n_predicted + n_gold),
        "token_accuracy": n_right / n_words,
    }


def answers(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and word F1 of extracted answers, each the best over a row's gold answers, then the mean over rows.

    The definition is that of SQuAD v1.1's evaluate-v1.1.py (Rajpurkar et al. 2016, section 6.1): answers are lowercased
    and lose ASCII punctuation, the words a, an, the, and surplus whitespace; F1 is over the two bags of words, of which
    each character of a script without spaces is one (as in MLQA's script: Lewis et al. 2020, arXiv:1910.07475). A row
    without gold answer is unanswerable: then only an empty prediction is right (SQuAD v2.0). Fractions, where the
    script prints percent.

    predictions: N strings; golds: N lists of strings. Returns exact_match, f1. Raises ValueError for no rows or unequal
    lengths, TypeError for a string in place of a list (its letters would be taken for answers).
    """
    _same_length("answers", "predictions", predictions, "golds", golds)
    if not len(golds):
        raise ValueError("answers: no rows to score; give at least one prediction")

    exact = overlap = 0.0
    for prediction, accepted in zip(predictions, golds, strict=True):
        if isinstance(accepted, str):
            raise TypeError("answers: each entry of golds is a list of answers, not one string; write [answer]")
        predicted = _answer_words(prediction)
        choices = [_answer_words(answer) for answer in accepted] or [[]]  # unanswerable: no words are right
        exact += max(predicted == choice for choice in choices)
        overlap += max(_word_f1(predicted, choice) for choice in choices)
    return {"exact_match": exact / len(golds), "f1": overlap / len(golds)}


def retrieval(
    anchors: ArrayLike,
    positives: ArrayLike,
    texts: Sequence[tuple[Hashable, Hashable]] | None = None,
    n_missed: int = 0,
) -> dict[str, float]:
    """How well each anchor finds its own positive by cosine similarity among the positives of all rows.

    accuracy@1 is the share of anchors whose own positive ranks first; MRR is the mean of 1/rank (Voorhees 1999, TREC-8
    question answering). Equal cosines (a collapsed model) share their ranks: the score is the expectation over a random
    order among them, so that a constant embedding earns chance level and not 1. The more rows, the harder the task:
    compare only scores over the same rows.

    `texts` tells which positives are one: a text that stands in several rows is one candidate. Candidates that are
    right for an anchor, too, because another row pairs them or because they are the anchor's own text, are left out of
    its ranking (the filtered ranks of Bordes et al. 2013, section 4.2). Without `texts` all rows count as different.

    anchors, positives: (N, D). texts: anchor and positive of each row, or anything that is equal where they are.
    n_missed: rows that have no embedding, and count as not found. Returns accuracy@1, mrr. Raises ValueError for other
    shapes or a row that is not finite.
    """
    a = _unit_rows("anchors", anchors)  # (N, D)
    p = _unit_rows("positives", positives)  # (N, D)
    if a.shape != p.shape:
        raise ValueError(f"retrieval: anchors {a.shape} and positives {p.shape} differ in shape; give one pair a row")
    pairs = [(("anchor", i), ("positive", i)) for i in range(len(a))] if texts is None else texts
    _same_length("retrieval", "texts", pairs, "anchors", a)
    first_rows, targets, also_right = candidates([anchor for anchor, _ in pairs], [positive for _, positive in pairs])

    # Behind b better candidates, l level ones have the ranks b + 1, ..., b + l: the mean of 1/rank over them counts.
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(first_rows) + 1))])
    first = reciprocal = 0.0
    for begin in range(0, len(a), 1024):  # N × C cosines of a large set would not fit into memory at once
        cosine = a[begin : begin + 1024] @ p[first_rows].T  # (n, C), n of the N rows
        target = np.take_along_axis(cosine, np.array(targets[begin : begin + 1024])[:, None], axis=1)  # (n, 1)
        for row, columns in enumerate(also_right[begin : begin + 1024]):
            cosine[row, columns] = -np.inf

        better = (cosine > target + TIE).sum(1)  # (n,)
        level = (np.abs(cosine - target) <= TIE).sum(1)  # at least 1: the own positive
        first += ((better == 0) / level).sum()
        reciprocal += ((harmonic[better + level] - harmonic[better]) / level).sum()

    n_rows = len(a) + n_missed
    return {"accuracy@1": float(first / n_rows), "mrr": float(reciprocal / n_rows)}


def comparisons(differences: ArrayLike, ties: ArrayLike) -> dict[str, float]:
    """How often the chosen side of a comparison scores higher, and how well the margin tells how sure that is.

    A difference d of 0 is half right; ties don't count. The probability that the chosen side is better is σ(d) (Bradley
    and Terry 1952); the calibration error is the mean distance between the probability of the side that scores higher
    and the share of them that were chosen, over ten bins of equal width, weighted by their rows (Guo et al. 2017,
    arXiv:1706.04599).

    differences, ties: (N,). Returns accuracy, calibration_error. Raises ValueError where there are only ties, or
    a difference is NaN.
    """
    d = np.asarray(differences, dtype=np.float64)[~np.asarray(ties, dtype=bool)]
    if not len(d):
        raise ValueError("comparisons: no rows to score but ties; give some with a better side")
    if np.isnan(d).any():
        raise ValueError("comparisons: a difference of scores is NaN; training has diverged, lower train.lr")

    # Ten bins of confidence between 0.5 and 1; in each the sum of confidences less the sum of those that were right.
    right = (d > 0) + 0.5 * (d == 0)
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    gaps = np.bincount(bins, confidence - right, minlength=10)
    return {"accuracy": float(right.mean()), "calibration_error": float(np.abs(gaps).sum() / len(d))}


def perplexity(loss: float) -> float:
    """exp(loss) for a mean loss in nats per token (Jelinek et al. 1977).

    Saturates at the largest float, because a diverged run must still be written as JSON, which has no infinity; NaN
    stays.
    """
    largest = sys.float_info.max
    return largest if loss >= math.log(largest) else math.exp(loss)


def rouge(predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of texts, each the mean F1 over the rows, by the package rouge-score.

    F1 over words, over pairs of neighbouring words, and over the longest common subsequence of words (Lin 2004,
    "ROUGE: A Package for Automatic Evaluation of Summaries"). Words are lower-cased; those of ASCII letters are stemmed
    by Porter's rules. What a word is in other scripts, those without spaces too, `word_tokenizer.py` says.

    predictions, golds: N strings each. Returns rouge1, rouge2, rougeL, fractions. Raises ValueError for no rows or
    unequal lengths, or where rouge-score is not installed.
    """
    _same_length("rouge", "predictions", predictions, "golds", golds)
    if not len(golds):
        raise ValueError("rouge: no texts to score; give at least one prediction")
    # Imported here, because few need it and it is an extra to install.
    try:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE is computed by rouge-score; pip install handtune[rouge]") from None

    variants = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(variants, tokenizer=WordTokenizer(PorterStemmer()))
    scores = [scorer.score(gold, prediction) for prediction, gold in zip(predictions, golds, strict=True)]
    return {variant: sum(score[variant].fmeasure for score in scores) / len(scores) for variant in variants}


def _ratio(part: int, total: int) -> float:
    return part / total if total else 0.0


def _same_length(score: str, name: str, values: Sized, gold_name: str, gold: Sized) -> None:
    if len(values) != len(gold):
        raise ValueError(f"{score}: {len(values)} {name} for {len(gold)} {gold_name}; give one for each row")


def _class_ids(name: str, values: ArrayLike, n_classes: int, lowest: int = 0) -> NDArray[np.int64]:
    ids = np.asarray(values)
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"classification: {name} is {ids.dtype} {ids.shape}; give a non-empty list of class ids")

    wrong = np.flatnonzero((ids < lowest) | (ids >= n_classes))
    if len(wrong):
        row = wrong[0]
        raise ValueError(f"classification: {name}[{row}] is {ids[row]}; class ids go from 0 to {n_classes - 1}")
    return ids.astype(np.int64)


def _answer_words(text: str) -> list[str]:
    """An answer's words after SQuAD's normalisation, in its order: lowercase, punctuation, articles, whitespace."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return with_spaces(re.sub(r"\b(a|an|the)\b", " ", bare)).split()


def _word_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


def _unit_rows(name: str, rows: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(rows, dtype=np.float64)
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"retrieval: {name} has shape {x.shape}; give one embedding a row, (N, D)")

    wrong = np.flatnonzero(~np.isfinite(x).all(1))
    if len(wrong):
        raise ValueError(f"retrieval: {name}[{wrong[0]}] is not finite; training has diverged, lower train.lr")
    length: NDArray[np.float64] = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.maximum(length, 1e-12)

"""What takes no pretrained model, to hold an example's result against."""

import re
from collections.abc import Sequence
from typing import Any


def words(text: str) -> set[str]:
    """The different words of a text, in small letters."""
    return set(re.findall(r"\w+", text.lower()))


def likeness(a: set[str], b: set[str]) -> float:
    """Jaccard's index: the share of all words that both texts have."""
    return len(a & b) / len(a | b)


def bag_of_words(train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]], text: str, label: str) -> float:
    """The share of `test` whose label a logistic regression on words and pairs of words gets right.

    It is fitted to the fields `text` and `label` of the rows of `train`, which choose its regularisation, too, by
    cross-validation. Its words are weighed by tf-idf. It needs scikit-learn.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    regression = LogisticRegressionCV(
        Cs=10, cv=5, l1_ratios=(0,), max_iter=2000, scoring="accuracy", use_legacy_attributes=False
    )
    model = make_pipeline(words, regression)
    model.fit([row[text] for row in train], [row[label] for row in train])
    return float(model.score([row[text] for row in test], [row[label] for row in test]))

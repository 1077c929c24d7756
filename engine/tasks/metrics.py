"""What scores share: perplexity, ROUGE, and what is a word of a text in any script.

A score's formula stands with its task. All take plain lists or numpy arrays, so that a score can be recomputed from a
predictions file without a model, and give fractions between 0 and 1; only `perplexity` is none. Each names the source
of its definition, because "F1" means something else in each of the fields it is used in. All gold counts: where a model
gave no prediction (a row without text, a word beyond the length that it reads), the caller says so, and it counts as
wrong.

Words of ASCII text are those of the package rouge-score. A word is a run of letters, digits and the marks that belong
to them (the categories L, N and M of Unicode): an accent, or the vowel signs of Devanagari, do not end a word. Where a
script puts no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), each character with its marks is a
word, as in sacreBLEU's tokenizer for Chinese (Post 2018, arXiv:1804.08771): it takes a dictionary to tell the words of
such a script apart, and scores by different dictionaries can't be compared. Each pictograph is a word too. Punctuation
and other symbols part words.

Texts are lower-cased, and compared in the form NFC of Unicode, in which an accented letter is the same however it was
typed. Invisible format characters (soft hyphens, joiners) count for nothing, but the zero-width space parts words.
"""

import math
import re
import sys
import unicodedata
from collections.abc import Sequence, Sized
from typing import Any, Protocol

LOWER_IS_BETTER = ("loss", "perplexity")
MISTAKES = 10  # that an evaluation names
ASCII_WORD = re.compile(r"[a-z0-9]+")
ZERO_WIDTH_SPACE = "\u200b"
# Thai and Lao; Burmese and its extensions; Khmer; kana, also of half width; Chinese characters with their extensions.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
PICTOGRAPH = re.compile("[\u2600-\u27bf\U0001f000-\U0001faff]")
WORD_KINDS = re.compile("P|UM*|L[LM]*")  # the kinds of the characters of one word


def check_length(score: str, name: str, values: Sized, gold_name: str, gold: Sized) -> None:
    """ValueError where a score has not as many predictions as there are gold answers."""
    if len(values) != len(gold):
        raise ValueError(f"{score}: {len(values)} {name} for {len(gold)} {gold_name}; give one for each row")


def worst(mistakes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of an evaluation's mistakes the ten that the model was surest of: {"row", "predicted", "probability", ...}.

    A probability that isn't known, None, counts as 0.
    """
    return sorted(mistakes, key=lambda mistake: -(mistake["probability"] or 0))[:MISTAKES]


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
    by Porter's rules. What a word is in other scripts, those without spaces too, is said above.

    predictions, golds: N strings each. Returns rouge1, rouge2, rougeL, fractions. Raises ValueError for no rows or
    unequal lengths, or where rouge-score is not installed.
    """
    check_length("rouge", "predictions", predictions, "golds", golds)
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


class Stemmer(Protocol):
    """What shortens an English word to its stem, as nltk's PorterStemmer."""

    def stem(self, token: str, /) -> str: ...


class WordTokenizer:
    """The words of a text as rouge-score's RougeScorer asks for them; ASCII words of over 3 letters are stemmed."""

    def __init__(self, stemmer: Stemmer):
        self.stemmer = stemmer

    def tokenize(self, text: str) -> list[str]:
        """Words in their order, lower-cased, without punctuation."""
        return [
            self.stemmer.stem(token) if len(token) > 3 and ASCII_WORD.fullmatch(token) else token
            for token in split(text)
        ]


def with_spaces(text: str) -> str:
    """`text` with spaces around each character of a script that puts none between words."""
    return UNSPACED.sub(r" \g<0> ", text)


def split(text: str) -> list[str]:
    """The words of `text` by the rules above, lower-cased."""
    text = unicodedata.normalize("NFC", text).lower()
    # Soft hyphens and joiners are invisible: "co\u00adoperate" is one word.
    chars = [char for char in text if unicodedata.category(char) != "Cf" or char == ZERO_WIDTH_SPACE]
    kinds = "".join(map(_kind, chars))
    return ["".join(chars[slice(*match.span())]) for match in WORD_KINDS.finditer(kinds)]


def _kind(char: str) -> str:
    """What a character is: a mark, a pictograph, of a script without spaces, a letter or digit, or what parts words."""
    category = unicodedata.category(char)
    if category[0] == "M":
        return "M"
    if category == "So" and PICTOGRAPH.match(char):
        return "P"
    if category[0] in "LN":
        return "U" if UNSPACED.match(char) else "L"
    return " "

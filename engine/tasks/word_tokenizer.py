"""Words of a text in any script, for scores that count words; of ASCII text they are those of the package rouge-score.

A word is a run of letters, digits and the marks that belong to them (the categories L, N and M of Unicode): an accent,
or the vowel signs of Devanagari, do not end a word. Where a script puts no spaces between words (Chinese, Japanese,
Thai, Lao, Khmer, Burmese), each character with its marks is a word, as in sacreBLEU's tokenizer for Chinese (Post 2018,
arXiv:1804.08771): it takes a dictionary to tell the words of such a script apart, and scores by different dictionaries
can't be compared. Each pictograph is a word too. Punctuation and other symbols part words.

Texts are lower-cased, and compared in the form NFC of Unicode, in which an accented letter is the same however it was
typed. Invisible format characters (soft hyphens, joiners) count for nothing, but the zero-width space parts words.
"""

import re
import unicodedata
from typing import Protocol

ASCII_WORD = re.compile(r"[a-z0-9]+")
ZERO_WIDTH_SPACE = "\u200b"
# Thai and Lao; Burmese and its extensions; Khmer; kana, also of half width; Chinese characters with their extensions.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
PICTOGRAPH = re.compile("[\u2600-\u27bf\U0001f000-\U0001faff]")


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
    tokens: list[str] = []
    takes_letters = takes_marks = False  # whether the last word goes on with a letter, with a mark
    for char in unicodedata.normalize("NFC", text).lower():
        category = unicodedata.category(char)
        # Soft hyphens and joiners are invisible: "co\u00adoperate" is one word.
        if category == "Cf" and char != ZERO_WIDTH_SPACE:
            continue

        # A mark, a pictograph, a character of a script without spaces, a letter or digit, and all that parts words.
        if category[0] == "M" and takes_marks:
            tokens[-1] += char
        elif category == "So" and PICTOGRAPH.match(char):
            tokens.append(char)
            takes_letters = takes_marks = False
        elif category[0] in "LN" and UNSPACED.match(char):
            tokens.append(char)
            takes_letters = False
            takes_marks = True
        elif category[0] in "LN":
            if takes_letters:
                tokens[-1] += char
            else:
                tokens.append(char)
            takes_letters = takes_marks = True
        else:  # a space, punctuation, or a mark behind one
            takes_letters = takes_marks = False
    return tokens

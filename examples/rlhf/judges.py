"""Who compares answers in place of a person, and says in the end what the policy is worth: somebody for plain words."""

import re

FEW = 6  # words: fewer are no answer


def reading_ease(text: str) -> float:
    """How easily a text is read, by Flesch's formula: about 30 for a contract, 60 for a newspaper, 90 for a child.

    It counts words a sentence and syllables a word (here groups of vowels, without a silent e at the end). Source:
    R. Flesch, A new readability yardstick, Journal of Applied Psychology 32, 1948.
    """
    words = re.findall(r"[a-z'’]+", text.lower())
    if not words:
        return 0.0
    sentences = max(1, len(re.findall(r"[.!?]+(?=\s|$)", text)))
    syllables = sum(len(re.findall(r"[aeiouy]+", re.sub(r"(?<=[^aeiouy])e$", "", word))) or 1 for word in words)
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


def better(prompt: str, left: str, right: str) -> str:
    """The side that is read more easily, unless it is hardly an answer; of two that are nearly alike, neither."""
    a, b = (reading_ease(text) if len(text.split()) >= FEW else -100.0 for text in (left, right))
    return "tie" if abs(a - b) < 10 else "left" if a > b else "right"

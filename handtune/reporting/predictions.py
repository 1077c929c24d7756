"""A prediction in one line, for a person at a terminal."""

from collections.abc import Mapping
from typing import Any

from .._outside import visible_line

SHOWN = 100  # characters of a row
NUMBERS = 4  # of an embedding
# Fields by one of which people know a row.
READ = ("text", "tokens", "question", "image", "completion", "anchor", "prompt")


def readable(row: Mapping[str, Any], prediction: Mapping[str, Any]) -> str:
    """What is predicted, a tab, and the beginning of what it is predicted for."""
    if "entities" in prediction:
        entities = [f"{entity['type']} {entity['text']!r}" for entity in prediction["entities"]]
        predicted = ", ".join(entities) or "no entity"
    elif "predicted" in prediction:
        predicted = _shown(prediction["predicted"], "probability", prediction["probability"])
    elif "answer" in prediction:
        predicted = _shown(prediction["answer"], "score", prediction["score"])
    else:
        predicted = ", ".join(f"{name} {_number(value)}" for name, value in prediction.items())

    beginning = next((row[name] for name in READ if name in row), "")
    text = " ".join(beginning) if isinstance(beginning, list) else str(beginning)
    return f"{visible_line(predicted)}\t{visible_line(text[:SHOWN])}"


def _shown(value: str | None, measure: str, number: float | None) -> str:
    return "nothing to read" if value is None else f"{value} ({measure} {_number(number)})"


def _number(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_number, value[:NUMBERS]))}, ...] ({len(value)} numbers)"
    return "none" if value is None else f"{value:.3f}"

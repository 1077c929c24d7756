"""The matrix of `benchmarks/families.py`: what every family can do, on tiny random models."""

import sys

import pytest
from project import BENCHMARKS

sys.path.append(str(BENCHMARKS))

from exchange_models import FAMILIES, Family
from families import COLUMNS, is_right

NAMES = [name for name, family in FAMILIES.items() if isinstance(family, Family)]
CHECKED_BY_EXCHANGE = ("logits", "left", "heads", "PEFT out", "PEFT in")
QUICK = [("RoBERTa", "LoRA"), ("Gemma 3", "merge"), ("ModernBERT", "full"), ("Phi-3", "NF4")]
REST = [
    (name, column) for name in NAMES for column in COLUMNS
    if column not in CHECKED_BY_EXCHANGE and (name, column) not in QUICK
]  # fmt: skip


@pytest.mark.parametrize(("name", "column"), QUICK)
def test_what_a_family_can_do(name, column, tmp_path):
    cell = COLUMNS[column](name, tmp_path)
    assert is_right(column, cell), cell


@pytest.mark.deep
@pytest.mark.parametrize(("name", "column"), REST)
def test_what_every_family_can_do(name, column, tmp_path):
    cell = COLUMNS[column](name, tmp_path)
    assert is_right(column, cell), cell

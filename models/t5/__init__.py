"""T5, T5 1.1 and Flan-T5."""

from .model import T5 as T5

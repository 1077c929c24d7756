"""GPT-2 and GPT-3."""

from .model import GPT2 as GPT2

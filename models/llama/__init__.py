"""Llama and the families that share its code: Mistral, Qwen2, Qwen3."""

from .model import Llama as Llama

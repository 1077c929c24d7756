"""BLOOM."""

from .model import Bloom as Bloom

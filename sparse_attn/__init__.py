"""Sparse attention for long contexts."""

from . import ops  # noqa: F401

__version__ = "0.1.0"

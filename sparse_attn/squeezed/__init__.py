"""Squeezed Attention's offline stage: a fixed context, clustered once and kept in a file."""

from .context import SqueezedContext, SqueezedLayer

__all__ = ["SqueezedContext", "SqueezedLayer"]

"""Sparse attention for long contexts.

    out = sparse_attn.attention(query, key, value, method="flex_prefill")

The operators are `torch.ops.sparse_attn.*`; see docs/ for a page on each operator and method.
"""

from . import ops  # noqa: F401  (registers the operators)
from .api import Stats, attention, backends, explain, info, select
from .block_index import BlockIndex
from .methods import METHODS
from .warmup import Warmed, warmup

__version__ = "0.1.0"
globals().update({config.__name__: config for config in METHODS.values()})

LAZY = {  # imported when asked for: name -> module
    "SqueezedCache": ".integrations.squeezed",
    "SqueezedContext": ".squeezed",
}


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(LAZY[name], __name__), name)


__all__ = [
    "BlockIndex",
    "Stats",
    "Warmed",
    "attention",
    "backends",
    "explain",
    "info",
    "select",
    "warmup",
    *(config.__name__ for config in METHODS.values()),
]

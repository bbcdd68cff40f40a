"""The methods, one file each. A module here that has `METHOD` is a method: nothing lists them.

A method is a frozen dataclass with a class attribute `name`, fields that check themselves in
`__post_init__`, and the functions of the `Method` protocol. Where a class attribute `takes_cache`
is true, `selector` and `select` take `block_table` and `kv_lengths` too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol

import torch

from ..block_index import BlockIndex
from ..registry import Op


class Method(Protocol):
    """What every method offers."""

    name: str

    def why_not(self, query: torch.Tensor, key: torch.Tensor, causal: bool) -> str | None:
        """Why the method cannot serve a call and what would, or None."""

    def selector(
        self, query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float | None
    ) -> tuple[Op, tuple[Any, ...]] | None:
        """The operator that `select` calls and its arguments, None where it calls none."""

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        backend: str | None = None,
    ) -> BlockIndex:
        """Which keys to attend to."""


METHODS: dict[str, Any] = {}
for _module in iter_modules(__path__):
    _method = getattr(import_module(f"{__name__}.{_module.name}"), "METHOD", None)
    if _method is not None:
        METHODS[_method.name] = _method


def resolve(method: Any) -> Any:
    """A method's config from its name, or the config itself."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, expected {_expected(method)}")
        return METHODS[method]()
    if type(method) not in METHODS.values():
        got = "a tensor" if isinstance(method, torch.Tensor) else repr(method)
        raise TypeError(f"method: got {got}, expected a name or a config of {sorted(METHODS)}")
    return method


def _expected(method: str) -> str:
    name, colon, _ = method.partition(":")
    if colon and name in METHODS:  # as on a command line
        known = ", ".join(f"{field.name}=..." for field in fields(METHODS[name]))
        return f"options in a config: sparse_attn.{METHODS[name].__name__}({known})"
    return f"one of {sorted(METHODS)}{meant(name, METHODS)}"


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: which known one is probably meant."""
    near = get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""

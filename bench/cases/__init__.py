"""What each operator is compiled, checked and timed with: <op>.py, found by its name.

A file has the functions that apply to its operator:

| function | for | gives |
|---|---|---|
| `triton(quick)` | `python -m bench aot` | name -> (function of fake tensors, its arguments) |
| `cuda(dtype, quick)` | `python -m bench cuda_aot` | (function of meta tensors, arguments) |
| `checks(context)` | part `check` of bench/gpu_check.py | (what, operator, function, arguments) |
| `timed(context, sizes)` | part `operators` of it | nothing: it calls `compare` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

Cases = dict[str, tuple[Any, ...]]
Launches = list[tuple[Callable[..., None], tuple[Any, ...]]]
Checks = list[tuple[str, str, Callable[..., str | None], tuple[Any, ...]]]


def all_of(function: str) -> Iterator[Callable[..., Any]]:
    """This function of every operator that has it."""
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = import_module(f"{__name__}.{path.stem}")
        if hasattr(module, function):
            yield getattr(module, function)

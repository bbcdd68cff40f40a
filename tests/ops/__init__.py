"""Tests of one operator each, and what the tests of all operators need to know of it.

cases_<op>.py is found by its name and has the functions that apply:

| function | for | gives |
|---|---|---|
| `arguments(draw)` | test_nvrtc.py | legal arguments that Hypothesis draws |
| `direct_call()` | test_nvrtc.py | the arguments of one call |
| `guarded()` | guard_pages.py | (name, function, its tensors), C++ |
| `any_length(new, n_queries, n_keys)` | test_triton_launches.py | nothing: it launches |

COMPILED says which kernels `any_length` compiles more than once, and how often.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def all_of(name: str) -> dict[str, Callable[..., Any]]:
    """What is so named in the cases of each operator that has it."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
    modules = {stem.removeprefix("cases_"): import_module(f"{__name__}.{stem}") for stem in stems}
    return {op: getattr(module, name) for op, module in modules.items() if hasattr(module, name)}

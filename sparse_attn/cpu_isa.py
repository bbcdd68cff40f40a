"""The instruction set that the C++ kernels use, chosen at run time."""

from __future__ import annotations

import torch

from . import _ext
from .registry import LIBRARY, NS

NAMES = ("portable", "avx2", "avx512", "avx512bf16", "amx")
LIBRARY.define('_cpu_isa(str isa="") -> str')


def cpu_isa(isa: str = "") -> str:
    """The instruction set in use; a name selects it ("auto": the best), for tests and bug reports.

    Raises RuntimeError if this machine cannot run it or the extension is missing.
    """
    if _ext.cpp_missing is not None:
        raise RuntimeError(_ext.cpp_missing)
    return getattr(torch.ops, NS)._cpu_isa(isa)


def available() -> tuple[str, ...]:
    """The instruction sets this machine can run, portable first; empty without the extension."""
    if _ext.cpp_missing is not None:
        return ()
    current = cpu_isa()
    best = cpu_isa("auto")
    cpu_isa(current)
    return NAMES[: NAMES.index(best) + 1]


BEST = available()[-1] if _ext.cpp_missing is None else "portable"  # what is used by default


def model_dtype(device: str = "cpu") -> torch.dtype:
    """The dtype in which to run a model: bfloat16, on a CPU if the kernels find AVX512-BF16 or AMX.

    On CPUs that do not multiply bfloat16 PyTorch takes many times as long in it as in float32,
    beside which any kernel would look fast.
    """
    slow = device == "cpu" and BEST not in ("avx512bf16", "amx")
    return torch.float32 if slow else torch.bfloat16

"""Loads the compiled extensions, looks for Triton; keeps the reasons where there are none."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

OLDEST_TORCH = (2, 11)


def _load(module: str, name: str, built: str) -> str | None:
    """None when an extension's kernels are registered, otherwise why not and what would help.

    `built` names the line of _build_info.py that says why it was not built.
    """
    import torch

    found = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        return f"{name} is built for torch >= 2.11, found {torch.__version__}: upgrade torch"
    try:
        import_module(f"sparse_attn.{module}")
    except ModuleNotFoundError:
        reason = _build_info(built) or "run `pip install -e .` in the checkout"
        return f"{name} not built ({reason})"
    except ImportError as error:
        return f"{name} does not load ({error}): reinstall against this torch"
    return None


def _build_info(name: str) -> Any:
    """What setup.py has noted under a name, None if it has not."""
    try:
        return getattr(import_module("sparse_attn._build_info"), name, None)
    except ModuleNotFoundError:
        return None


def cuda_archs() -> str:
    """The architectures that the CUDA extension has code for."""
    return " ".join(f"sm_{arch}" for arch in _build_info("CUDA_ARCHS") or ())


def _find_triton() -> str | None:
    """None when Triton is installed; it is imported by the first kernel, not here."""
    try:
        found = find_spec("triton") is not None
    except ValueError:  # blocked in sys.modules
        found = False
    return None if found else "Triton is not installed: pip install triton"


cpp_missing: str | None = _load("_C", "C++ extension", "CPU_EXTENSION_MISSING")
cuda_missing: str | None = _load("_C_cuda", "CUDA extension", "CUDA_EXTENSION_MISSING")
triton_missing: str | None = _find_triton()

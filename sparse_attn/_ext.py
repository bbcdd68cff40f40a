"""Loads the compiled extension, looks for Triton; keeps the reason when there is none."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

OLDEST_TORCH = (2, 11)


def _load() -> str | None:
    """None when the C++ kernels are registered, otherwise why they are not and what would help."""
    import torch

    found = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        return f"built for torch >= 2.11, found {torch.__version__}: upgrade torch"
    try:
        import_module("sparse_attn._C")
    except ModuleNotFoundError:
        try:
            reason = import_module("sparse_attn._build_info").CPU_EXTENSION_MISSING
        except ModuleNotFoundError:
            reason = None
        return f"C++ extension not built ({reason or 'run `pip install -e .` in the checkout'})"
    except ImportError as error:
        return f"C++ extension does not load ({error}): reinstall against this torch"
    return None


def _find_triton() -> str | None:
    """None when Triton is installed; it is imported by the first kernel, not here."""
    try:
        found = find_spec("triton") is not None
    except ValueError:  # blocked in sys.modules
        found = False
    return None if found else "Triton is not installed: pip install triton"


cpp_missing: str | None = _load()
triton_missing: str | None = _find_triton()

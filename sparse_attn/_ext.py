"""Loads the compiled extension, looks for Triton; keeps the reason when there is none."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

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


def _find_kernels() -> None:
    """Lets a checkout run that is not installed: there the kernels lie beside the package."""
    name = "sparse_attn.triton_kernels"
    folder = Path(__file__).parents[1] / "triton_kernels"
    if find_spec(name) is None and (folder / "__init__.py").exists():
        spec = spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)


_find_kernels()
cpp_missing: str | None = _load()
triton_missing: str | None = _find_triton()

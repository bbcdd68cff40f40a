"""Loads the compiled extensions, finds Triton and CuPy; keeps the reasons where there is none."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from warnings import warn

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
        if module == "_C" and (hidden := _hidden()):
            reason = (
                f"this is the checkout {Path(__file__).parents[1]}, which hides {hidden}: "
                "run `pip install -e .` in it, or start elsewhere"
            )
            warn(f"sparse_attn without its kernels: {reason}", stacklevel=2)
        return f"{name} not built ({reason})"
    except ImportError as error:
        return f"{name} does not load ({error}): reinstall against this torch"
    return None


def _hidden() -> Path | None:
    """Where this package is installed with its kernels, if this is a checkout that hides it."""
    package = Path(__file__).parent
    if not (package.parent / "setup.py").exists():
        return None
    folders = (Path(folder) / package.name for folder in sys.path if folder)
    return next((f for f in folders if f != package and any(f.glob("_C.*"))), None)


def _build_info(name: str) -> Any:
    """What setup.py has noted under a name, None if it has not."""
    try:
        return getattr(import_module("sparse_attn._build_info"), name, None)
    except ModuleNotFoundError:
        return None


def cuda_archs() -> str:
    """The architectures that the CUDA extension has code for."""
    return " ".join(f"sm_{arch}" for arch in CUDA_ARCHS)


def why_no_cuda_code(major: int, minor: int) -> str | None:
    """Why the CUDA extension cannot run on a GPU; NVRTC compiles for the one that is there.

    Code runs on later GPUs of its generation, unless it is of an "a"; portable code of the newest
    (gpu_code in setup.py) on all later ones.
    """
    gpu, numbers = 10 * major + minor, [int(arch.rstrip("af")) for arch in CUDA_ARCHS]
    for arch, n in zip(CUDA_ARCHS, numbers, strict=True):
        if gpu == n or (not arch.endswith("a") and n < gpu < n - n % 10 + 10):
            return None
    if not numbers or gpu >= max(numbers):
        return None
    return (
        f"the CUDA extension has code for {cuda_archs()}, this GPU is sm_{gpu}: "
        f"reinstall with SPARSE_ATTN_CUDA_ARCHS={gpu}"
    )


def _installed(module: str) -> bool:
    """Whether a package is there; it is imported by the first kernel, not here."""
    try:
        return find_spec(module) is not None
    except ValueError:  # blocked in sys.modules
        return False


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


def _cupy() -> str:
    import torch

    return f"cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x"


_find_kernels()
cpp_missing: str | None = _load("_C", "C++ extension", "CPU_EXTENSION_MISSING")
cuda_extension_missing: str | None = _load("_C_cuda", "CUDA extension", "CUDA_EXTENSION_MISSING")
CUDA_ARCHS: tuple[str, ...] = (
    () if cuda_extension_missing else tuple(_build_info("CUDA_ARCHS") or ())
)
# without the extension NVRTC compiles the same kernels at the first call, through CuPy
cuda_missing: str | None = None
if cuda_extension_missing and not _installed("cupy"):
    cuda_missing = f"{cuda_extension_missing}; or compile at first use: pip install {_cupy()}"
triton_missing: str | None = (
    None if _installed("triton") else "Triton is not installed: pip install triton"
)

"""How kernels are launched, and what is known of the device of a tensor."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def run(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Launches `programs` of a kernel on the device of its first argument."""
    if not args[0].is_cuda:
        from .interpreter import mend  # needs numpy

        mend()
        kernel[(programs,)](*args, **options)
        return
    # Triton launches on the current device
    with torch.cuda.device(args[0].device):
        kernel[(programs,)](*args, **options)


@cache
def properties(index: int) -> tuple[str, int]:
    """Architecture and number of multiprocessors of a CUDA device."""
    p = torch.cuda.get_device_properties(index)
    return f"sm_{p.major}{p.minor}", p.multi_processor_count


def arch_of(x: torch.Tensor) -> str:
    """The architecture as in configs.py; under the interpreter the oldest."""
    return properties(x.device.index)[0] if x.is_cuda else "sm_80"


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of the device; a few under the interpreter, so that tests split work."""
    return properties(x.device.index)[1] if x.is_cuda else 4


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but the last."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

"""What every launch needs: the tensor's device, and what is known of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


def device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device: makes it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _properties(index: int) -> tuple[str, int]:
    p = torch.cuda.get_device_properties(index)
    return f"sm_{p.major}{p.minor}", p.multi_processor_count


def arch_of(x: torch.Tensor) -> str:
    """The architecture as in configs.py; under the interpreter the oldest."""
    return _properties(x.device.index)[0] if x.is_cuda else "sm_80"


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of the device; a few under the interpreter, so that tests split work."""
    return _properties(x.device.index)[1] if x.is_cuda else 4

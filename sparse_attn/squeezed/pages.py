"""Memory in large pages for keys and values that are read a few at a time."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

PAGE = 2**21


def in_large_pages(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor; on a CPU whose system has large pages, in those.

    Kept clusters are short runs all over a context: with pages of 4 KiB nearly each waits for an
    address first, which costs a tenth of a decoding step.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the memory serves as it is
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def moved(x: torch.Tensor) -> torch.Tensor:
    """A copy of x in such memory."""
    return in_large_pages(x.shape, x.dtype, x.device).copy_(x)

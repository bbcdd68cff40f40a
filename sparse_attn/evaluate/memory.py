"""The most memory that a computation held."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

CLEAR_REFS = "/proc/self/clear_refs"
MEASURABLE = os.access(CLEAR_REFS, os.W_OK)


def resident(field: str) -> int:
    """VmRSS, resident bytes now, or VmHWM, the most there were."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return int(next(x for x in lines if x.startswith(field + ":")).split()[1]) * 1024


def forget_peak() -> int:
    """Lets VmHWM start again from the bytes resident now, which it returns."""
    ctypes.CDLL(None).malloc_trim(0)  # pages that malloc keeps could serve the call unseen
    Path(CLEAR_REFS).write_text("5")
    before = resident("VmRSS")
    if resident("VmHWM") > before + (1 << 20):
        raise OSError(f"{CLEAR_REFS} does not reset the peak on this system")
    return before


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes held at most during `call` beyond those before; None where nothing tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if not MEASURABLE:
        return None
    try:
        before = forget_peak()
    except OSError:
        return None
    call()
    return max(0, resident("VmHWM") - before)

"""Peak extra memory of one FlexPrefill call: python -m bench.memory LENGTH KEY_HEADS

Measured in a process of its own, where nothing freed earlier can serve the call.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch

from sparse_attn.ops.flex_prefill_attention import op

from .inputs import gen

HEADS, DIM = 8, 128
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


def measure(length: int, key_heads: int) -> float:
    """Peak bytes beyond the inputs, results included, per byte of query, key and value."""
    q, k, v = gen(7, length, "mixed", Hq=HEADS, Hkv=key_heads, D=DIM)
    query, key, value = (torch.from_numpy(x).transpose(1, 2).bfloat16() for x in (q, k, v))
    del q, k, v
    op(*(x[:, :, :256] for x in (query, key, value)), 0.9, backend="cpp")  # threads, code pages
    before = forget_peak()
    op(query, key, value, 0.9, backend="cpp")
    inputs = sum(x.numel() * x.element_size() for x in (query, key, value))
    return (resident("VmHWM") - before) / inputs


def measure_elsewhere(length: int, key_heads: int) -> float:
    """`measure` in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", str(length), str(key_heads)],
        cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return float(done.stdout)


if __name__ == "__main__":
    print(measure(*map(int, sys.argv[1:])))

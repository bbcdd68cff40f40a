"""Peak extra memory of one FlexPrefill call: python -m bench.memory LENGTH KEY_HEADS

Measured in a process of its own, where nothing freed earlier can serve the call.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from sparse_attn.evaluate.memory import forget_peak, resident
from sparse_attn.ops.flex_prefill_attention import op

from .inputs import gen

HEADS, DIM = 8, 128


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

"""Peak extra memory of a method's call: python -m bench.memory OPERATOR LENGTH KEY_HEADS

Measured in a process of its own, where nothing freed earlier can serve the call.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from sparse_attn.evaluate.memory import forget_peak, resident
from sparse_attn.ops.flex_prefill_attention import op as flex_prefill
from sparse_attn.ops.sale_select import op as sale_select

from .inputs import gen

HEADS, DIM = 8, 128
CALLS = {
    "flex_prefill_attention": lambda q, k, v: flex_prefill(q, k, v, 0.9, backend="cpp"),
    "sale_select": lambda q, k, v: sale_select(q, k, torch.full((HEADS,), 0.004), backend="cpp"),
    "sale_select_shared": lambda q, k, v: sale_select(
        q, k, torch.full((HEADS,), 0.004), share_kv_heads=True, backend="cpp"
    ),
}


def measure(name: str, length: int, key_heads: int) -> float:
    """Peak bytes beyond the inputs, results included, per byte of query, key and value."""
    call = CALLS[name]
    q, k, v = gen(7, length, "mixed", Hq=HEADS, Hkv=key_heads, D=DIM)
    query, key, value = (torch.from_numpy(x).transpose(1, 2).bfloat16() for x in (q, k, v))
    del q, k, v
    call(*(x[:, :, :256] for x in (query, key, value)))  # threads, code pages
    before = forget_peak()
    call(query, key, value)
    inputs = sum(x.numel() * x.element_size() for x in (query, key, value))
    return (resident("VmHWM") - before) / inputs


def measure_elsewhere(name: str, length: int, key_heads: int) -> float:
    """`measure` in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", name, str(length), str(key_heads)],
        cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return float(done.stdout)


if __name__ == "__main__":
    print(measure(sys.argv[1], *map(int, sys.argv[2:])))

"""Own dense attention against PyTorch's over length: where the dense path is worth taking."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_attn import attention

from ..harness import DTYPE, DTYPE_NAME, Report, check, time_in_turn


def run(report: Report) -> None:
    for n in (128, 512, 2048, 8192):
        measure(report, n)


def measure(report: Report, n: int) -> None:
    query, key, value = (torch.randn(1, 8, n, 128).to(DTYPE) for _ in range(3))
    alternatives = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        "ours": lambda: attention(query, key, value, "dense"),
    }
    check(f"dense {n}", alternatives["ours"](), alternatives["sdpa"](), 1e-2)
    seconds = time_in_turn(alternatives, 7)
    report.add(
        f"own dense vs sdpa, {DTYPE_NAME}, 8 x {n} x 128",
        seconds["sdpa"] / seconds["ours"],
        us=seconds["ours"] * 1e6,
    )

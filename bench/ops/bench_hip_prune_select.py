"""InfiniteHiP's stages over growing prompts: the first looks at all keys."""

from __future__ import annotations

import torch

from sparse_attn.methods.infinite_hip import InfiniteHiP
from sparse_attn.ops.hip_prune_select import op

from ..harness import Report, time_in_turn

LENGTHS = (8192, 32768, 131072)


def run(report: Report) -> None:
    for n in LENGTHS:
        generator = torch.Generator().manual_seed(n)
        query, key = (torch.randn(1, 1, n, 64, generator=generator).bfloat16() for _ in range(2))
        last = query[:, :, -4096:]  # of a prompt: what a chunk of a prefill computes
        for name, config in (
            ("3K", InfiniteHiP()),
            ("3K, one stride for all stages", InfiniteHiP(q_strides=(4, 4, 4))),
        ):
            _, arguments = config.selector(last, key, True, None)
            seconds = time_in_turn({"x": lambda a=arguments: op(*a)}, 3)["x"]
            report.add(
                f"InfiniteHiP {name}, last 4096 queries, 1 x {n} x 64, bfloat16: ms", seconds * 1e3
            )

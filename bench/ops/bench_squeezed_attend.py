"""Attention over runs of a sorted context: what short runs cost, and an input of many tokens."""

from __future__ import annotations

import torch

from sparse_attn import attention
from sparse_attn.ops.squeezed_attend import op

from ..harness import Report, check, time_in_turn

HEADS, TOKENS, DIM, SHARE, TAIL = 8, 131072, 128, 0.1, 256


def runs_of_length(length: int) -> list[torch.Tensor]:
    """A tenth of the tokens in runs of one length, evenly spread: starts, sums, counts."""
    n = int(TOKENS * SHARE) // length
    starts = torch.arange(n) * (TOKENS // n)
    sums = (torch.arange(n) + 1) * length
    return [x.int().expand(1, HEADS, -1).contiguous() for x in (starts, sums)] + [
        torch.full((1, HEADS), n, dtype=torch.int32)
    ]


def run(report: Report) -> None:
    torch.manual_seed(0)
    key, value = (torch.randn(1, HEADS, TOKENS, DIM).bfloat16() for _ in range(2))
    tail = [torch.randn(1, HEADS, TAIL, DIM).bfloat16() for _ in range(2)]
    for queries in (1, TAIL):
        query = torch.randn(1, HEADS, queries, DIM).bfloat16()
        lengths = (8, 20, 64, 1024) if queries == 1 else (20, 1024)
        lists = {n: runs_of_length(n) for n in lengths}
        for runs in lists.values():
            args = (query, key, value, *tail, *runs)
            check("attend", op(*args)[0], op(*args, backend="reference")[0], 1e-2)
        seconds = time_in_turn(
            {
                "dense": lambda q=query: attention(q, key, value, "dense", causal=False),
                **{
                    n: lambda q=query, runs=runs: op(q, key, value, *tail, *runs)
                    for n, runs in lists.items()
                },
            },
            9 if queries == 1 else 3,
        )
        for n in lengths:
            report.add(
                f"own dense / kept {SHARE:.0%} in runs of {n}, {queries} queries, bfloat16",
                seconds["dense"] / seconds[n],
                ms=seconds[n] * 1e3,
            )

"""What choosing blocks costs, beside own dense attention over the same prompt."""

from __future__ import annotations

import torch

from sparse_attn import attention
from sparse_attn.ops.flex_prefill_select import op

from ..harness import Report, time_in_turn
from ..inputs import gen


def run(report: Report) -> None:
    for n in (8192, 32768):
        q, k, v = gen(7, n, "mixed", Hq=8, Hkv=2, D=64)
        query, key, value = (torch.from_numpy(x).transpose(1, 2).bfloat16() for x in (q, k, v))
        seconds = time_in_turn(
            {
                "dense": lambda t=(query, key, value): attention(*t, "dense"),
                "select": lambda t=(query, key): op(*t),
            },
            5,
        )
        report.add(
            f"FlexPrefill's selection, share of own dense time, mixed, 8 x {n} x 64",
            seconds["select"] / seconds["dense"],
            ms=seconds["select"] * 1e3,
        )

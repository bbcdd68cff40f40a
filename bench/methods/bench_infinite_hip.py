"""InfiniteHiP's defaults end to end at 32k; bench_hip.py has it beside HiP over budgets."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_attn import InfiniteHiP, attention

from ..harness import DTYPE, DTYPE_NAME, Report, time_in_turn
from ..inputs import gen
from ..recall import attention_mass, best_recall, recall


def run(report: Report) -> None:
    q, k, v = gen(7, 32768, "mixed", Hq=4, Hkv=2, D=64)
    query, key, value = (torch.from_numpy(x).transpose(1, 2).to(DTYPE) for x in (q, k, v))
    wide = [x.repeat_interleave(2, 1) for x in (key, value)]
    masses = attention_mass(query, key, 64, 16)
    for merge in ("none", "group", "all"):
        config = InfiniteHiP(merge_heads=merge)
        seconds = time_in_turn(
            {
                "sdpa": lambda: F.scaled_dot_product_attention(query, *wide, is_causal=True),
                "x": lambda c=config: attention(query, key, value, c, fallback=False),
                "select": lambda c=config: c.select(query, key),
            },
            1,
        )
        report.add(
            f"InfiniteHiP vs sdpa, {DTYPE_NAME}, mixed, 4/2 x 32768 x 64, heads merged: {merge}",
            seconds["sdpa"] / seconds["x"],
            recall=recall(masses, config.select(query, key)),
            best=best_recall(masses, 2048, 8, config.sink, config.window),
            select_share=seconds["select"] / seconds["x"],
            config=str(config),
        )

"""HiP in one call, prefill at 32k and decoding: its parts, and beside dense attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_attn import attention
from sparse_attn.methods.hip import HiP, HiPState
from sparse_attn.ops.hip_attention import op
from sparse_attn.ops.hip_select import op as select

from ..harness import DTYPE, DTYPE_NAME, Report, check, time_in_turn

LENGTH = 32768


def run(report: Report) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, LENGTH, 64, generator=generator).to(DTYPE)
    key, value = (torch.randn(1, 1, LENGTH, 64, generator=generator).to(DTYPE) for _ in range(2))
    wide = [x.expand(-1, 4, -1, -1) for x in (key, value)]
    for share in (False, True):
        options = {"share_kv_heads": share}
        seconds = time_in_turn(
            {
                "sdpa": lambda: F.scaled_dot_product_attention(query, *wide, is_causal=True),
                "hip": lambda o=options: op(query, key, value, **o),
                "select": lambda o=options: select(query, key, **o),
            },
            1,
        )
        report.add(
            f"HiP k = 512 vs sdpa, 4/1 x {LENGTH} x 64, {DTYPE_NAME}, shared {share}",
            seconds["sdpa"] / seconds["hip"],
            select_share=seconds["select"] / seconds["hip"],
            ms=seconds["hip"] * 1e3,
        )
    decode(report)


def decode(report: Report) -> None:
    """One token on a cache: every step searched, and one in eight."""
    generator = torch.Generator().manual_seed(1)
    for n in (32768, 131072):
        query = torch.randn(1, 32, 1, 128, generator=generator).bfloat16()
        cache = [torch.randn(1, 8, n, 128, generator=generator).bfloat16() for _ in range(2)]
        time_decoding(report, n, query, *cache)


def time_decoding(
    report: Report, n: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    full = HiPState(HiP(budget=n, share_kv_heads=True))
    dense = attention(query, key, value, "dense")
    check("all keys", full.attention(query, key, value)[0], dense, 1e-2)

    def steps(state: HiPState) -> None:
        for _ in range(8):
            state.attention(query, key, value)

    states = {r: HiPState(HiP(budget=512, share_kv_heads=True), r) for r in (1, 8)}
    seconds = time_in_turn(
        {
            "dense": lambda: [attention(query, key, value, "dense") for _ in range(8)],
            "fresh": lambda: steps(states[1]),
            "reused": lambda: steps(states[8]),
        },
        3,
    )
    for name in ("fresh", "reused"):
        report.add(
            f"decoding vs own dense, 32/8 x {n} x 128, k = 512, {name}",
            seconds["dense"] / seconds[name],
            us=seconds[name] / 8 * 1e6,
        )

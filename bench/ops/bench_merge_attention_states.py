"""Joining two attention results against the same formula in plain PyTorch."""

from __future__ import annotations

import torch

from sparse_attn.brief import dtype_name
from sparse_attn.ops.merge_attention_states import op

from ..harness import Report, check, time_in_turn


def plain(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> torch.Tensor:
    share = torch.sigmoid(lse_a - lse_b)[..., None]
    return (out_a * share + out_b * (1 - share)).to(out_a.dtype)


def run(report: Report) -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        outs = [torch.randn(1, 8, 8192, 128).to(dtype) for _ in range(2)]
        states = (outs[0], torch.randn(1, 8, 8192), outs[1], torch.randn(1, 8, 8192))
        check("merge", op(*states)[0], plain(*states), 1e-2)
        seconds = time_in_turn(
            {"plain": lambda s=states: plain(*s), "ours": lambda s=states: op(*s)}
        )
        name = dtype_name(dtype)
        report.add(
            f"merge vs plain PyTorch, {name}, 8 x 8192 x 128",
            seconds["plain"] / seconds["ours"],
            us=seconds["ours"] * 1e6,
        )

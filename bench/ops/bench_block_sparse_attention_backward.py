"""Gradients of block-sparse attention against those of PyTorch's dense attention on this CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_attn import BlockIndex
from sparse_attn.brief import dtype_name
from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.block_sparse_attention_backward import op

from ..harness import Report, check, time_in_turn
from .bench_block_sparse_attention import DIM, HEADS, random_index

TOKENS = 4096


def run(report: Report) -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        gradients(report, dtype)


def gradients(report: Report, dtype: torch.dtype) -> None:
    name = dtype_name(dtype)
    query, key, value, grad = (torch.randn(1, HEADS, TOKENS, DIM).to(dtype) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    dense = F.scaled_dot_product_attention(*leaves, is_causal=True)

    def of_dense() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(dense, leaves, grad, retain_graph=True)

    indices = {1.0: BlockIndex.full(TOKENS, TOKENS, 64, 64)}
    indices |= {share: random_index(share, 64, TOKENS) for share in (0.1, 0.25)}
    alternatives = {"sdpa": of_dense, "forward": lambda: attend(query, key, value, *indices[1.0])}
    for share, index in indices.items():
        states = attend(query, key, value, *index.blocks)
        alternatives[f"{share}"] = lambda index=index, states=states: op(
            grad, None, query, key, value, *states, *index.blocks
        )
    for what, got, want in zip("qkv", alternatives["1.0"](), of_dense(), strict=True):
        check(f"d{what} {name}", got, want, 2e-2)
    seconds = time_in_turn(alternatives, 3)
    report.add(
        f"own dense backward vs sdpa's, {name}, {HEADS} x {TOKENS} x {DIM}",
        seconds["sdpa"] / seconds["1.0"],
        of_forward=seconds["1.0"] / seconds["forward"],
    )
    for share, index in indices.items():
        if share < 1:
            report.add(
                f"sparse backward vs sdpa's, {name}, density {index.density(TOKENS, TOKENS):.3f}",
                seconds["sdpa"] / seconds[f"{share}"],
                of_own_dense=seconds[f"{share}"] / seconds["1.0"],
            )

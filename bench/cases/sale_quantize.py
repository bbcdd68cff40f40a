"""Cases of sale_quantize; what is compiled: sale_select.py."""

from __future__ import annotations

import torch

from sparse_attn.ops.sale_quantize import op

from ..gpu.check import call
from ..gpu.context import Context
from ..gpu.operators import Sizes, alike, compare
from . import Checks


def quantized(context: Context, backend: str) -> str | None:
    """Codes and steps are the reference's bit by bit, for the mean that the kernel found."""
    for group, block, dim in (("query", 32, 128), ("key", 16, 64), ("key", 32, 96)):
        x = torch.randn(2, 2, context.size(1000, 50), dim).to(torch.bfloat16) + 3
        packed, step, mean = call(context, op, backend, (x, None, group, block))
        if not torch.allclose(mean, x.float().mean(2), rtol=1e-4):
            return f"{group}: wrong mean"
        want = op(x, mean, group, block, backend="reference")
        if not torch.equal(packed, want[0]) or not torch.equal(step, want[1]):
            return f"{group}: codes or steps differ from the reference's"
    return None


def checks(context: Context) -> Checks:
    return [("sale quantize", op.name, quantized, ())]


def timed(context: Context, sizes: Sizes) -> None:
    args = (sizes.query, sizes.query.float().mean(2))
    compare(context, f"sale quantize {sizes.n}", op, args, alike())

"""Cases of sale_estimate; what is compiled: sale_select.py."""

from __future__ import annotations

import torch

from sparse_attn.ops.sale_estimate import op
from sparse_attn.ops.sale_quantize import op as quantize
from sparse_attn.ops.sale_threshold import op as bar

from ..gpu.check import call
from ..gpu.context import Context
from ..gpu.operators import Sizes, alike, compare
from . import Checks


def estimated(context: Context, backend: str) -> str | None:
    """The lists are the reference's bit by bit: rounded biases small and large, bars met or not."""
    shapes = ((3000, 128, 64, 32), (700, 64, 128, 64), (500, 40, 16, 16), (400, 256, 32, 32))
    for n, dim, q_block, kv_block in context.size(shapes, ((200, 32, 64, 32),)):
        query, key = torch.randn(1, 4, n, dim) + 0.5, torch.randn(1, 2, n, dim)
        codes, steps, mean = quantize(query, None, "query", backend="reference")
        keys = quantize(key, None, "key", kv_block, backend="reference")
        wide = (key - keys[2][:, :, None]).repeat_interleave(2, 1)
        bias = (wide @ mean[..., None])[..., 0]
        for size in (1.0, 1e7):
            theta = dim**0.5 * (3.5 + 0.4 * torch.randn(1, 4, n)) * size
            args = (codes, steps, *keys[:2], bias * size, theta, q_block, kv_block)
            want = op(*args, backend="reference")
            got = call(context, op, backend, args)
            if not all(torch.equal(x, y) for x, y in zip(got, want, strict=True)):
                return f"lists differ from the reference's at {n}, {dim}, {q_block}, {kv_block}"
    return None


def checks(context: Context) -> Checks:
    return [("sale estimate", op.name, estimated, ())]


def timed(context: Context, sizes: Sizes) -> None:
    query, key = sizes.query, sizes.key
    query_mean, key_mean = (x.float().mean(2) for x in (query, key))
    codes, steps, _ = quantize(query, query_mean)
    keys, key_steps, _ = quantize(key, key_mean, "key")
    threshold = torch.full((sizes.heads,), 0.004, device=context.device)
    theta = bar(query, key, key_mean, threshold)
    args = (codes, steps, keys, key_steps, torch.zeros_like(theta), theta)
    compare(context, f"sale estimate {sizes.n}", op, args, alike())

"""Cases of flex_prefill_select."""

from __future__ import annotations

import torch

from sparse_attn import BlockIndex
from sparse_attn.ops.flex_prefill_select import op

from ..aot import DTYPES
from ..cuda_aot import empty
from ..gpu.check import call
from ..gpu.context import Context
from ..gpu.operators import Sizes, compare
from . import Cases, Checks, Launches


def compiled(dtype: str, head_dim: int, block: int = 128, gamma: float = 0.95) -> None:
    from sparse_attn.triton_kernels.flex_prefill_select import flex_prefill_select as run

    query = torch.empty(1, 8, 131072, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, 131072, head_dim, dtype=DTYPES[dtype], device="cuda")
    run(query, key, gamma, block_size=block)


def triton(quick: bool) -> Cases:
    found: Cases = {"select everything bf16 128": (compiled, "bf16", 128, 128, 1.0)}
    for dtype in ("bf16", "f32") if quick else DTYPES:
        for d in (128,) if quick else (64, 128, 256):
            found[f"select {dtype} {d}"] = (compiled, dtype, d)
    if not quick:
        found["select bf16 128, blocks of 64"] = (compiled, "bf16", 128, 64)
    return found


def launched(dtype: torch.dtype, dim: int) -> None:
    from sparse_attn.nvrtc.flex_prefill_select import flex_prefill_select as run

    run(empty(1, 8, 131072, dim, dtype=dtype), empty(1, 2, 131072, dim, dtype=dtype))


def cuda(dtype: torch.dtype, quick: bool) -> Launches:
    return [(launched, (dtype, 256))]  # the widest slices of the probe


def selected(context: Context, backend: str) -> str | None:
    """Sets may differ from the reference's where scores nearly tie: at most 1 % of the blocks."""
    n = context.size(2000, 150)
    for tau in context.size((0.0, 10.0), (10.0,)):
        query = torch.randn(1, context.size(4, 2), n, 64)
        key = torch.randn(1, context.size(2, 1), n, 64)
        key[:, :, :: n // 7] *= 4
        args = (query, key, 0.8, tau, 128, None, 64)
        masks = []
        for name in (backend, "reference"):
            indices, counts, _ = call(context, op, name, args)
            index = BlockIndex(indices, counts, 64, 64)
            index.validate(n, n)
            masks.append(index.to_mask(n))
        differ = (masks[0] != masks[1]).float().mean().item()
        if differ > 0.01:
            return f"{differ:.2%} of the blocks differ at tau={tau}"
    return None


def checks(context: Context) -> Checks:
    return [("select", op.name, selected, ())]


def timed(context: Context, sizes: Sizes) -> None:
    def wrong(indices: torch.Tensor, counts: torch.Tensor, _: torch.Tensor) -> None:
        BlockIndex(indices, counts, 128, 128).validate(sizes.n, sizes.n)

    compare(context, f"select {sizes.heads} x {sizes.n}", op, (sizes.query, sizes.key), wrong)

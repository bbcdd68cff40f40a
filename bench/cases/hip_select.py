"""Cases of hip_select."""

from __future__ import annotations

from typing import Any

import torch

from sparse_attn.ops.hip_select import op
from sparse_attn.registry import Op

from ..aot import DTYPES
from ..cuda_aot import empty
from ..gpu.check import call
from ..gpu.context import Context
from . import Cases, Checks, Launches


def compiled(dtype: str, head_dim: int, n_queries: int = 8192, **options: Any) -> None:
    from sparse_attn.triton_kernels.hip_select import hip_select as run

    query = torch.empty(1, 8, n_queries, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, 131072, head_dim, dtype=DTYPES[dtype], device="cuda")
    run(query, key, **options)


def paged(dtype: str, head_dim: int) -> None:
    from sparse_attn.triton_kernels.hip_select import hip_select as run

    query = torch.empty(4, 8, 1, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(4096, 2, 64, head_dim, dtype=DTYPES[dtype], device="cuda")
    table = torch.empty(4, 1024, dtype=torch.int32, device="cuda")
    lengths = torch.empty(4, dtype=torch.int32, device="cuda")
    run(query, key, q_block=1, q_stride=1, share_kv_heads=True, block_table=table,
        kv_lengths=lengths)  # fmt: skip


def triton(quick: bool) -> Cases:
    found: Cases = {}
    for dtype in ("bf16",) if quick else ("bf16", "f32"):
        for d in (128,) if quick else (64, 128, 256):
            found[f"hip {dtype} {d}"] = (compiled, dtype, d)
    return found if quick else found | {"hip paged decode bf16 128": (paged, "bf16", 128)}


def launched(dtype: torch.dtype, dim: int) -> None:
    from sparse_attn.nvrtc.hip_select import hip_select as run

    run(*(empty(1, heads, 131072, dim, dtype=dtype) for heads in (8, 2)))


def cuda(dtype: torch.dtype, quick: bool) -> Launches:
    return [(launched, (dtype, dim)) for dim in ((128,) if quick else (64, 128, 256))]


def searched(context: Context, backend: str, op: Op, options: tuple[Any, ...]) -> str | None:
    """Whole numbers: every sum is exact, most scores tie, and the choice is one."""
    for n_queries in (context.size(200, 40), 1):
        query, key = (
            torch.randint(-2, 3, (1, heads, n, 64)).to(context.dtype)
            for heads, n in ((4, n_queries), (2, context.size(2000, 300)))
        )
        got, want = (call(context, op, name, (query, key, *options)) for name in
                     (backend, "reference"))  # fmt: skip
        if not all(torch.equal(x, y) for x, y in zip(got, want, strict=True)):
            return f"{n_queries} queries: the choice is another"
    return None


def checks(context: Context) -> Checks:
    return [("HiP's search", op.name, searched, (op, (64, 16, 2, 2, 1, 4, 20)))]

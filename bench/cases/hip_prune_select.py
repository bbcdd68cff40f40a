"""Cases of hip_prune_select."""

from __future__ import annotations

import torch

from sparse_attn.ops.hip_prune_select import op

from ..aot import DTYPES
from ..cuda_aot import empty
from ..gpu.context import Context
from . import Cases, Checks, Launches
from .hip_select import searched


def compiled(dtype: str, head_dim: int, n_queries: int = 8192, q_block: int = 64,
              strides: tuple[int, ...] = (4, 4, 1), merge: str = "none") -> None:  # fmt: skip
    from sparse_attn.triton_kernels.hip_prune_select import hip_prune_select as run

    query = torch.empty(1, 8, n_queries, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, 131072, head_dim, dtype=DTYPES[dtype], device="cuda")
    run(query, key, [256, 32, 8], [32768, 8192, 2048], strides, q_block, merge_heads=merge)


def triton(quick: bool) -> Cases:
    found: Cases = {}
    for dtype in ("bf16",) if quick else ("bf16", "f32"):
        for d in (128,) if quick else (64, 128, 256):
            found[f"hip prune {dtype} {d}"] = (compiled, dtype, d)
    if not quick:
        found["hip prune decode bf16 128"] = (compiled, "bf16", 128, 1, 1, (1, 1, 1), "group")
    return found


def launched(dtype: torch.dtype, dim: int) -> None:
    from sparse_attn.nvrtc.hip_prune_select import hip_prune_select as run

    query, key = (empty(1, heads, 131072, dim, dtype=dtype) for heads in (8, 2))
    run(query, key, [256, 32, 8], [32768, 8192, 2048], [4, 4, 1])


def cuda(dtype: torch.dtype, quick: bool) -> Launches:
    return [(launched, (dtype, dim)) for dim in ((128,) if quick else (64, 128, 256))]


def checks(context: Context) -> Checks:
    options = ([64, 16, 4], [512, 128, 48], [2, 1, 1], 16, 4, 20)
    return [("HiP's stages", op.name, searched, (op, options))]

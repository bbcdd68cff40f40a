"""Cases of squeezed_attend; checked together: squeezed_attention.py."""

from __future__ import annotations

import torch

from ..aot import DTYPES
from ..cuda_aot import empty
from . import Cases, Launches


def compiled(dtype: str, head_dim: int, n_queries: int, value_dim: int = 0) -> None:
    from sparse_attn.triton_kernels.squeezed_attend import squeezed_attend as run

    def keys(*tokens: int) -> list[torch.Tensor]:
        return [
            torch.empty(1, 2, n, d, dtype=DTYPES[dtype], device="cuda")
            for n in tokens
            for d in (head_dim, value_dim or head_dim)
        ]

    query = torch.empty(1, 8, n_queries, head_dim, dtype=DTYPES[dtype], device="cuda")
    starts = torch.empty(1, 2, 3250, dtype=torch.int32, device="cuda")
    counts = torch.empty(1, 2, dtype=torch.int32, device="cuda")
    lengths = torch.empty(1, dtype=torch.int32, device="cuda")
    run(query, *keys(131072, 1200), starts, starts, counts, lengths)


def triton(quick: bool) -> Cases:
    found: Cases = {}
    for dtype in ("bf16",) if quick else ("bf16", "f32"):
        for d in (128,) if quick else (64, 128, 256):
            for call, n_queries in (("", 1024), (", decode", 1)):
                found[f"squeezed attend{call} {dtype} {d}"] = (compiled, dtype, d, n_queries)
    return found


def launched(dtype: torch.dtype, dim: int, n_queries: int) -> None:
    from sparse_attn.nvrtc.squeezed_attend import squeezed_attend as run

    context, tail = empty(1, 2, 131072, dim, dtype=dtype), empty(1, 2, 1200, dim, dtype=dtype)
    starts, counts = empty(1, 2, 3250, dtype=torch.int32), empty(1, 2, dtype=torch.int32)
    query = empty(1, 8, n_queries, dim, dtype=dtype)
    run(query, context, context, tail, tail, starts, starts, counts)


def cuda(dtype: torch.dtype, quick: bool) -> Launches:
    return [
        (launched, (dtype, dim, n_queries))
        for dim in ((128,) if quick else (64, 96, 128, 256))
        for n_queries in ((1, 1024) if quick else (1, 16, 1024))
    ]

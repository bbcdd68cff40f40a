"""Cases of squeezed_lookup; checked together: squeezed_attention.py."""

from __future__ import annotations

import torch

from ..aot import DTYPES
from ..cuda_aot import empty
from . import Cases, Launches


def compiled(dtype: str, head_dim: int, n_queries: int) -> None:
    from sparse_attn.triton_kernels.squeezed_lookup import squeezed_lookup as run

    def level(clusters: int) -> tuple[torch.Tensor, ...]:
        return (
            torch.empty(1, 2, clusters, head_dim, dtype=DTYPES[dtype], device="cuda"),
            torch.empty(1, 2, clusters, device="cuda"),
            torch.empty(1, 2, clusters + 1, dtype=torch.int32, device="cuda"),
            torch.empty((), device="cuda"),
        )

    query = torch.empty(1, 8, n_queries, head_dim, dtype=DTYPES[dtype], device="cuda")
    run(query, *level(6500), *level(1300))


def triton(quick: bool) -> Cases:
    found: Cases = {}
    for dtype in ("bf16",) if quick else ("bf16", "f32"):
        for d in (128,) if quick else (64, 128, 256):
            for call, n_queries in (("", 1024), (", decode", 1)):
                found[f"squeezed lookup{call} {dtype} {d}"] = (compiled, dtype, d, n_queries)
    return found


def launched(dtype: torch.dtype, dim: int, n_queries: int) -> None:
    from sparse_attn.nvrtc.squeezed_lookup import squeezed_lookup as run

    def level(clusters: int) -> tuple[torch.Tensor, ...]:
        return (
            empty(1, 2, clusters, dim, dtype=dtype), empty(1, 2, clusters),
            empty(1, 2, clusters + 1, dtype=torch.int32), empty(),
        )  # fmt: skip

    run(empty(1, 8, n_queries, dim, dtype=dtype), *level(6500), *level(1300))


def cuda(dtype: torch.dtype, quick: bool) -> Launches:
    return [
        (launched, (dtype, dim, n_queries))
        for dim in ((128,) if quick else (64, 96, 128, 256))
        for n_queries in ((1, 1024) if quick else (1, 16, 1024))
    ]

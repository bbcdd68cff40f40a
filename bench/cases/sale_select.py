"""Cases of sale_select's three operators in a row: sale_quantize, _threshold and _estimate."""

from __future__ import annotations

import torch

from ..aot import DTYPES
from ..cuda_aot import empty
from . import Cases, Launches


def compiled(dtype: str, head_dim: int, q_block: int = 64, kv_block: int = 32) -> None:
    from sparse_attn.triton_kernels.sale_estimate import sale_estimate
    from sparse_attn.triton_kernels.sale_quantize import sale_quantize
    from sparse_attn.triton_kernels.sale_threshold import sale_threshold

    n = 131072
    query = torch.empty(1, 8, n, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, n, head_dim, dtype=DTYPES[dtype], device="cuda")
    query_packed, query_step, _ = sale_quantize(query)
    key_packed, key_step, mean = sale_quantize(key, None, "key", kv_block)
    threshold, rows = torch.empty(8, device="cuda"), torch.empty(1, 8, n, device="cuda")
    sale_threshold(query, key, mean, threshold, q_block, kv_block)
    sale_estimate(query_packed, query_step, key_packed, key_step, rows, rows, q_block, kv_block)


def triton(quick: bool) -> Cases:
    found: Cases = {"sale bf16 128": (compiled, "bf16", 128)}
    if not quick:
        found |= {f"sale bf16 {d}": (compiled, "bf16", d) for d in (64, 256)}
        found["sale f32 128"] = (compiled, "f32", 128)
        found["sale, blocks of 16 bf16 128"] = (compiled, "bf16", 128, 16, 16)
        found["sale, blocks of 128 and 64 bf16 128"] = (compiled, "bf16", 128, 128, 64)
    return found


def launched(dtype: torch.dtype, dim: int, kv_block: int = 32) -> None:
    from sparse_attn.nvrtc.sale_estimate import sale_estimate
    from sparse_attn.nvrtc.sale_quantize import sale_quantize
    from sparse_attn.nvrtc.sale_threshold import sale_threshold

    n = 131072
    query, key = empty(1, 8, n, dim, dtype=dtype), empty(1, 2, n, dim, dtype=dtype)
    query_packed, query_step, _ = sale_quantize(query)
    key_packed, key_step, mean = sale_quantize(key, None, "key", kv_block)
    sale_threshold(query, key, mean, empty(8), 64, kv_block)
    rows = empty(1, 8, n)
    sale_estimate(query_packed, query_step, key_packed, key_step, rows, rows, 64, kv_block)


def cuda(dtype: torch.dtype, quick: bool) -> Launches:
    dims = (128, 256) if quick else (64, 96, 128, 256, 40)
    found: Launches = [(launched, (dtype, dim)) for dim in dims]
    if not quick:
        found += [(launched, (dtype, 128, kv_block)) for kv_block in (16, 64)]
    return found

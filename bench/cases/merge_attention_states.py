"""Cases of merge_attention_states."""

from __future__ import annotations

import torch

from sparse_attn.ops.merge_attention_states import op

from ..aot import DTYPES
from ..cuda_aot import empty
from ..gpu.check import apart, call, double
from ..gpu.context import Context
from ..gpu.operators import Sizes, compare
from . import Cases, Checks, Launches


def compiled(dtype: str, head_dim: int) -> None:
    from sparse_attn.triton_kernels.merge_attention_states import merge_attention_states as run

    out = torch.empty(1, 8, 4096, head_dim, dtype=DTYPES[dtype], device="cuda")
    lse = torch.empty(1, 8, 4096, device="cuda")
    run(out, lse, out, lse)


def triton(quick: bool) -> Cases:
    dtypes = ("bf16",) if quick else DTYPES
    return {f"merge {dtype} 128": (compiled, dtype, 128) for dtype in dtypes}


def launched(dtype: torch.dtype, dv: int) -> None:
    from sparse_attn.nvrtc.merge_attention_states import merge_attention_states as run

    out, lse = empty(1, 8, 4096, dv, dtype=dtype), empty(1, 8, 4096)
    run(out, lse, out, lse)


def cuda(dtype: torch.dtype, quick: bool) -> Launches:
    return [(launched, (dtype, dv)) for dv in ((128,) if quick else (128, 5))]


def merged(context: Context, backend: str) -> str | None:
    out, lse = (torch.randn(2, 2, 4, 300, d) for d in (128, 1))
    lse = lse[..., 0].clone()
    lse[0, 0, 0, :5] = -torch.inf
    args = (out[0], lse[0], out[1], lse[1])
    want = op(*double(args), backend="reference")
    got = call(context, op, backend, args)
    return apart(got[0], want[0], 1e-6) or apart(got[1], want[1], 1e-6)


def checks(context: Context) -> Checks:
    return [("merge", op.name, merged, ())]


def timed(context: Context, sizes: Sizes) -> None:
    query, few = sizes.query, torch.randn(1, sizes.heads, sizes.n, device=context.device)
    states = (query, few, query * 2, few + 1)
    exact = op(*(x.double() for x in states), backend="reference")
    compare(context, f"merge {sizes.heads} x {sizes.n}", op, states, lambda out, _: apart(
        out, exact[0], 1e-2))  # fmt: skip

"""Cases of block_sparse_attention_backward."""

from __future__ import annotations

from typing import Any

import torch

from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.block_sparse_attention_backward import op

from ..aot import DTYPES
from ..gpu.baselines import TOLERANCE as OF_GRADIENT
from ..gpu.cases import random_index, tensors
from ..gpu.check import TOLERANCE, apart, call, double
from ..gpu.context import Context
from ..gpu.operators import Sizes, compare
from . import Cases, Checks
from .block_sparse_attention import attention_inputs, shapes_of


def compiled(dtype: str, head_dim: int, block: int = 128, edges: bool = False,
             value_dim: int = 0) -> None:  # fmt: skip
    from sparse_attn.triton_kernels.block_sparse_attention_backward import (
        block_sparse_attention_backward as run,
    )

    from sparse_attn.block_index import BlockIndex

    n = 4096
    query = torch.empty(1, 8, n, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, n, head_dim, dtype=DTYPES[dtype], device="cuda")
    value = torch.empty(1, 2, n, value_dim or head_dim, dtype=DTYPES[dtype], device="cuda")
    out = torch.empty(1, 8, n, value_dim or head_dim, dtype=DTYPES[dtype], device="cuda")
    lse = torch.empty(1, 8, n, device="cuda")
    counts = torch.empty(1, 2, n // block, dtype=torch.int32, device="cuda")
    indices = torch.empty(1, 2, n // block, n // block, dtype=torch.int32, device="cuda")
    # a torch without CUDA makes tensors there but cannot compare or sort them
    offsets, rows = counts.new_empty(1, 2, n // block + 1), indices.flatten(2)
    BlockIndex.transpose = lambda index, n_keys: (offsets, rows)
    run(out, lse, query, key, value, out, lse, indices, counts, block, block, True,
        *(64, 64) if edges else (0, 0))  # fmt: skip


def triton(quick: bool) -> Cases:
    found: Cases = {}
    for dtype in ("bf16", "f32") if quick else DTYPES:
        for d in (128,) if quick else (64, 128, 256):
            found[f"backward {dtype} {d}"] = (compiled, dtype, d)
    if not quick:
        for d in (64, 128, 256):
            found[f"backward, sink+window bf16 {d}"] = (compiled, "bf16", d, 128, True)
        found["backward, blocks of 16 bf16 128"] = (compiled, "bf16", 128, 16)
        found["backward bf16 192, values 128"] = (compiled, "bf16", 192, 128, False, 128)
    return found


def backward(context: Context, backend: str, shape: tuple, dtype: torch.dtype) -> str | None:
    query, key, value, *rest = attention_inputs(shape, dtype)
    out, lse = attend(query, key, value, *rest, backend="reference")
    grads = torch.randn_like(out), torch.randn_like(lse)
    args = (*grads, query, key, value, out, lse, *rest)
    want = op(*double(args), backend="reference")
    got, again = (call(context, op, backend, args) for _ in range(2))
    for name, x, y, exact in zip(("query", "key", "value"), got, again, want, strict=True):
        problem = apart(x, exact, TOLERANCE[dtype])
        if problem or not torch.equal(x, y):
            return f"grad_{name}: {problem or 'two runs differ'}"
    return None


def checks(context: Context) -> Checks:
    return [
        (f"backward {shape} {dtype}".replace("torch.", ""), op.name, backward, (shape, dtype))
        for shape, dtypes in shapes_of(context)[:2]
        for dtype in dtypes
    ]


def timed(context: Context, sizes: Sizes) -> None:
    half, heads = sizes.n // 2, sizes.heads
    query, key, value = tensors(context, half, half, heads, sizes.key_heads)
    index, _ = random_index(half, heads, 0.25, context.device)
    one(context, f"backward {half}, a quarter", query, key, value, *index.blocks)
    one(context, f"backward {half}, sink+window", query, key, value, *index.blocks, True, 4, 512)


def one(context: Context, what: str, *args: Any) -> None:
    out, lse = attend(*args, backend="reference")
    args = (torch.randn_like(out), None, *args[:3], out, lse, *args[3:])
    exact = op(*args, backend="reference")  # in float32

    def wrong(*grads: torch.Tensor) -> str | None:
        found = (apart(x, y.double(), OF_GRADIENT) for x, y in zip(grads, exact, strict=True))
        return next(filter(None, found), None)

    compare(context, what, op, args, wrong)

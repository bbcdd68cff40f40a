"""Cases of block_sparse_attention."""

from __future__ import annotations

from typing import Any

import torch

from sparse_attn import BlockIndex
from sparse_attn.ops.block_sparse_attention import op

from ..aot import DTYPES
from ..cuda_aot import empty
from ..gpu.baselines import TOLERANCE as OF_ROWS
from ..gpu.cases import random_index, rows_error
from ..gpu.check import TOLERANCE, apart, call, double
from ..gpu.context import Context
from ..gpu.operators import Sizes, compare
from . import Cases, Checks, Launches

BF16, ALL = (torch.bfloat16,), tuple(TOLERANCE)
# (B, Hq, Hkv, Hi, Tq, Tk, D, Dv, q_block, kv_block, causal, sink, window), dtypes
SHAPES = [
    ((1, 4, 2, 4, 300, 300, 128, 128, 128, 128, True, 0, 0), ALL),
    ((2, 4, 2, 2, 200, 333, 64, 64, 64, 64, True, 7, 40), BF16),
    ((1, 8, 2, 2, 1, 4000, 128, 128, 1, 16, True, 0, 0), ALL),
    ((1, 4, 1, 1, 70, 300, 96, 40, 16, 3, False, 5, 0), BF16),
    ((1, 2, 2, 1, 130, 257, 256, 256, 128, 32, True, 0, 0), BF16),
]
DRY = [((1, 4, 1, 1, 20, 100, 32, 24, 16, 3, False, 5, 0), BF16)]


def compiled(dtype: str, head_dim: int, n_queries: int, q_block: int = 128, kv_block: int = 128,
              edges: bool = False, value_dim: int = 0, heads: int = 8,
              page: int = 0) -> None:  # fmt: skip
    from sparse_attn.triton_kernels.block_sparse_attention import block_sparse_attention as run

    n_keys = 8192
    query = torch.empty(1, heads, n_queries, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, n_keys, head_dim, dtype=DTYPES[dtype], device="cuda")
    value = torch.empty(1, 2, n_keys, value_dim or head_dim, dtype=DTYPES[dtype], device="cuda")
    cache = {}
    if page:
        key, value = (x.view(2, n_keys // page, page, -1).transpose(0, 1) for x in (key, value))
        table = torch.empty(1, n_keys // page, dtype=torch.int32, device="cuda")
        cache = {"block_table": table, "kv_lengths": table.new_empty(1)}
    rows, blocks = -(-n_queries // q_block), n_keys // kv_block
    counts = torch.empty(1, 2, rows, dtype=torch.int32, device="cuda")
    indices = torch.empty(1, 2, rows, blocks, dtype=torch.int32, device="cuda")
    sink = window = 64 if edges else 0
    run(query, key, value, indices, counts, q_block, kv_block, True, sink, window, **cache)


def triton(quick: bool) -> Cases:
    found: Cases = {}
    for dtype in ("bf16", "f32") if quick else DTYPES:
        for d in (128,) if quick else (64, 128, 256):
            found[f"prefill {dtype} {d}"] = (compiled, dtype, d, 4096)
            found[f"decode {dtype} {d}"] = (compiled, dtype, d, 1, 1, 16, True)
            if not quick:
                found[f"sink+window {dtype} {d}"] = (compiled, dtype, d, 4096, 128, 128, True)
                found[f"blocks of 64 {dtype} {d}"] = (compiled, dtype, d, 4096, 64, 64)
                found[f"blocks of 16 {dtype} {d}"] = (compiled, dtype, d, 4096, 16, 16)
                found[f"gathered tokens {dtype} {d}"] = (compiled, dtype, d, 4096, 128, 1, True)
    if not quick:
        for d in (64, 128, 256):
            paged = True, 0, 8, 16  # sink and window; pages of 16
            found[f"paged decode bf16 {d}"] = (compiled, "bf16", d, 1, 1, 16, *paged)
            found[f"paged prefill bf16 {d}"] = (compiled, "bf16", d, 4096, 128, 128, *paged)
        found["prefill bf16 96"] = (compiled, "bf16", 96, 4096)
        found["prefill bf16 192, values 128"] = (compiled, "bf16", 192, 4096, 128, 128, False, 128)
    return found


def launched(dtype: torch.dtype, dim: int, q_block: int, n_queries: int = 4096) -> None:
    """Paged: the same kernels, with more shared memory."""
    from sparse_attn.nvrtc.block_sparse_attention import block_sparse_attention as run

    query = empty(1, 8, n_queries, dim, dtype=dtype)
    key = empty(1024, 2, 16, dim, dtype=dtype)
    table = empty(1, 512, dtype=torch.int32)
    counts = empty(1, 2, -(-n_queries // q_block), dtype=torch.int32)
    indices = empty(*counts.shape, 64, dtype=torch.int32)
    run(query, key, key, indices, counts, q_block, 128, True, 0, 0, None, table, table[:, 0])


def cuda(dtype: torch.dtype, quick: bool) -> Launches:
    found: Launches = []
    for dim in (64, 128) if quick else (64, 96, 128, 256):
        found.append((launched, (dtype, dim, 128)))  # 128 rows, or 64
        found.append((launched, (dtype, dim, 1, 1)))  # decoding: 16 rows
        if not quick:
            found.append((launched, (dtype, dim, 16)))  # 64 rows
    return found


def shapes_of(context: Context) -> list[tuple[tuple, tuple[torch.dtype, ...]]]:
    """Sizes of attention, with the dtypes that each is for."""
    return DRY if context.dry else SHAPES


def attention_inputs(shape: tuple, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of block_sparse_attention."""
    batch, heads, key_heads, list_heads, n_queries, n_keys, dim, value_dim, *rest = shape
    q_block, kv_block, causal, sink, window = rest
    query, key, value = (
        torch.randn(batch, n, h, d, dtype=dtype).transpose(1, 2)
        for n, h, d in ((n_queries, heads, dim), (n_keys, key_heads, dim),
                        (n_keys, key_heads, value_dim))
    )  # fmt: skip
    mask = torch.rand(batch, list_heads, -(-n_queries // q_block), -(-n_keys // kv_block)) < 0.4
    index = BlockIndex.from_mask(mask, q_block, kv_block)
    return query, key, value, *index.blocks, causal, sink, window


def attention(context: Context, backend: str, shape: tuple, dtype: torch.dtype) -> str | None:
    args = attention_inputs(shape, dtype)
    want, want_lse = op(*double(args), backend="reference")
    out, lse = call(context, op, backend, args)
    again, _ = call(context, op, backend, args)
    if not torch.equal(out, again):
        return "two runs differ"
    seen = want_lse.isfinite()
    if not torch.equal(lse.isfinite(), seen):
        return "lse is infinite in the wrong rows"
    return apart(out, want, TOLERANCE[dtype]) or apart(lse[seen], want_lse[seen], 1e-4)


def paged(context: Context, backend: str, page_size: int) -> str | None:
    """Keys in shuffled pages give the bits that they give in one piece."""
    room = context.size(1024, 256)
    shape = (2, 4, 2, 2, context.size(100, 20), room, 128, 128, 32, 64, True, 7, 40)
    query, key, value, *rest = attention_inputs(shape, torch.bfloat16)
    lengths = torch.tensor([room - 5, 33], dtype=torch.int32)
    order = torch.randperm(2 * room // page_size)
    pages = []
    for x in (key, value):
        cache = x.new_empty(len(order), page_size, 2, 128)
        cache[order] = x.transpose(1, 2).reshape(cache.shape)
        pages.append(cache.transpose(1, 2))
    table = order.int().view(2, -1)
    want = call(context, op, backend, (query, key, value, *rest, None, None, lengths))
    got = call(context, op, backend, (query, *pages, *rest, None, table, lengths))
    exact = op(*double((query, key, value, *rest)), kv_lengths=lengths, backend="reference")
    if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
        return "differs from keys in one piece"
    return apart(got[0], exact[0], TOLERANCE[torch.bfloat16])


def checks(context: Context) -> Checks:
    found: Checks = [
        (f"attention {shape} {dtype}".replace("torch.", ""), op.name, attention, (shape, dtype))
        for shape, dtypes in shapes_of(context)
        for dtype in dtypes
    ]
    return found + [(f"pages of {n}", op.name, paged, (n,)) for n in (16, 128)]


def timed(context: Context, sizes: Sizes) -> None:
    n, heads, key_heads, query, key, value = sizes
    index, _ = random_index(n, heads, 0.25, context.device)
    one(context, f"prefill {n}, a quarter", query, key, value, index)
    small, _ = random_index(n, key_heads, 0.02, context.device, context.size(16, 64))
    one(context, f"prefill {n}, blocks of {small.q_block}", query, key, value, small)
    none = BlockIndex(index.indices[..., :0], index.counts * 0, 128, 128)
    one(context, f"prefill {n}, window 4096", query, key, value, none, 4, 4096)
    last = [x[:, :key_heads, -1:].contiguous() for x in index[:2]]
    one(context, f"decode {n}, a quarter", query[:, :, -1:], key, value,
        BlockIndex(*last, 128, 128))  # fmt: skip


def one(
    context: Context,
    what: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex,
    sink: int = 0,
    window: int = 0,
) -> None:
    def wrong(out: torch.Tensor, lse: torch.Tensor) -> str | None:
        error = rows_error(query, key, value, out, index, sink, window)
        return None if error <= OF_ROWS else f"relative error {error:.3g}"

    compare(context, what, op, (query, key, value, *index.blocks, True, sink, window), wrong)

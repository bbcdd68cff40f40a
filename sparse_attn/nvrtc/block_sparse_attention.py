"""`block_sparse_attention`; see csrc/cuda/block_sparse_attention_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from ..ops.block_sparse_attention import op
from . import launch
from .launch import Bool, DeviceLimits, DType, Float, Int32, Int64, LaunchPlan, Pointer, Strides

DIMS = (64, 96, 128, 256)
STAGES, WORK_BYTES, MOST_SPLITS = 3, 256, 128
TENSORS = ("query", "key", "value", "out", "indices", "counts")


class Call(ctypes.Structure):
    """BlockSparseAttentionParams in csrc/common/params.h."""

    _fields_ = [
        *((n, Pointer) for n in ("query", "key", "value", "indices", "counts", "out", "lse")),
        *((f"{n}_stride", Strides) for n in TENSORS),
        *((n, Int64) for n in ("B", "Hq", "Hkv", "Hi", "Tq", "Tk", "D", "Dv", "Mq", "K")),
        *((n, Int64) for n in ("q_block", "kv_block", "sink", "window")),
        ("scale", Float), ("causal", Bool), ("dtype", DType),
        *((n, Pointer) for n in ("block_table", "kv_lengths")),
        *((n, Int64) for n in ("block_table_stride", "pages", "page_bits")),
    ]  # fmt: skip


class Params(ctypes.Structure):
    """BlockSparseAttentionCudaParams in csrc/cuda/block_sparse_attention_tile.h."""

    _anonymous_ = ("call",)
    _fields_ = [
        ("call", Call),
        *((n, Int32) for n in ("key_row_bytes", "value_row_bytes")),
        *((n, Int64) for n in ("key_page_bytes", "value_page_bytes")),
        *((n, Int32) for n in ("queries", "heads", "query_tiles", "head_tiles", "splits")),
        *((n, Pointer) for n in ("part_values", "part_stats", "done")),
    ]


class Plan(NamedTuple):
    launch: LaunchPlan
    dim: int
    rows: int
    queries: int
    heads: int
    query_tiles: int
    head_tiles: int
    splits: int
    tiles: int
    done_bytes: int
    values_bytes: int
    stats_bytes: int


def params(query, key, value, indices, counts, q_block, kv_block, causal, sink, window, scale,
           block_table, kv_lengths, out, lse) -> Params:  # fmt: skip
    named = {"query": query, "key": key, "value": value, "out": out, "indices": indices,
             "counts": counts}  # fmt: skip
    p = Params(call=Call(lse=lse.data_ptr(), **{n: x.data_ptr() for n, x in named.items()}))
    for name, x in named.items():
        setattr(p, f"{name}_stride", launch.strides(x))
    p.B, p.Hq, p.Tq, p.D = query.shape
    _, p.Hkv, p.Tk, p.Dv = value.shape
    _, p.Hi, p.Mq, p.K = indices.shape
    p.q_block, p.kv_block, p.sink, p.window = q_block, kv_block, sink, window
    p.scale = p.D**-0.5 if scale is None else scale
    p.causal, p.dtype = causal, launch.DTYPES[query.dtype]
    if kv_lengths is not None:
        p.kv_lengths = kv_lengths.data_ptr()
    if block_table is not None:
        p.block_table, p.block_table_stride = block_table.data_ptr(), block_table.stride(0)
        p.pages, page_size = key.shape[0], key.shape[2]
        p.page_bits, p.Tk = page_size.bit_length() - 1, block_table.shape[1] * page_size
    return p


def _splits(tiles: int, key_tiles: int, processors: int) -> int:
    if tiles >= processors:
        return 1
    return max(1, min(-(-2 * processors // tiles), key_tiles // 4, MOST_SPLITS))


def plan(p: Params, limits: DeviceLimits) -> Plan:
    group, block = p.Hq // p.Hkv, min(p.q_block, p.Tq)
    dim = next(d for d in DIMS if d >= max(p.D, p.Dv))
    most, keys = (128, 64) if dim <= 128 else (64, 32)
    queries = min(block, most)
    heads = min(group, most // queries) if p.Hq // p.Hi >= group else 1
    used = queries * heads
    rows = 16 if used <= 16 else 64 if used <= 64 else 128
    query_tiles, head_tiles = -(-block // queries), -(-group // heads)
    tiles = p.B * p.Hkv * p.Mq * query_tiles * head_tiles
    most_keys = min(p.Tk, p.K * p.kv_block + min(p.sink, p.Tk) + min(p.window, p.Tk))
    splits = _splits(tiles, most_keys // keys, limits.processors)
    scratch = (0, 0, 0)
    if splits > 1:
        parts = tiles * splits * used
        scratch = (-(-tiles * 4 // 16) * 16, parts * p.Dv * 4, parts * 8)
    warps = keys // 16 if rows == 16 else 4
    tokens = 2 * keys * 4 * (2 if p.page_bits else 1)
    shared = rows * dim * 2 + STAGES * keys * dim * 2 + tokens + WORK_BYTES
    return Plan(
        LaunchPlan((tiles * splits, 1, 1), (32 * warps, 1, 1), shared),
        dim, rows, queries, heads, query_tiles, head_tiles, splits, tiles, *scratch,
    )  # fmt: skip


def place(p: Params, found: Plan, memory: int) -> int:
    """Fills what the plan decides; returns the bytes that `memory` must have."""
    p.key_row_bytes, p.value_row_bytes = 2 * p.key_stride[2], 2 * p.value_stride[2]
    p.key_page_bytes, p.value_page_bytes = 2 * p.key_stride[0], 2 * p.value_stride[0]
    for name in ("queries", "heads", "query_tiles", "head_tiles", "splits"):
        setattr(p, name, getattr(found, name))
    p.done = memory
    p.part_values = memory + found.done_bytes
    p.part_stats = memory + found.done_bytes + found.values_bytes
    return found.done_bytes + found.values_bytes + found.stats_bytes


def block_sparse_attention(*args):
    query, key, value, indices, *rest, block_table, kv_lengths = op.bind(*args)
    cache = {"block_table": block_table, "kv_lengths": kv_lengths}
    cache = {n: launch.last_dim_contiguous(x) for n, x in cache.items() if x is not None}
    launch.same_device(query=query, key=key, value=value, indices=indices, counts=rest[0], **cache)
    if block_table is not None and not all(map(launch.rows_are_aligned, (key, value))):
        raise ValueError("key, value: pages must begin at multiples of 16 bytes")
    query, key, value = map(launch.aligned_rows, (query, key, value))
    indices = launch.last_dim_contiguous(indices)
    results = op.empty(query, key, value, indices, *rest)
    given = cache.get("block_table"), cache.get("kv_lengths")
    p = params(query, key, value, indices, *rest, *given, *results)
    found = plan(p, launch.limits(query.device))
    workspace = torch.empty(place(p, found, 0), dtype=torch.uint8, device=query.device)
    place(p, found, workspace.data_ptr())
    workspace[: found.done_bytes].zero_()
    name = f"{launch.NAMES[p.dtype]}, {found.dim}, {found.rows}"
    launch.run(op.name, f"block_sparse_attention_kernel<{name}>", found.launch, p, query.device)
    return results

"""`block_sparse_attention`; see csrc/cuda/block_sparse_attention_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from ..ops.block_sparse_attention import op
from . import attention_tile, launch
from .attention_tile import rows_of, run
from .launch import Bool, DeviceLimits, DType, Float, Int32, Int64, LaunchPlan, Pointer, Strides

MOST_SPLITS = 128
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
    tile = rows_of(max(p.D, p.Dv), block, group, share=p.Hq // p.Hi >= group)
    tiles = p.B * p.Hkv * p.Mq * tile.query_tiles * tile.head_tiles
    most_keys = min(p.Tk, p.K * p.kv_block + min(p.sink, p.Tk) + min(p.window, p.Tk))
    splits = _splits(tiles, most_keys // tile.keys, limits.processors)
    scratch = (0, 0, 0)
    if splits > 1:
        parts = tiles * splits * tile.queries * tile.heads
        scratch = (-(-tiles * 4 // 16) * 16, parts * p.Dv * 4, parts * 8)
    shared = tile.shared_bytes(paged=p.page_bits != 0)
    return Plan(
        LaunchPlan((tiles * splits, 1, 1), (tile.threads, 1, 1), shared), *tile, splits, tiles,
        *scratch,
    )  # fmt: skip


def place(p: Params, found: Plan, memory: int) -> int:
    """Fills what the plan decides; returns the bytes that `memory` must have."""
    p.key_row_bytes, p.value_row_bytes = 2 * p.key_stride[2], 2 * p.value_stride[2]
    p.key_page_bytes, p.value_page_bytes = 2 * p.key_stride[0], 2 * p.value_stride[0]
    return attention_tile.place(p, found, memory)


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
    run(op.name, p, place, plan(p, launch.limits(query.device)), query.device)
    return results

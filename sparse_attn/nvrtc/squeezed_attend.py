"""`squeezed_attend`; see csrc/cuda/squeezed_attend_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from ..ops.squeezed_attend import op
from . import launch
from .attention_tile import place, rows_of, run
from .launch import DeviceLimits, DType, Float, Int32, Int64, LaunchPlan, Pointer, Strides

UNIT_KEYS = 128
TENSORS = ("query", "key", "value", "tail_key", "tail_value")
LISTS = ("starts", "sums", "counts")
Pair = Int64 * 2


class Call(ctypes.Structure):
    """SqueezedAttendParams in csrc/common/params.h, and the strides of the result."""

    _fields_ = [
        *((n, Pointer) for n in (*TENSORS, *LISTS, "tail_lengths", "out", "lse")),
        *((f"{n}_stride", Strides) for n in TENSORS),
        *((f"{n}_stride", Pair) for n in LISTS),
        *((n, Int64) for n in ("B", "Hq", "Hkv", "Hd", "Tq", "Tk", "N", "D", "Dv", "runs")),
        ("scale", Float), ("dtype", DType), ("out_stride", Strides),
    ]  # fmt: skip


class Params(ctypes.Structure):
    """SqueezedAttendCudaParams."""

    _anonymous_ = ("call",)
    _fields_ = [
        ("call", Call),
        *((n, Int32) for n in ("queries", "heads", "query_tiles", "head_tiles")),
        ("items", Int64),
        *((n, Pointer) for n in ("done", "part_values", "part_stats")),
    ]


class Plan(NamedTuple):
    launch: LaunchPlan
    dim: int
    rows: int
    queries: int
    heads: int
    query_tiles: int
    head_tiles: int
    items: int
    done_bytes: int
    values_bytes: int
    stats_bytes: int


def params(query, key, value, tail_key, tail_value, starts, sums, counts, tail_lengths, scale, out,
           lse) -> Params:  # fmt: skip
    p = Params()
    tensors = (query, key, value, tail_key, tail_value)
    for name, x in zip(TENSORS, tensors, strict=True):
        setattr(p, name, x.data_ptr())
        setattr(p, f"{name}_stride", launch.strides(x))
    if key.shape[0] == 1:
        p.key_stride[0] = p.value_stride[0] = 0
    for name, x in zip(LISTS, (starts, sums, counts), strict=True):
        setattr(p, name, x.data_ptr())
        setattr(p, f"{name}_stride", Pair(*x.stride()[:2]))
    p.tail_lengths = 0 if tail_lengths is None else tail_lengths.data_ptr()
    p.out, p.lse, p.out_stride = out.data_ptr(), lse.data_ptr(), launch.strides(out)
    p.B, p.Hq, p.Tq, p.D = query.shape
    _, p.Hkv, p.Tk, p.Dv = value.shape
    p.N = tail_key.shape[2]
    _, p.Hd, p.runs = starts.shape
    p.scale = p.D**-0.5 if scale is None else scale
    p.dtype = launch.DTYPES[query.dtype]
    return p


def plan(p: Params, limits: DeviceLimits) -> Plan:
    tile = rows_of(max(p.D, p.Dv), p.Tq, p.Hq // p.Hd)
    items, used = p.B * p.Hd * tile.head_tiles * tile.query_tiles, tile.queries * tile.heads
    wanted, shared = {16: 3, 64: 2, 128: 1}[tile.rows], tile.shared_bytes()
    resident = max(1, min(wanted, limits.shared_bytes // shared))
    tiles = -(-p.Tk // tile.keys) + -(-p.N // tile.keys)
    blocks = min(resident * limits.processors, items * -(-tiles // (UNIT_KEYS // tile.keys)))
    return Plan(
        LaunchPlan((blocks, 1, 1), (tile.threads, 1, 1), shared), *tile, items,
        -(-items * 4 // 16) * 16, blocks * 2 * used * p.Dv * 4, blocks * 2 * used * 8,
    )  # fmt: skip


def squeezed_attend(*args):
    *tensors, scale = op.bind(*args)
    names = (*TENSORS, *LISTS, "tail_lengths")
    given = {name: x for name, x in zip(names, tensors, strict=True) if x is not None}
    launch.same_device(**given)
    rows = [launch.aligned_rows(x) for x in tensors[:5]]
    starts, sums = map(launch.last_dim_contiguous, tensors[5:7])
    counts, lengths = tensors[7], tensors[8]
    lengths = None if lengths is None else launch.last_dim_contiguous(lengths)
    call = (*rows, starts, sums, counts, lengths, scale)
    results = op.empty(*call)
    p = params(*call, *results)
    device = rows[0].device
    run(op.name, p, place, plan(p, launch.limits(device)), device)
    return results

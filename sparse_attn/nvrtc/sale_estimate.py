"""`sale_estimate`; see csrc/cuda/sale_estimate_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from ..ops.sale_estimate import op
from . import launch
from .launch import DeviceLimits, Int64, LaunchPlan, Pointer, Strides

# csrc/cuda/sale_estimate_params.h
THREADS, UNIT_ROWS, STAGE_KEYS, RECORD_EXTRA, UNIT_BYTES = 128, 64, 128, 8, 640


class Params(ctypes.Structure):
    """SaleEstimateCudaParams, after SaleEstimateParams of csrc/common/params.h."""

    _fields_ = [
        *((n, Pointer) for n in ("query", "key", "query_step", "key_step", "key_bias", "theta")),
        *((n, Pointer) for n in ("indices", "counts")),
        *((n, Strides) for n in ("query_stride", "key_stride")),
        *((n, Int64) for n in ("B", "Hq", "Hkv", "Tq", "Tk", "D", "Mq", "Nk")),
        *((n, Int64) for n in ("q_block", "kv_block", "local_blocks", "sink_blocks")),
        *((n, Pointer) for n in ("records", "inverse", "padded", "mask")),
        *((n, Int64) for n in ("row_bytes", "units", "splits", "mask_rows", "words")),
    ]  # fmt: skip


class Plan(NamedTuple):
    words: int
    key_tiles: int
    prepare: LaunchPlan
    invert: LaunchPlan
    pad: LaunchPlan
    estimate: LaunchPlan
    list: LaunchPlan


def params(query, query_step, key, key_step, key_bias, theta, q_block, kv_block, local, sink,
           indices, counts) -> Params:  # fmt: skip
    p = Params(*(x.data_ptr() for x in (query, key, query_step, key_step, key_bias, theta)),
               indices.data_ptr(), counts.data_ptr(), launch.strides(query),
               launch.strides(key))  # fmt: skip
    p.B, p.Hq, p.Tq, _ = query.shape
    _, p.Hkv, p.Tk, _ = key.shape
    p.D = 2 * query.shape[3]
    _, _, p.Mq, p.Nk = indices.shape
    p.q_block, p.kv_block = q_block, kv_block
    p.local_blocks = -(-min(local, p.Tk + 128) // kv_block)
    p.sink_blocks = -(-min(sink, p.Tk) // kv_block)
    p.row_bytes = -(-p.D // 32) * 16
    p.units = -(-p.Tq // UNIT_ROWS) * (p.Hq // p.Hkv)
    p.mask_rows, p.words = -(-p.Tq // min(q_block, UNIT_ROWS)), -(-p.Nk // 32)
    return p


def plan(p: Params, limits: DeviceLimits) -> Plan:
    def of(blocks: int, threads: int, shared_bytes: int) -> LaunchPlan:
        return LaunchPlan((blocks, 1, 1), (threads, 1, 1), shared_bytes)

    warps, heads = THREADS // 32, p.B * p.Hq
    tiles = p.B * p.Hkv * -(-p.units // warps)
    p.splits = min(-(-4 * limits.processors // tiles), p.words)
    words = 2 if p.D <= 64 else 4 if p.D <= 128 else 8
    records = STAGE_KEYS // p.kv_block * (p.kv_block + RECORD_EXTRA) * 4
    stage = STAGE_KEYS * words * 16 + warps * records
    padded = 0 if p.D % 32 == 0 else p.B * p.Hkv * p.Tk * p.row_bytes
    return Plan(
        words=words,
        key_tiles=p.kv_block // 8,
        prepare=of(heads * -(-p.Nk * p.kv_block // THREADS), THREADS, THREADS // 16 * 4),
        invert=of(-(-heads * -(-p.Tq // 16) * 8 // THREADS), THREADS, 0),
        pad=of(-(-padded // THREADS), THREADS, 0),
        estimate=of(tiles * p.splits, THREADS, 2 * stage + warps * UNIT_BYTES),
        list=of(heads * p.Mq, THREADS, warps * 4),
    )


def place(p: Params, found: Plan, memory: int) -> int:
    """Gives each buffer its place in `memory`; returns the bytes that it must have."""
    heads = p.B * p.Hq
    sizes = {
        "records": 4 * heads * p.Nk * (p.kv_block + RECORD_EXTRA),
        "inverse": 4 * heads * -(-p.Tq // 16) * 8,
        "padded": p.B * p.Hkv * p.Tk * p.row_bytes if found.pad.grid[0] > 0 else None,
        "mask": 4 * heads * p.mask_rows * p.words,
    }
    offset = 0
    for name, size in sizes.items():
        if size is not None:
            setattr(p, name, memory + offset)
            offset = -(-(offset + size) // 256) * 256
    return offset


def sale_estimate(*args):
    query, query_step, key, *vectors = op.bind(*args)
    vectors, options = [query_step, *vectors[:3]], vectors[3:]
    names = ("query_step", "key_step", "key_bias", "theta")
    launch.same_device(query_packed=query, key_packed=key, **dict(zip(names, vectors, strict=True)))
    query, key = launch.aligned_bytes(query), launch.aligned_bytes(key)
    query_step, *vectors = (x.contiguous() for x in vectors)
    bound = (query, query_step, key, *vectors, *options)
    results = op.empty(*bound)
    p = params(*bound, *results)
    found = plan(p, launch.limits(query.device))
    scratch = torch.empty(place(p, found, 0), dtype=torch.uint8, device=query.device)
    place(p, found, scratch.data_ptr())
    kernels = {"sale_prepare_kernel": found.prepare, "sale_invert_kernel": found.invert}
    if found.pad.grid[0] > 0:
        kernels["sale_pad_kernel"] = found.pad
    kernels[f"sale_estimate_kernel<{found.words}, {found.key_tiles}>"] = found.estimate
    kernels["sale_list_kernel"] = found.list
    for name, how in kernels.items():
        launch.run(op.name, name, how, p, query.device)
    return results

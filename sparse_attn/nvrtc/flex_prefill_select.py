"""`flex_prefill_select`; see csrc/cuda/flex_prefill_select_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from ..ops.flex_prefill_select import op
from . import launch
from .launch import DeviceLimits, DType, Float, Int64, LaunchPlan, Pointer, Strides

# csrc/cuda/flex_prefill_select_params.h
PROBE_ROWS, TILE_KEYS, SLICE_DIMS, PROBE_STAGES = 128, 64, 64, 3
THREADS, SUM_BLOCKS, CHOOSE_THREADS = 128, 16, 512
SCORE_ROWS, SCORE_COLUMNS, SCORE_DIMS = 32, 64, 32
PROFILE_SHARED_BYTES, CHOOSE_SHARED_BYTES, LIST_SHARED_BYTES = 5120, 2192, 2096
WANTED_BLOCKS, MOST_CHUNKS, LEAST_TILES = 1024, 64, 4
LOG2_E = ctypes.c_float(1.44269504).value
SCRATCH = ("extent", "finite", "vertical", "slash", "slash_spill", "columns", "diagonals",
           "diagonal_spill", "mean_key", "mean_query", "mass", "ranked", "estimate", "flags",
           "state")  # fmt: skip


class Params(ctypes.Structure):
    """FlexPrefillCudaParams, after FlexPrefillParams of csrc/common/params.h."""

    _fields_ = [
        ("query", Pointer), ("key", Pointer), ("query_stride", Strides), ("key_stride", Strides),
        *((n, Int64) for n in ("B", "Hq", "Hkv", "Tq", "Tk", "D", "block", "probe")),
        ("scale", Float), ("dtype", DType),
        *((n, Pointer) for n in ("indices", "counts", "pattern", *SCRATCH)),
        *((n, Int64) for n in ("Mq", "Nk", "chunks", "chunk_tiles", "low", "high")),
        ("log2_scale", Float), ("gamma", Float), ("tau", Float),
    ]  # fmt: skip


class Plan(NamedTuple):
    chooses: bool
    per_row: bool
    mean_key: LaunchPlan
    extent: LaunchPlan
    profile: LaunchPlan
    attribute: LaunchPlan
    block_sum: LaunchPlan
    choose: LaunchPlan
    mean_query: LaunchPlan
    block_score: LaunchPlan
    list: LaunchPlan


def params(query, key, gamma, tau, min_budget, max_budget, block_size, variant, causal, scale,
           indices, counts, pattern) -> Params:  # fmt: skip
    p = Params(query.data_ptr(), key.data_ptr(), launch.strides(query), launch.strides(key))
    p.B, p.Hq, p.Tq, p.D = query.shape
    _, p.Hkv, p.Tk, _ = key.shape
    p.block, p.probe = block_size, min(block_size, p.Tq, p.Tk)
    p.scale = p.D**-0.5 if scale is None else scale
    p.dtype, p.gamma, p.tau = launch.DTYPES[query.dtype], gamma, tau
    p.indices, p.counts, p.pattern = (x.data_ptr() for x in (indices, counts, pattern))

    def to_blocks(tokens: int) -> int:
        return -(-min(tokens, p.Tk) // p.block)

    p.Mq, p.Nk = -(-p.Tq // p.block), -(-p.Tk // p.block)
    p.low, p.high = to_blocks(min_budget), p.Nk if max_budget is None else to_blocks(max_budget)
    tiles = -(-p.Tk // TILE_KEYS)
    p.chunk_tiles = max(
        LEAST_TILES, -(-p.B * p.Hq * tiles // WANTED_BLOCKS), -(-tiles // MOST_CHUNKS)
    )
    p.chunks = -(-tiles // p.chunk_tiles)
    p.log2_scale = p.scale * LOG2_E
    return p


def plan(p: Params, limits: DeviceLimits) -> Plan:
    def of(blocks: int, threads: int, shared_bytes: int) -> LaunchPlan:
        return LaunchPlan((blocks, 1, 1), (threads, 1, 1), shared_bytes)

    heads, chooses = p.B * p.Hq, p.gamma < 1
    slices = (-(-p.D // SLICE_DIMS) * PROBE_ROWS + PROBE_STAGES * TILE_KEYS) * SLICE_DIMS * 2
    mean = THREADS * 8 * 4
    profile = of(heads * p.chunks, THREADS, PROFILE_SHARED_BYTES + slices)
    scores = heads * -(-p.Mq // SCORE_ROWS) * -(-p.Nk // SCORE_COLUMNS)
    return Plan(
        chooses=chooses,
        per_row=chooses and p.tau > 0,
        mean_key=of(p.B * p.Hkv * p.Nk, THREADS, mean),
        extent=of(heads * p.chunks, THREADS, slices),
        profile=profile,
        attribute=profile,
        block_sum=of(heads * -(-p.Nk // SUM_BLOCKS), THREADS, mean + p.D * 4),
        choose=of(heads, CHOOSE_THREADS, CHOOSE_SHARED_BYTES),
        mean_query=of(heads * p.Mq, THREADS, mean),
        block_score=of(scores, THREADS, SCORE_DIMS * (SCORE_ROWS + SCORE_COLUMNS + 2) * 4),
        list=of(heads * p.Mq, THREADS, LIST_SHARED_BYTES),
    )


def place(p: Params, found: Plan, memory: int) -> int:
    """Gives each buffer its place in `memory`; returns the bytes that it must have."""
    if not found.chooses:
        return 0
    heads, keys, blocks = p.B * p.Hq, p.B * p.Hq * p.Tk, p.B * p.Hq * p.Nk
    edges = heads * p.chunks * PROBE_ROWS
    sizes = {
        "extent": 8 * edges, "finite": 4 * heads, "vertical": 4 * keys, "slash": 4 * keys,
        "slash_spill": 4 * edges, "columns": 4 * keys, "diagonals": 4 * keys,
        "diagonal_spill": 4 * edges, "mean_key": 4 * p.B * p.Hkv * p.Nk * p.D,
        "mean_query": 4 * heads * p.Mq * p.D if found.per_row else None, "mass": 4 * blocks,
        "ranked": 8 * blocks, "estimate": 4 * blocks, "flags": blocks, "state": 4 * heads,
    }  # fmt: skip
    offset = 0
    for name, size in sizes.items():
        if size is not None:
            setattr(p, name, memory + offset)
            offset = -(-(offset + size) // 256) * 256
    return offset


def flex_prefill_select(*args):
    query, key, *options = op.bind(*args)
    launch.same_device(query=query, key=key)
    query, key = launch.aligned_rows(query), launch.aligned_rows(key)
    results = op.empty(query, key, *options)
    p = params(query, key, *options, *results)
    found = plan(p, launch.limits(query.device))
    scratch = torch.empty(place(p, found, 0), dtype=torch.uint8, device=query.device)
    place(p, found, scratch.data_ptr())
    t = launch.NAMES[p.dtype]
    kernels = {"list_kernel": found.list}
    if found.per_row:
        kernels = {f"block_mean_kernel<{t}, true>": found.mean_query,
                   "block_score_kernel": found.block_score, **kernels}  # fmt: skip
    if found.chooses:
        kernels = {
            f"block_mean_kernel<{t}, false>": found.mean_key,
            f"probe_extent_kernel<{t}>": found.extent,
            f"probe_profile_kernel<{t}, false>": found.profile,
            f"probe_profile_kernel<{t}, true>": found.attribute,
            f"block_sum_kernel<{t}>": found.block_sum,
            "choose_kernel": found.choose,
            **kernels,
        }
    for name, how in kernels.items():
        launch.run(op.name, name, how, p, query.device)
    return results

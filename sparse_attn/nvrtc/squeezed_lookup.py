"""`squeezed_lookup`; see csrc/cuda/squeezed_lookup_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from ..ops.squeezed_lookup import op
from . import launch
from .attention_tile import DIMS, STAGES
from .launch import DeviceLimits, DType, Float, Int32, Int64, LaunchPlan, Pointer, Strides

# csrc/cuda/squeezed_lookup_params.h
KEEP_SCORES, FIND_EXTENTS, SUM_PROBABILITIES = range(3)
ROWS, RING, CHOOSE_THREADS, CHOOSE_BYTES, MOST_SPLITS = 16, 4, 512, 512, 128
Pair = Int64 * 2


class Level(ctypes.Structure):
    """SqueezedLevel in csrc/common/params.h."""

    _fields_ = [
        *((n, Pointer) for n in ("centroids", "log_counts", "offsets", "threshold")),
        ("centroids_stride", Strides), ("log_counts_stride", Pair), ("offsets_stride", Pair),
        ("K", Int64),
    ]  # fmt: skip


class Call(ctypes.Structure):
    """SqueezedLookupParams in csrc/common/params.h."""

    _fields_ = [
        ("query", Pointer), ("fine", Level), ("coarse", Level),
        *((n, Pointer) for n in ("starts", "sums", "counts", "tokens")),
        ("query_stride", Strides),
        *((n, Int64) for n in ("B", "Hq", "Hkv", "Hd", "Tq", "D", "runs")),
        ("scale", Float), ("dtype", DType),
    ]  # fmt: skip


class Scratch(ctypes.Structure):
    """SqueezedLookupScratch in csrc/cuda/squeezed_lookup_params.h."""

    _fields_ = [
        *((n, Pointer) for n in ("extent", "scores", "kept")), ("row", Int64), ("splits", Int32),
    ]  # fmt: skip


class Params(ctypes.Structure):
    """SqueezedLookupCudaParams."""

    _fields_ = [
        ("call", Call), ("fine", Scratch), ("coarse", Scratch), ("alive", Pointer),
        *((n, Int32) for n in ("queries", "heads", "query_tiles", "head_tiles", "rows", "parts",
                               "sets", "at_coarse")),
    ]  # fmt: skip


class Plan(NamedTuple):
    dim: int
    rows: int
    keep: bool
    levels: int
    fine_scores: LaunchPlan
    coarse_scores: LaunchPlan
    choose: LaunchPlan


def _level(centroids, log_counts, offsets, threshold) -> Level:
    level = Level(*(x.data_ptr() for x in (centroids, log_counts, offsets, threshold)))
    level.centroids_stride = launch.strides(centroids)
    level.log_counts_stride = Pair(*log_counts.stride()[:2])
    level.offsets_stride = Pair(*offsets.stride()[:2])
    if centroids.shape[0] == 1:
        for strides in (level.centroids_stride, level.log_counts_stride, level.offsets_stride):
            strides[0] = 0
    level.K = centroids.shape[2]
    return level


def params(query, centroids, log_counts, offsets, threshold, coarse_centroids, coarse_log_counts,
           children, coarse_threshold, shared, scale, starts, sums, counts,
           tokens) -> Params:  # fmt: skip
    p = Params()
    c = p.call
    c.query, c.query_stride = query.data_ptr(), launch.strides(query)
    c.fine = _level(centroids, log_counts, offsets, threshold)
    if coarse_centroids is not None:
        c.coarse = _level(coarse_centroids, coarse_log_counts, children, coarse_threshold)
    c.starts, c.sums = starts.data_ptr(), sums.data_ptr()
    c.counts, c.tokens = counts.data_ptr(), tokens.data_ptr()
    c.B, c.Hq, c.Tq, c.D = query.shape
    c.Hkv = centroids.shape[1]
    c.Hd = c.Hkv if shared else c.Hq
    c.runs = (c.fine.K + 1) // 2
    c.scale = c.D**-0.5 if scale is None else scale
    c.dtype = launch.DTYPES[query.dtype]
    return p


def plan(p: Params, limits: DeviceLimits) -> Plan:
    """Also completes the sizes in p."""
    c = p.call
    group, per_choice = c.Hq // c.Hkv, c.Hq // c.Hd
    dim = next(d for d in DIMS if d >= c.D)
    keep, levels = c.Tq <= ROWS, 2 if c.coarse.K > 0 else 1
    rows = ROWS if keep else 128 if dim <= 128 else 64
    keys = 64 if dim <= 128 else 32
    p.queries = min(c.Tq, rows)
    p.heads = min(group, rows // p.queries) if keep else 1
    p.query_tiles, p.head_tiles = -(-c.Tq // p.queries), -(-group // p.heads)
    p.rows, p.parts = per_choice * c.Tq, 0 if keep else per_choice * p.query_tiles
    p.sets = p.heads if levels == 2 and per_choice == 1 else 1
    warps = keys // 16 if keep else 4
    tiles = c.B * c.Hkv * p.head_tiles * p.query_tiles

    def scores(clusters: int, scratch: Scratch, sets: int) -> LaunchPlan:
        cluster_tiles = -(-clusters // keys)
        splits = min(-(-2 * limits.processors // tiles), cluster_tiles, MOST_SPLITS)
        scratch.row, scratch.splits = cluster_tiles * keys, splits
        tail = RING * keys * 4 * (1 + sets) + 2 * 4 * keys * 4 + 64
        shared = rows * dim * 2 + STAGES * keys * dim * 2 + tail
        return LaunchPlan((tiles * splits, 1, 1), (32 * warps, 1, 1), shared)

    fine = scores(c.fine.K, p.fine, p.sets)
    none = LaunchPlan((1, 1, 1), (1, 1, 1))
    coarse = scores(c.coarse.K, p.coarse, 1) if levels == 2 else none
    sums = -(-p.rows * 4 // 16) * 16 if keep else 0
    choose = LaunchPlan((c.B * c.Hd, 1, 1), (CHOOSE_THREADS, 1, 1), CHOOSE_BYTES + sums)
    return Plan(dim, rows, keep, levels, fine, coarse, choose)


def place(p: Params, found: Plan, memory: int) -> int:
    """Gives each buffer its place in `memory`; returns the bytes that it must have."""
    c, offset = p.call, 0

    def take(owner: ctypes.Structure, name: str, size: int) -> None:
        nonlocal offset
        setattr(owner, name, memory + offset)
        offset = -(-(offset + size) // 256) * 256

    def level(scratch: Scratch, clusters: int) -> None:
        take(scratch, "extent", c.B * c.Hq * c.Tq * scratch.splits * 8)
        rows = c.B * c.Hq * (c.Tq if found.keep else p.query_tiles)
        take(scratch, "scores", rows * scratch.row * 4)
        take(scratch, "kept", c.B * c.Hd * -(-clusters // 32) * 4)

    level(p.fine, c.fine.K)
    if found.levels == 2:
        level(p.coarse, c.coarse.K)
        take(p, "alive", c.B * c.Hd * c.fine.K)
    return offset


def _readable(centroids, log_counts, offsets, threshold):
    return (
        launch.aligned_rows(centroids), launch.last_dim_contiguous(log_counts),
        launch.last_dim_contiguous(offsets), threshold,
    )  # fmt: skip


def squeezed_lookup(*args):
    query, *tensors, shared, scale = op.bind(*args)
    names = [a.name for a in op.default._schema.arguments]
    given = dict(zip(names, (query, *tensors), strict=False))
    launch.same_device(**{name: x for name, x in given.items() if x is not None})
    query, fine, coarse = launch.aligned_rows(query), tensors[:4], tensors[4:]
    coarse = coarse if coarse[0] is None else _readable(*coarse)
    call = (query, *_readable(*fine), *coarse, shared, scale)
    results = op.empty(*call)
    p = params(*call, *results)
    device = query.device
    found = plan(p, launch.limits(device))
    scratch = torch.empty(place(p, found, 0), dtype=torch.uint8, device=device)
    place(p, found, scratch.data_ptr())
    t = launch.NAMES[p.call.dtype]
    modes = (KEEP_SCORES,) if found.keep else (FIND_EXTENTS, SUM_PROBABILITIES)
    for p.at_coarse in reversed(range(found.levels)):
        how = found.coarse_scores if p.at_coarse else found.fine_scores
        for mode in modes:
            name = f"{t}, {found.dim}, {found.rows}, {mode}"
            launch.run(op.name, f"cluster_scores_kernel<{name}>", how, p, device)
        launch.run(op.name, "choose_clusters_kernel", found.choose, p, device)
    return results

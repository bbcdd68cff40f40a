"""`hip_prune_select`; see csrc/cuda/hip_prune_select_plan.h."""

from __future__ import annotations

import ctypes

from ..ops.hip_prune_select import op
from . import hip_search, launch
from .hip_search import Plan
from .launch import DeviceLimits, Int64

STAGES = 8


class Params(ctypes.Structure):
    """HipPruneCudaParams in csrc/cuda/hip_cuda_params.h."""

    _fields_ = [
        *hip_search.FIELDS, ("stages", Int64),
        *((n, Int64 * STAGES) for n in ("chunk", "keep", "q_stride")),
        ("rows", Int64), ("room", Int64),
    ]  # fmt: skip


def params(query, key, chunks, keeps, q_strides, q_block, sink, window, representative, merge_heads,
           causal, scale, block_table, kv_lengths, indices, counts) -> Params:  # fmt: skip
    p = hip_search.fill(
        Params(), query, key, q_block, chunks[-1], sink, window, representative, causal, scale,
        block_table, kv_lengths, indices, counts,
    )  # fmt: skip
    p.stages = len(chunks)
    for i, (chunk, keep, stride) in enumerate(zip(chunks, keeps, q_strides, strict=True)):
        p.chunk[i], p.keep[i], p.q_stride[i] = chunk, -(-keep // chunk), stride
    return p


def plan(p: Params, limits: DeviceLimits) -> Plan:
    most, p.rows = 128, 16
    for i in range(p.stages):
        p.keep[i] = min(p.keep[i], -(-p.Tk // p.chunk[i]))
        p.rows = max(p.rows, hip_search.rows(p, 1, p.q_stride[i], 128))
        most = max(most, p.keep[i])
    p.room = 2 * most
    return hip_search.plan(p, 4 * (2 * p.room + most), p.rows, limits)


def hip_prune_select(*args):
    query, key, *options = op.bind(*args)
    query, key, options = hip_search.prepared(query, key, options)
    results = op.empty(query, key, *options)
    p = params(query, key, *options, *results)
    hip_search.run(op.name, plan(p, launch.limits(query.device)), p, query.device, "keeps")
    return results

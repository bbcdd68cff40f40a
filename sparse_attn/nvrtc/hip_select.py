"""`hip_select`; see csrc/cuda/hip_select_plan.h."""

from __future__ import annotations

import ctypes

from ..ops.hip_select import op
from . import hip_search, launch
from .hip_search import Plan
from .launch import DeviceLimits, Int64


class Params(ctypes.Structure):
    """HipSelectCudaParams in csrc/cuda/hip_cuda_params.h."""

    _fields_ = [
        *hip_search.FIELDS,
        *((n, Int64) for n in ("keep", "q_stride", "key_step", "branch", "rows", "nodes",
                               "samples")),
    ]  # fmt: skip


def params(query, key, budget, q_block, kv_block, q_stride, key_stride, sink, window,
           representative, branch, share_kv_heads, causal, scale, block_table, kv_lengths, indices,
           counts) -> Params:  # fmt: skip
    p = hip_search.fill(
        Params(), query, key, q_block, kv_block, sink, window, representative, causal, scale,
        block_table, kv_lengths, indices, counts,
    )  # fmt: skip
    p.keep, p.q_stride, p.key_step, p.branch = p.K, q_stride, key_stride, branch
    return p


def plan(p: Params, limits: DeviceLimits) -> Plan:
    p.samples = -(-p.kv_block // p.key_step)
    p.nodes = p.keep if p.keep < -(-p.Tk // p.kv_block) else 0
    p.rows = hip_search.rows(p, p.Hq // p.H, p.q_stride, 128)
    return hip_search.plan(p, p.nodes * (20 + 6 * p.branch), 16, limits)


def hip_select(*args):
    query, key, *options = op.bind(*args)
    query, key, options = hip_search.prepared(query, key, options)
    results = op.empty(query, key, *options)
    p = params(query, key, *options, *results)
    hip_search.run(op.name, plan(p, launch.limits(query.device)), p, query.device, "budget")
    return results

"""`sale_threshold`; see csrc/cuda/sale_threshold_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from ..ops.sale_threshold import op
from . import launch
from .attention_tile import DIMS
from .launch import DeviceLimits, DType, Float, Int64, LaunchPlan, Pointer, Strides

ROWS, THREADS = 64, 128


class Params(ctypes.Structure):
    """SaleThresholdCudaParams in csrc/cuda/sale_threshold_params.h."""

    _fields_ = [
        *((n, Pointer) for n in ("query", "key", "key_mean", "threshold", "theta")),
        *((n, Strides) for n in ("query_stride", "key_stride")),
        *((n, Int64) for n in ("B", "Hq", "Hkv", "Tq", "Tk", "D", "Mq", "q_block", "kv_block")),
        *((n, Int64) for n in ("local_blocks", "sink_blocks", "parts")),
        ("scale", Float), ("dtype", DType),
    ]  # fmt: skip


class Plan(NamedTuple):
    launch: LaunchPlan
    dim: int


def params(query, key, key_mean, threshold, q_block, kv_block, local, sink, causal, scale,
           theta) -> Params:  # fmt: skip
    p = Params(*(x.data_ptr() for x in (query, key, key_mean, threshold, theta)),
               launch.strides(query), launch.strides(key))  # fmt: skip
    p.B, p.Hq, p.Tq, p.D = query.shape
    _, p.Hkv, p.Tk, _ = key.shape
    p.Mq, p.q_block, p.kv_block = -(-p.Tq // q_block), q_block, kv_block
    p.local_blocks = -(-min(local, p.Tk + 128) // kv_block)
    p.sink_blocks = -(-min(sink, p.Tk) // kv_block)
    p.parts = -(-q_block // ROWS)
    p.scale = p.D**-0.5 if scale is None else scale
    p.dtype = launch.DTYPES[query.dtype]
    return p


def plan(p: Params, limits: DeviceLimits) -> Plan:
    dim = next(d for d in DIMS if d >= p.D)
    keys = 64 if dim <= 128 else 32
    shared = ROWS * dim * 2 + 2 * keys * dim * 2 + 2 * keys * 4 + ROWS * 4
    grid = (p.B * p.Hq * p.Mq * p.parts, 1, 1)
    return Plan(LaunchPlan(grid, (THREADS, 1, 1), shared), dim)


def sale_threshold(*args):
    query, key, key_mean, threshold, *options = op.bind(*args)
    launch.same_device(query=query, key=key, key_mean=key_mean, threshold=threshold)
    query, key = launch.aligned_rows(query), launch.aligned_rows(key)
    bound = (query, key, key_mean.contiguous(), threshold.contiguous(), *options)
    theta = op.empty(*bound)
    p = params(*bound, theta)
    found = plan(p, launch.limits(query.device))
    name = f"sale_threshold_kernel<{launch.NAMES[p.dtype]}, {found.dim}>"
    launch.run(op.name, name, found.launch, p, query.device)
    return theta

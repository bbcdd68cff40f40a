"""`merge_attention_states`; see csrc/cuda/merge_attention_states_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from ..ops.merge_attention_states import op
from . import launch
from .launch import DeviceLimits, DType, Int64, LaunchPlan, Pointer, Strides

THREADS, WARP, VECTOR = 128, 32, 8


class Params(ctypes.Structure):
    """MergeAttentionStatesParams in csrc/common/params.h."""

    _fields_ = [
        *((name, Pointer) for name in ("out_a", "out_b", "lse_a", "lse_b", "out", "lse")),
        *((f"{name}_stride", Strides) for name in ("out_a", "out_b", "lse_a", "lse_b")),
        *((name, Int64) for name in ("B", "H", "T", "Dv")),
        ("dtype", DType),
    ]


class Plan(NamedTuple):
    launch: LaunchPlan
    vector: int


def params(out_a, lse_a, out_b, lse_b, out, lse) -> Params:
    tensors = (out_a, out_b, lse_a, lse_b)
    return Params(
        *(x.data_ptr() for x in (*tensors, out, lse)), *map(launch.strides, tensors),
        *out.shape, launch.DTYPES[out.dtype],
    )  # fmt: skip


def plan(p: Params, limits: DeviceLimits) -> Plan:
    numbers = (p.Dv, *p.out_a_stride, *p.out_b_stride)
    aligned = all(pointer % 16 == 0 for pointer in (p.out, p.out_a, p.out_b))
    vector = VECTOR if aligned and all(n % VECTOR == 0 for n in numbers) else 1
    lanes = 1
    while lanes < WARP and lanes * vector < p.Dv:
        lanes *= 2
    rows = THREADS // lanes
    return Plan(LaunchPlan((-(-p.B * p.H * p.T // rows), 1, 1), (lanes, rows, 1)), vector)


def merge_attention_states(out_a, lse_a, out_b, lse_b):
    launch.same_device(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.numel() == 0:
        raise ValueError("out_a: expected [B, H, T, Dv], not empty")
    out_a, out_b = launch.last_dim_contiguous(out_a), launch.last_dim_contiguous(out_b)
    results = op.empty(out_a, lse_a, out_b, lse_b)
    p = params(out_a, lse_a, out_b, lse_b, *results)
    found = plan(p, launch.limits(out_a.device))
    name = f"merge_attention_states_kernel<{launch.NAMES[p.dtype]}, {found.vector}>"
    launch.run(op.name, name, found.launch, p, out_a.device)
    return results

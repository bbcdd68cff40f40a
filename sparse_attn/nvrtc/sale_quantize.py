"""`sale_quantize`; see csrc/cuda/sale_quantize_plan.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from ..ops._sale import GROUPS
from ..ops.sale_quantize import op
from . import launch
from .launch import Bool, DeviceLimits, DType, Int32, Int64, LaunchPlan, Pointer, Strides

# csrc/cuda/sale_quantize_params.h
CODE_THREADS, CODE_TOKENS, SUM_THREADS, CHUNK_TOKENS = 256, 64, 128, 512


class Params(ctypes.Structure):
    """SaleQuantizeCudaParams, after SaleQuantizeParams of csrc/common/params.h."""

    _fields_ = [
        *((n, Pointer) for n in ("x", "packed", "step", "center")), ("x_stride", Strides),
        *((n, Int64) for n in ("B", "H", "T", "D", "groups", "block")),
        ("group", Int32), ("mean_given", Bool), ("dtype", DType),
        ("partial", Pointer), ("floor", Pointer), ("chunks", Int64),
    ]  # fmt: skip


class Plan(NamedTuple):
    sum: LaunchPlan
    mean: LaunchPlan
    code: LaunchPlan


def params(x, mean, group, block, packed, step, center) -> Params:
    p = Params(*(t.data_ptr() for t in (x, packed, step, center)), launch.strides(x), *x.shape)
    p.groups, p.block, p.group = step.shape[2], block, GROUPS.index(group)
    p.mean_given, p.dtype = mean is not None, launch.DTYPES[x.dtype]
    p.chunks = 0 if p.mean_given else -(-p.T // CHUNK_TOKENS)
    return p


def plan(p: Params, limits: DeviceLimits) -> Plan:
    heads = p.B * p.H
    return Plan(
        LaunchPlan((heads * p.chunks, 1, 1), (SUM_THREADS, 1, 1), SUM_THREADS * 8 * 4),
        LaunchPlan((heads, 1, 1), (SUM_THREADS, 1, 1), 16),
        LaunchPlan((heads * -(-p.T // CODE_TOKENS), 1, 1), (CODE_THREADS, 1, 1), CODE_TOKENS * 8),
    )


def place(p: Params, found: Plan, memory: int) -> int:
    """Gives the scratch memory to `p`; returns the bytes that it must have."""
    floors = -(-p.B * p.H * 4 // 16) * 16
    p.floor, p.partial = memory, memory + floors
    return floors + p.B * p.H * p.chunks * p.D * 4


def sale_quantize(*args):
    x, mean, group, block = op.bind(*args)
    launch.same_device(x=x, **({} if mean is None else {"mean": mean}))
    x = launch.aligned_rows(x)
    packed, step, center = op.empty(x, mean, group, block)
    if mean is not None:
        center.copy_(mean)
    p = params(x, mean, group, block, packed, step, center)
    found = plan(p, launch.limits(x.device))
    scratch = torch.empty(place(p, found, 0), dtype=torch.uint8, device=x.device)
    place(p, found, scratch.data_ptr())
    t = launch.NAMES[p.dtype]
    if mean is None:
        launch.run(op.name, f"sale_sum_kernel<{t}>", found.sum, p, x.device)
    launch.run(op.name, "sale_mean_kernel", found.mean, p, x.device)
    launch.run(op.name, f"sale_code_kernel<{t}>", found.code, p, x.device)
    return packed, step, center

"""What the operators of this folder share: parameters as C has them, loading and launching."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch

from . import source

OPTIONS = ("-std=c++20", "-diag-suppress=177")  # constants that only the plan reads
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType in csrc/common/params.h
NAMES = {1: "__half", 2: "__nv_bfloat16"}
WITHOUT_ASKING = 48 * 1024  # bytes of shared memory

Pointer, Int64, Float = ctypes.c_uint64, ctypes.c_int64, ctypes.c_float
Int32, Bool, DType = ctypes.c_int32, ctypes.c_bool, ctypes.c_int
Strides = Int64 * 3  # batch, head, token


class LaunchPlan(NamedTuple):
    """As in csrc/cuda/plan.h."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0


class DeviceLimits(NamedTuple):
    """As in csrc/cuda/plan.h."""

    processors: int
    shared_bytes: int


@cache
def limits(device: torch.device) -> DeviceLimits:
    p = torch.cuda.get_device_properties(device)
    return DeviceLimits(p.multi_processor_count, p.shared_memory_per_block_optin)


def same_device(**tensors: torch.Tensor) -> None:
    """As check_same_device in csrc/cuda/binding.h, for a direct call of an overload."""
    (of, first), *others = tensors.items()
    for name, x in others:
        if x.device != first.device:
            raise ValueError(f"{name}: device is {x.device}, expected {first.device} as {of}")


def strides(x: torch.Tensor) -> Any:
    return Strides(*x.stride()[:3])


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but the last."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_are_aligned(x: torch.Tensor) -> bool:
    """For kernels that load 16 bytes at a time and count rows in 32 bits."""
    in_use = [stride for i, stride in enumerate(x.stride()[:3]) if x.shape[i] > 1]
    fits = (x.stride(3) == 1 or x.shape[3] == 1) and all(stride % 8 == 0 for stride in in_use)
    return fits and x.data_ptr() % 16 == 0 and (x.shape[2] == 1 or x.stride(2) < 2**30)


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """Copied unless its rows are aligned."""
    x = last_dim_contiguous(x)
    return x if rows_are_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def aligned_bytes(x: torch.Tensor) -> torch.Tensor:
    """Rows of uint8 that begin at multiples of 16 bytes, or as near as their length allows."""
    x = last_dim_contiguous(x)
    step = 16 if x.shape[3] % 16 == 0 else 4
    in_use = [stride for i, stride in enumerate(x.stride()[:3]) if x.shape[i] > 1]
    fits = x.data_ptr() % step == 0 and all(stride % step == 0 for stride in in_use)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@cache
def kernel(op: str, name: str) -> Any:
    """A kernel by its name and template arguments; CuPy loads it on each device that asks."""
    import cupy

    full = f"sparse_attn::{name}"
    module = cupy.RawModule(
        code=source.assembled(op),
        options=(*OPTIONS, *source.include_options()),
        name_expressions=(full,),
    )
    return module.get_function(full)


def run(op: str, name: str, plan: LaunchPlan, params: ctypes.Structure, device: Any) -> None:
    """Launches a kernel of csrc/cuda/<op>.cuh on torch's current stream of a device."""
    import cupy
    import numpy as np

    by_value = np.frombuffer(bytes(params), dtype=np.dtype((np.void, ctypes.sizeof(params))))
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream, device.index):
        function = kernel(op, name)
        if plan.shared_bytes > WITHOUT_ASKING:
            function.max_dynamic_shared_size_bytes = plan.shared_bytes
        function(plan.grid, plan.block, (by_value,), shared_mem=plan.shared_bytes)

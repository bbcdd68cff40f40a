"""What `hip_select` and `hip_prune_select` share; see csrc/cuda/hip_plan.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import launch
from .launch import Bool, DeviceLimits, DType, Float, Int64, LaunchPlan, Pointer, Strides

# csrc/cuda/hip_cuda_params.h
TILE_KEYS, TILES, TOP_K_BYTES = 16, 3, 1168

# HipParams in csrc/common/hip_params.h
FIELDS = [
    *((n, Pointer) for n in ("query", "key", "block_table", "kv_lengths", "indices", "counts")),
    ("query_stride", Strides), ("key_stride", Strides),
    *((n, Int64) for n in ("block_table_stride", "pages", "page_bits", "B", "Hq", "Hkv", "Tq", "Tk",
                           "D", "H", "Mq", "K", "q_block", "kv_block", "sink", "window")),
    ("sign", Float), ("causal", Bool), ("centre", Bool), ("dtype", DType),
]  # fmt: skip


class Plan(NamedTuple):
    launch: LaunchPlan
    dim: int


def fill(p: Any, query, key, q_block, kv_block, sink, window, representative, causal, scale,
         block_table, kv_lengths, indices, counts) -> Any:  # fmt: skip
    """Sets what both selections have."""
    p.query, p.key = query.data_ptr(), key.data_ptr()
    p.query_stride, p.key_stride = launch.strides(query), launch.strides(key)
    p.indices, p.counts = indices.data_ptr(), counts.data_ptr()
    p.B, p.Hq, p.Tq, p.D = query.shape
    _, p.Hkv, p.Tk, _ = key.shape
    if block_table is not None:
        p.block_table, p.block_table_stride = block_table.data_ptr(), block_table.stride(0)
        p.pages, p.page_bits = key.shape[0], key.shape[2].bit_length() - 1
        p.Tk *= block_table.shape[1]
    if kv_lengths is not None:
        p.kv_lengths = kv_lengths.data_ptr()
    _, p.H, p.Mq, p.K = indices.shape
    p.q_block, p.kv_block, p.sink, p.window = q_block, kv_block, sink, window
    p.sign = 1.0 if scale is None or scale > 0 else -1.0 if scale < 0 else 0.0
    p.causal, p.centre = causal, representative == "centre"
    p.dtype = launch.DTYPES[query.dtype]
    return p


def rows(p: Any, heads: int, stride: int, most: int) -> int:
    sampled = heads * -(-min(p.q_block, p.Tq) // stride)
    return min(-(-sampled // 16) * 16, most)


def plan(p: Any, list_bytes: int, least: int, limits: DeviceLimits) -> Plan:
    """Also lowers p.rows to what shared memory has room for, at least `least`."""
    dim = 64 if p.D <= 64 else 128 if p.D <= 128 else 256
    lists = p.B * p.H * p.Mq
    warps = (2 if dim == 256 else 4) * (2 if lists < 2 * limits.processors else 1)

    def needed() -> int:
        keys = p.rows + warps * TILES * TILE_KEYS
        return keys * 2 * dim + 4 * p.rows + TOP_K_BYTES + list_bytes

    while needed() > limits.shared_bytes and p.rows > least:
        p.rows = p.rows // 32 * 16
    while needed() > limits.shared_bytes and warps > 1:
        warps //= 2
    return Plan(LaunchPlan((lists, 1, 1), (32 * warps, 1, 1), needed()), dim)


def prepared(
    query: torch.Tensor, key: torch.Tensor, options: Sequence[Any]
) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Tensors as the kernels read them; the last two options are block_table and kv_lengths."""
    found = {"query": query, "key": key}
    found |= dict(zip(("block_table", "kv_lengths"), options[-2:], strict=True))
    launch.same_device(**{name: x for name, x in found.items() if x is not None})
    pages = [None if x is None else launch.last_dim_contiguous(x) for x in options[-2:]]
    return launch.aligned_rows(query), launch.aligned_rows(key), [*options[:-2], *pages]


def run(op: str, found: Plan, p: Any, device: torch.device, name: str) -> None:
    limits = launch.limits(device)
    if found.launch.shared_bytes > limits.shared_bytes:
        raise ValueError(
            f"{name}: needs {found.launch.shared_bytes} bytes of shared memory, "
            f"there are {limits.shared_bytes}"
        )
    kernel = f"{op}_kernel<{launch.NAMES[p.dtype]}, {found.dim}>"
    launch.run(op, kernel, found.launch, p, device)

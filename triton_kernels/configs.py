"""Tile sizes per architecture, fixed: the first call compiles one kernel and tries no others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# widest head dimension, padded to a power of two:
#   (query rows, keys, warps, stages) of a prefill tile, (keys, warps, stages) of a decode tile
_HALF_SM80 = {
    64: ((128, 64, 4, 3), (64, 4, 4)),
    128: ((128, 64, 8, 3), (64, 4, 3)),
    256: ((64, 32, 4, 2), (32, 4, 2)),
}
_HALF_SM90 = {
    64: ((128, 128, 8, 3), (128, 4, 4)),
    128: ((128, 128, 8, 2), (64, 4, 4)),
    256: ((128, 64, 8, 2), (64, 4, 2)),
}
_FLOAT = {
    64: ((64, 32, 8, 2), (32, 4, 2)),
    128: ((32, 32, 8, 2), (32, 4, 2)),
    256: ((32, 16, 8, 2), (16, 4, 2)),
}
ATTENTION = {
    "sm_80": {2: _HALF_SM80, 4: _FLOAT},
    "sm_90": {2: _HALF_SM90, 4: _FLOAT},
    "sm_100": {2: _HALF_SM90, 4: _FLOAT},
}
# of `squeezed_attend`, whose keys are gathered: as `ATTENTION`
SQUEEZED = {
    "sm_80": {
        2: {64: ((128, 64, 8, 3), (64, 4, 4)), 128: ((128, 32, 8, 3), (32, 4, 3)),
            256: ((64, 32, 8, 2), (32, 8, 2))},
        4: {64: ((64, 32, 8, 2), (16, 8, 2)), 128: ((32, 32, 8, 2), (32, 4, 2)),
            256: ((32, 32, 8, 1), (32, 8, 2))},
    },
    "sm_90": {
        2: {64: ((128, 64, 8, 3), (64, 4, 4)), 128: ((128, 64, 8, 3), (64, 4, 4)),
            256: ((64, 32, 8, 2), (64, 4, 2))},
        4: {64: _FLOAT[64], 128: ((32, 32, 8, 1), (32, 8, 2)), 256: _FLOAT[256]},
    },
    "sm_100": {
        2: {64: ((128, 64, 8, 3), (64, 4, 4)), 128: ((128, 32, 8, 2), (64, 4, 4)),
            256: ((64, 32, 8, 1), (64, 4, 2))},
        4: _FLOAT,
    },
}  # fmt: skip
# of the backward, (query rows, keys, warps, stages): for the queries' gradient, for the keys'
_HALF_BACKWARD = {
    64: ((128, 64, 8, 2), (64, 64, 8, 2)),
    128: ((64, 64, 8, 2), (64, 64, 8, 2)),
    256: ((32, 32, 8, 1), (32, 32, 8, 1)),
}
_FLOAT_BACKWARD = {
    64: ((64, 32, 8, 1), (32, 32, 8, 1)),
    128: ((32, 32, 8, 1), (16, 32, 8, 1)),
    256: ((32, 16, 8, 1), (16, 32, 8, 1)),
}
ATTENTION_BACKWARD = {
    "sm_80": {2: _HALF_BACKWARD, 4: _FLOAT_BACKWARD},
    "sm_90": {2: _HALF_BACKWARD, 4: _FLOAT_BACKWARD},
    "sm_100": {2: _HALF_BACKWARD, 4: _FLOAT_BACKWARD},
}


def nearest(arch: str) -> str:
    """The listed architecture of the same generation, otherwise sm_80.

    sm_103 has the memory of sm_100. The tiles of sm_80 fit into 99 KiB, which is what the consumer
    parts have: sm_86 and sm_89, but also sm_120.
    """
    listed = f"{arch[:-1]}0"
    return listed if listed in ATTENTION else "sm_80"


def padded(x: int, least: int = 16) -> int:
    """The next power of two, no less than a matrix instruction takes."""
    return max(least, 1 << (x - 1).bit_length())


def query_rows(n_queries: int, q_block: int) -> int:
    """Queries per block; a single block has no more than there are, within a power of two."""
    return q_block if n_queries > q_block else min(q_block, padded(n_queries, 1))


@dataclass(frozen=True)
class AttentionTile:
    """Compile-time arguments of the kernel, and how many tiles a block of queries needs."""

    per_block: int
    options: dict[str, Any]


@cache
def attention_tile(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    group: int,
    list_heads: int,
    q_block: int,
    kv_block: int,
) -> AttentionTile:
    """The tile of `block_sparse_attention`.

    `group` query heads share a KV head, `list_heads` a list of blocks.
    """
    block_d, block_dv = padded(head_dim), padded(value_dim)
    prefill, decode = ATTENTION[nearest(arch)][dtype.itemsize][max(64, block_d, block_dv)]
    queries = min(q_block, prefill[0])
    heads = min(group, prefill[0] // queries) if list_heads >= group else 1
    block_m = padded(heads * queries)
    _, block_n, warps, stages = prefill
    if block_m <= 32:
        block_n, warps, stages = decode
    elif block_m < prefill[0]:
        warps = max(4, warps // 2)
    if kv_block >= 64 and kv_block & (kv_block - 1) == 0:
        block_n = min(block_n, kv_block)
    return AttentionTile(
        -(-q_block // queries) * -(-group // heads),
        {
            "G": group, "LIST_HEADS": list_heads, "HEADS": heads, "QUERIES": queries,
            "Q_BLOCK": q_block, "KV_BLOCK": kv_block, "D": head_dim, "DV": value_dim,
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
            "GATHER": kv_block % block_n != 0, "num_warps": warps, "num_stages": stages,
        },
    )  # fmt: skip


@cache
def backward_tiles(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    group: int,
    list_heads: int,
    q_block: int,
    kv_block: int,
) -> tuple[AttentionTile, AttentionTile]:
    """The tiles of `block_sparse_attention_backward`: per block of queries, per block of keys."""
    block_d, block_dv = padded(head_dim), padded(value_dim)
    table = ATTENTION_BACKWARD[nearest(arch)][dtype.itemsize][max(64, block_d, block_dv)]
    tiles = []
    for most, block_n, warps, stages in table:
        queries = min(q_block, most)
        heads = min(group, most // queries) if list_heads >= group else 1
        options = {
            "G": group, "LIST_HEADS": list_heads, "HEADS": heads, "QUERIES": queries,
            "Q_BLOCK": q_block, "KV_BLOCK": kv_block, "D": head_dim, "DV": value_dim,
            "BLOCK_M": padded(heads * queries), "BLOCK_N": block_n, "BLOCK_D": block_d,
            "BLOCK_DV": block_dv, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
        tiles.append(AttentionTile(-(-q_block // queries) * -(-group // heads), options))
    of_queries, of_keys = tiles
    of_queries.options["GATHER"] = kv_block % of_queries.options["BLOCK_N"] != 0
    block_n = of_keys.options["BLOCK_N"] = min(of_keys.options["BLOCK_N"], padded(kv_block))
    return of_queries, AttentionTile(-(-kv_block // block_n), of_keys.options)


def probe_tile(dtype: torch.dtype, head_dim: int, rows: int) -> dict[str, Any]:
    """The tile of `flex_prefill_select`'s probe: no fewer keys than rows, for the diagonals."""
    most, block_d = 64 if dtype.itemsize == 2 else 32, padded(head_dim)
    block_r = min(most, padded(rows))
    return {
        "D": head_dim, "BLOCK_R": block_r, "BLOCK_N": most, "BLOCK_D": block_d,
        "GROUPS": padded(rows) // block_r, "TILES": 2048 // most,
        "num_warps": 4 if dtype.itemsize == 2 else 8, "num_stages": 2,
    }  # fmt: skip


# of `sale_estimate`, (rows, keys, warps, stages) for head dimensions up to 128, and above
ESTIMATE = {
    "sm_80": ((128, 64, 4, 3), (128, 64, 8, 2)),
    "sm_90": ((128, 64, 4, 3), (128, 64, 4, 3)),
    "sm_100": ((128, 64, 4, 3), (128, 64, 4, 3)),
}


def estimate_tile(arch: str, head_dim: int, n_queries: int, q_block: int) -> dict[str, Any]:
    """The tile of `sale_estimate`, no longer than the queries; BLOCK_D is half of the channels."""
    rows, keys, warps, stages = ESTIMATE[nearest(arch)][head_dim > 128]
    return {
        "BLOCK_M": max(q_block, min(rows, padded(n_queries))), "BLOCK_N": keys,
        "BLOCK_D": padded(head_dim // 2, 32), "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def threshold_tile(dtype: torch.dtype, head_dim: int, q_block: int) -> dict[str, Any]:
    """The tile of `sale_threshold`, no more rows than a query block has."""
    size, warps = (64, 4) if dtype.itemsize == 2 else (32, 8)
    return {
        "BLOCK_M": min(q_block, size), "BLOCK_N": size, "BLOCK_D": padded(head_dim),
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


def hip_tile(dtype: torch.dtype, head_dim: int, rows: int) -> dict[str, Any]:
    """The tile of HiP's selections: sampled queries, and gathered keys at once."""
    half, block_d = dtype.itemsize == 2, padded(head_dim)
    block_r = min(64 if half and block_d <= 128 else 32, padded(rows))
    return {
        "HOLD": half, "D": head_dim, "BLOCK_D": block_d, "BLOCK_R": block_r,
        "BLOCK_N": 64 if half and block_d <= 128 else 32,
        "num_warps": 4 if half and block_r * block_d < 8192 else 8,
        "num_stages": 3 if half and block_d <= 128 else 2,
    }  # fmt: skip


@cache
def squeezed_tile(
    arch: str, dtype: torch.dtype, head_dim: int, value_dim: int, list_heads: int, n_queries: int
) -> AttentionTile:
    """The tile of `squeezed_attend`; `list_heads` query heads share a list of runs."""
    block_d, block_dv = padded(head_dim), padded(value_dim)
    prefill, decode = SQUEEZED[nearest(arch)][dtype.itemsize][max(64, block_d, block_dv)]
    queries = query_rows(n_queries, prefill[0])
    heads = min(list_heads, prefill[0] // queries)
    block_m = padded(heads * queries)
    _, block_n, warps, stages = prefill
    if block_m < min(prefill[0], 64):
        block_n, warps, stages = decode
    elif block_m < prefill[0]:
        warps = max(4, warps // 2)
    return AttentionTile(
        -(-list_heads // heads),
        {
            "LIST_HEADS": list_heads, "HEADS": heads, "QUERIES": queries, "D": head_dim,
            "DV": value_dim, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d,
            "BLOCK_DV": block_dv, "num_warps": warps, "num_stages": stages,
        },
    )  # fmt: skip


LOOKUP_ROWS = 16  # queries up to which `squeezed_lookup` keeps every score


@cache
def lookup_tile(dtype: torch.dtype, head_dim: int, group: int, n_queries: int) -> AttentionTile:
    """The tile of `squeezed_lookup`: all heads of a group, or many queries of one head."""
    half = dtype.itemsize == 2
    queries = query_rows(n_queries, LOOKUP_ROWS) if n_queries <= LOOKUP_ROWS else 64 if half else 32
    heads = min(group, max(1, LOOKUP_ROWS // queries))
    block_n = 64 if half else 32 if head_dim <= 128 else 16
    return AttentionTile(
        -(-group // heads),
        {
            "G": group, "HEADS": heads, "QUERIES": queries, "D": head_dim,
            "BLOCK_M": max(LOOKUP_ROWS, queries), "BLOCK_N": block_n, "BLOCK_D": padded(head_dim),
            "num_warps": 4 if half or n_queries <= LOOKUP_ROWS else 8,
            "num_stages": 3 if half else 2,
        },
    )  # fmt: skip

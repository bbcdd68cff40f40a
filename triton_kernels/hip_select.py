"""`hip_select`: one launch, a program per list; nothing read by the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, launch
from .hip_keys import (
    NONE,
    SIZES,
    arguments,
    best_of_rows,
    options,
    ordered,
    places,
    prepared,
    query_rows,
    sampled_rows,
    top,
)

MOST_NODES = 1024


@triton.jit(do_not_specialize=[*SIZES, "kv_block", "key_stride", "q_stride", "keep"])
def hip_select_kernel(
    query, key, table, lengths, indices, counts, H, Hq, Hkv, Tq, Tk, Mq, K, q_block, sink, window,
    page_bits, pages, sign, q_b, q_h, q_t, k_b, k_h, k_t, t_b, kv_block, key_stride, q_stride, keep,
    NODES: tl.constexpr, BRANCH: tl.constexpr, CENTRE: tl.constexpr, CAUSAL: tl.constexpr,
    SAMPLES: tl.constexpr, PAGED: tl.constexpr, HAS_LENGTHS: tl.constexpr, HOLD: tl.constexpr,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """SAMPLES keys of a block, padded to a power of two, are scored; a tile is BLOCK_C blocks."""
    BLOCK_C: tl.constexpr = max(1, BLOCK_N // SAMPLES)
    CHILDREN: tl.constexpr = NODES * BRANCH
    # heads that share keys run side by side, for the sake of the second-level cache
    pid, side = tl.program_id(0), H // Hkv
    block, i_kv = pid // side % Mq, pid // side // Mq
    batch, kv_head = (i_kv // Hkv).to(tl.int64), (i_kv % Hkv).to(tl.int64)
    i_list = kv_head * side + pid % side
    heads = Hq // H
    p_key = key + kv_head * k_h
    p_table = table + batch * t_b
    if not PAGED:
        p_key += batch * k_b
    n_keys = Tk
    if HAS_LENGTHS:
        n_keys = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), Tk)
    last, n_rows, limit = sampled_rows(block, q_block, q_stride, Tq, n_keys, window, CAUSAL)
    begin = sink // kv_block
    size = tl.maximum((limit + kv_block) // kv_block - begin, 0)
    p_query = query + batch * q_b + i_list * heads * q_h
    o_out = ((batch * H + i_list) * Mq + block) * K
    o_i = tl.arange(0, NODES)
    if size <= keep:
        for start in range(0, K, NODES):
            o = start + o_i
            tl.store(indices + o_out + o, tl.where(o < size, begin + o, 0), mask=o < K)
        tl.store(counts + (batch * H + i_list) * Mq + block, size)
        return
    parts = tl.cdiv(heads * n_rows, BLOCK_R)
    b_first, b_limit = query_rows(
        p_query, q_h, q_t, 0, heads, last, n_rows, limit, q_stride, D, CAUSAL, BLOCK_R, BLOCK_D
    )
    # o_i * size // keep, within 32 bits
    b_start = o_i * (size // keep) + o_i * (size % keep) // keep
    b_length = (o_i + 1) * (size // keep) + (o_i + 1) * (size % keep) // keep - b_start
    b_start, b_length = begin + b_start, tl.where(o_i < keep, b_length, 0)
    o_c, o_t, o_s = tl.arange(0, CHILDREN), tl.arange(0, BLOCK_C), tl.arange(0, SAMPLES)
    while tl.max(b_length) > 1:
        # child i lies between cuts i * length // BRANCH
        b_parent = tl.gather(b_start, o_c // BRANCH, 0)
        b_size = tl.gather(b_length, o_c // BRANCH, 0)
        i_child, whole, part = o_c % BRANCH, b_size // BRANCH, b_size % BRANCH
        c_start = i_child * whole + i_child * part // BRANCH
        c_length = (i_child + 1) * whole + (i_child + 1) * part // BRANCH - c_start
        c_start += b_parent
        c_score = tl.full([CHILDREN], NONE, tl.int32)
        for i in range(tl.cdiv(keep * BRANCH, BLOCK_C)):
            b_c = tl.gather(c_start, i * BLOCK_C + o_t, 0)
            b_l = tl.gather(c_length, i * BLOCK_C + o_t, 0)
            if CENTRE:
                b_c += b_l // 2
            tokens = b_c[:, None] * kv_block + o_s[None, :] * key_stride
            valid = (b_l > 0)[:, None] & (o_s * key_stride < kv_block)[None, :] & (tokens < n_keys)
            tokens = tl.reshape(tokens, [BLOCK_C * SAMPLES])
            valid = tl.reshape(valid, [BLOCK_C * SAMPLES])
            b_s = best_of_rows(
                b_first, b_limit, p_query, q_h, q_t, parts, heads, last, n_rows, limit, q_stride,
                p_key, p_table, k_b, k_t, page_bits, pages, tokens, valid, sign,
                HOLD, D, CAUSAL, PAGED, BLOCK_R, BLOCK_D,
            )  # fmt: skip
            b_s = ordered(tl.max(tl.reshape(b_s, [BLOCK_C, SAMPLES]), 1))
            b_s = tl.where(b_l > 0, b_s, NONE)
            c_score = tl.where(o_c // BLOCK_C == i, tl.gather(b_s, o_c % BLOCK_C, 0), c_score)
        taken, n = top(c_score, keep)
        at = places(taken, n, NODES)
        b_start = tl.gather(c_start, at, 0)
        b_length = tl.where(o_i < n, tl.gather(c_length, at, 0), 0)
    tl.store(indices + o_out + o_i, b_start, mask=o_i < K)
    tl.store(counts + (batch * H + i_list) * Mq + block, keep)


def hip_select(
    query: torch.Tensor,
    key: torch.Tensor,
    budget: int = 512,
    q_block: int = 64,
    kv_block: int = 2,
    q_stride: int = 2,
    key_stride: int = 1,
    sink: int = 16,
    window: int = 256,
    representative: str = "centre",
    branch: int = 4,
    share_kv_heads: bool = False,
    causal: bool = True,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As sparse_attn/reference/hip_select.py."""
    query, key = prepared(query, key)
    tokens = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    keep = triton.cdiv(min(budget, tokens), kv_block)
    lists = key.shape[1] if share_kv_heads else query.shape[1]
    rows = query.shape[1] // lists * triton.cdiv(min(q_block, query.shape[2]), q_stride)
    results, args = arguments(
        query, key, lists, q_block, keep, (sink, window), scale, block_table, kv_lengths
    )
    launch.run(
        hip_select_kernel, results[1].numel(), *args, kv_block, key_stride, q_stride, keep,
        NODES=min(MOST_NODES, configs.padded(triton.cdiv(budget, kv_block), 32)), BRANCH=branch,
        CENTRE=representative == "centre", CAUSAL=causal,
        SAMPLES=configs.padded(triton.cdiv(kv_block, key_stride), 1),
        **options(query, rows, block_table, kv_lengths),
    )  # fmt: skip
    return results

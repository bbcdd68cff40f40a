"""`sale_threshold`: attention over the reference region, of which only the sums are wanted."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import configs, launch
from .block_sparse_attention import LN_2, LOG2_E, _load_rows
from .sale_estimate import SIZES, _region

DENSE_BELOW = tl.constexpr(1e-5)


@triton.jit(do_not_specialize=[*SIZES, "parts"])
def sale_threshold_kernel(
    query, key, key_mean, threshold, theta, Hq, Hkv, Tq, Tk, Mq, sink, local, parts, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """theta of BLOCK_M queries of one query block."""
    pid = tl.program_id(0)
    i_part = pid % parts
    pid = pid // parts
    i_row, i_head = pid % Mq, pid // Mq
    i_batch, i_kv = (i_head // Hq).to(tl.int64), (i_head % Hq // (Hq // Hkv)).to(tl.int64)
    o_m = i_row * Q_BLOCK + i_part * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < Tq
    p_query = query + i_batch * q_b + (i_head % Hq).to(tl.int64) * q_h
    p_key = key + i_batch * k_b + i_kv * k_h
    b_q = _load_rows(p_query, o_m, q_t, m_m, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    begin, middle, seen = _region(i_row, Tq, Tk, sink, local, Q_BLOCK, KV_BLOCK)
    # the keys of the region one behind the other
    gap = (middle - begin) * KV_BLOCK
    keys = tl.minimum(seen * KV_BLOCK, Tk) - gap
    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    log2_scale = tl.maximum(scale, 1e-30) * LOG2_E
    for start in range(0, keys, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        o_n = tl.where(place < begin * KV_BLOCK, place, place + gap)
        b_k = _load_rows(p_key, o_n, k_t, place < keys, True, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        sees = (place < keys)[None, :] & (o_n[None, :] <= (Tk - Tq + o_m)[:, None])
        b_s = tl.where(sees, b_s, -float("inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1) * log2_scale)
        # a row that has seen no key yet: any finite reference gives weights of 0
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_l = b_l * tl.exp2(b_m - b_ref) + tl.sum(tl.exp2(b_s * log2_scale - b_ref[:, None]), 1)
        b_m = b_new
    o_d = tl.arange(0, BLOCK_D)
    p_mean = key_mean + (i_batch * Hkv + i_kv) * D + o_d
    b_mean = tl.load(p_mean, mask=o_d < D, other=0.0)
    b_bar = (b_m + tl.log2(b_l)) * LN_2
    tau = tl.load(threshold + i_head % Hq)
    b_bar = (b_bar + tl.log(tau)) / scale - tl.sum(b_q.to(tl.float32) * b_mean[None, :], 1)
    b_bar = tl.where(tau < DENSE_BELOW, -float("inf"), b_bar)
    tl.store(theta + i_head.to(tl.int64) * Tq + o_m, b_bar, mask=m_m)


def sale_threshold(
    query: torch.Tensor,
    key: torch.Tensor,
    key_mean: torch.Tensor,
    threshold: torch.Tensor,
    q_block: int = 64,
    kv_block: int = 32,
    local: int = 128,
    sink: int = 32,
    causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """As the composition in sparse_attn/ops/sale_threshold.py."""
    query, key = map(launch.last_dim_contiguous, (query, key))
    batch, heads, n_queries, head_dim = query.shape
    key_heads, n_keys = key.shape[1:3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    theta = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    tile = configs.threshold_tile(query.dtype, head_dim, q_block)
    n_rows, parts = triton.cdiv(n_queries, q_block), q_block // tile["BLOCK_M"]
    # longer than all keys is as long as them
    sink_blocks = triton.cdiv(min(sink, n_keys), kv_block)
    local_blocks = triton.cdiv(min(local, n_keys + 128), kv_block)
    launch.run(
        sale_threshold_kernel, batch * heads * n_rows * parts, query, key, key_mean.contiguous(),
        threshold.contiguous(), theta, heads, key_heads, n_queries, n_keys, n_rows, sink_blocks,
        local_blocks, parts, scale, *query.stride()[:3], *key.stride()[:3], Q_BLOCK=q_block,
        KV_BLOCK=kv_block, D=head_dim, **tile,
    )  # fmt: skip
    return theta

"""`sale_estimate`: products of 4-bit codes as 8-bit integers, a bit per row and block of keys.

To the bit what sparse_attn/reference/sale_estimate.py says: compiled without fusing products and
sums, divisions are rounded as IEEE has it. A program owns a tile of queries of one head and takes
BLOCK_N keys at a time, ordered so that keys of one step stand a multiple of eight columns apart:
the largest integer of each needs no other thread's. The mask of a row of blocks has a bit for each
of 32 such steps in a word, a word for each block of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, launch
from .sale_quantize import SIZE_BITS, UNITS

LIMIT = tl.constexpr(2.0**30)
SMALL = tl.constexpr(2.0**21)  # rounded biases below are the low bits of UNITS + bias
WHOLE = tl.constexpr(2.0**23)  # numbers from here on are integers
TINY = tl.constexpr(2.0**-126)
EXPAND_ROWS = 64
# lengths vary from call to call: only strides are worth compiling for
SIZES = ["Hq", "Hkv", "Tq", "Tk", "Mq", "n_blocks", "steps", "n_words", "sink", "local", "tiles",
         "splits", "rows"]  # fmt: skip


@triton.jit
def _reciprocal(b_s):
    return tl.where(b_s == 0.0, 0.0, tl.div_rn(1.0, tl.where(b_s == 0.0, 1.0, b_s)))


@triton.jit
def _codes(b_byte):
    """The low and high codes of bytes, int8."""
    b_byte = b_byte.to(tl.int32)
    return ((b_byte & 15 ^ 8) - 8).to(tl.int8), ((b_byte >> 4 & 15 ^ 8) - 8).to(tl.int8)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _region(i_row, Tq, Tk, sink, local, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr):
    """Blocks of keys of a query block: the middle is [sink, local), all it sees [0, seen)."""
    first = Tk - Tq + i_row * Q_BLOCK
    last = tl.minimum(first + Q_BLOCK - 1, Tk - 1)
    seen = tl.where(last < 0, 0, tl.maximum(last, 0) // KV_BLOCK + 1)
    begin = tl.minimum(tl.maximum(tl.maximum(first, 0) // KV_BLOCK - local + 1, 0), seen)
    return tl.minimum(begin, sink), begin, seen


@triton.jit(do_not_specialize=SIZES)
def sale_expand_kernel(
    packed, codes, Hkv, Tk, rows, k_b, k_h, k_t, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys as int8 [B * Hkv, rows, 2, BLOCK_D]: low and high codes, zeros past the end."""
    tiles = tl.cdiv(rows, BLOCK_T)
    i_head, i_tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    o_t, o_d = i_tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    p = packed + i_head // Hkv * k_b + i_head % Hkv * k_h + o_t.to(tl.int64)[:, None] * k_t
    m = (o_t < Tk)[:, None] & (o_d < HALF)[None, :]
    b_low, b_high = _codes(tl.load(p + o_d[None, :], mask=m, other=0))
    p = codes + (i_head * rows + o_t)[:, None] * (2 * BLOCK_D) + o_d[None, :]
    tl.store(p, b_low, mask=(o_t < rows)[:, None])
    tl.store(p + BLOCK_D, b_high, mask=(o_t < rows)[:, None])


@triton.jit(do_not_specialize=SIZES)
def sale_scale_kernel(
    key_bias, key_step, scaled, most, Hq, Hkv, Tk, n_blocks, steps, KV_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Biases by the steps of their keys, [B * Hq, steps * BLOCK_N], and the largest of a step."""
    i_head, i_step = tl.program_id(0) // steps, tl.program_id(0) % steps
    i_kv = i_head // Hq * Hkv + i_head % Hq // (Hq // Hkv)
    o_n = i_step * BLOCK_N + tl.arange(0, BLOCK_N)
    m = o_n < Tk
    o_g = i_kv.to(tl.int64) * (4 * n_blocks) + o_n // KV_BLOCK * 4 + o_n % 8 // 2
    b_s = tl.load(key_step + o_g, mask=m, other=0.0)
    b_u = tl.load(key_bias + i_head.to(tl.int64) * Tk + o_n, mask=m, other=0.0) * _reciprocal(b_s)
    tl.store(scaled + i_head.to(tl.int64) * steps * BLOCK_N + o_n, b_u)
    size = tl.max(b_u.to(tl.int32, bitcast=True) & SIZE_BITS)
    tl.store(most + tl.program_id(0), size.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=SIZES)
def sale_estimate_kernel(
    query, query_step, codes, key_step, scaled, most, theta, mask,
    Hq, Hkv, Tq, Tk, Mq, n_blocks, steps, n_words, sink, local, tiles, splits, q_b, q_h, q_t,
    HALF: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Which blocks of the middle hold a kept pair: [B * Hq, Mq, n_words, blocks of a step]."""
    BLOCKS: tl.constexpr = BLOCK_N // KV_BLOCK  # of keys, in a step
    GROUPS: tl.constexpr = 4 * BLOCKS  # of keys with one step of their codes
    PARTS: tl.constexpr = BLOCK_M // Q_BLOCK  # blocks of queries
    pid = tl.program_id(0)
    i_split = pid % splits
    pid = pid // splits
    # the last queries see most keys: first, so that the short rows fill the gaps at the end
    i_tile = tiles - 1 - pid % tiles
    i_head = pid // tiles
    i_kv = (i_head // Hq * Hkv + i_head % Hq // (Hq // Hkv)).to(tl.int64)
    i_row = i_tile * PARTS
    begin, _, _ = _region(i_row, Tq, Tk, sink, local, Q_BLOCK, KV_BLOCK)
    last_row = tl.minimum(i_row + PARTS, Mq) - 1
    _, end, _ = _region(last_row, Tq, Tk, sink, local, Q_BLOCK, KV_BLOCK)
    first_word = begin // (32 * BLOCKS)
    words = tl.maximum(tl.cdiv(end, 32 * BLOCKS) - first_word, 0)
    if begin >= end:
        return

    # rows past the last query are as that one: they keep what its block keeps
    o_m = tl.minimum(i_tile * BLOCK_M + tl.arange(0, BLOCK_M), Tq - 1)
    o_d, o_g = tl.arange(0, BLOCK_D), tl.arange(0, GROUPS)
    p_query = query + (i_head // Hq).to(tl.int64) * q_b + (i_head % Hq).to(tl.int64) * q_h
    p_query += o_m.to(tl.int64)[:, None] * q_t + o_d[None, :]
    b_low, b_high = _codes(tl.load(p_query, mask=(o_d < HALF)[None, :], other=0))
    query_groups = tl.cdiv(Tq, 16) * 8
    b_qs = tl.load(query_step + i_head.to(tl.int64) * query_groups + o_m // 16 * 8 + o_m % 8)
    b_inverse = _reciprocal(b_qs)
    size = tl.max(b_inverse.to(tl.int32, bitcast=True) & SIZE_BITS)
    most_inverse = size.to(tl.float32, bitcast=True)
    b_theta = tl.load(theta + i_head.to(tl.int64) * Tq + o_m)
    b_theta = tl.where(tl.abs(b_theta) < TINY, 0.0, b_theta)

    # column c is key 8 n + 2 t + e of block b, where c = (2 n + e) GROUPS + 4 b + t
    o_c = tl.arange(0, BLOCK_N)
    o_key = o_c % GROUPS // 4 * KV_BLOCK + o_c // GROUPS // 2 * 8
    o_key += o_c % 4 * 2 + o_c // GROUPS % 2
    p_codes = codes + (i_kv * steps * BLOCK_N + o_key)[None, :] * (2 * BLOCK_D) + o_d[:, None]
    p_scaled = scaled + i_head.to(tl.int64) * steps * BLOCK_N + o_key
    p_step = key_step + i_kv * (4 * n_blocks)
    for word in range(
        first_word + words * i_split // splits, first_word + words * (i_split + 1) // splits
    ):
        b_bits = tl.zeros([BLOCK_M, GROUPS], tl.int32)
        first = tl.maximum(word * 32, begin // BLOCKS)
        for step in range(first, tl.minimum((word + 1) * 32, tl.cdiv(end, BLOCKS))):
            p_k = p_codes + tl.cast(step, tl.int64) * (BLOCK_N * 2 * BLOCK_D)
            b_n = tl.dot(b_low, tl.load(p_k), out_dtype=tl.int32)  # [BLOCK_M, BLOCK_N]
            b_n = tl.dot(b_high, tl.load(p_k + BLOCK_D), b_n, out_dtype=tl.int32)
            b_t = tl.load(p_scaled + step * BLOCK_N)[None, :] * b_inverse[:, None]
            if tl.load(most + i_head * steps + step) * most_inverse < SMALL:
                b_n += (b_t + UNITS).to(tl.int32, bitcast=True)
                b_most = tl.max(tl.reshape(b_n, [BLOCK_M, BLOCK_N // GROUPS, GROUPS]), 1)
                b_x = b_most.to(tl.float32, bitcast=True) - UNITS
            else:
                b_t = tl.where(b_t < LIMIT, b_t, LIMIT)
                b_t = tl.where(b_t > -LIMIT, b_t, -LIMIT)
                b_r = tl.where(b_t < 0.0, -WHOLE, WHOLE)
                b_r = tl.where(tl.abs(b_t) < WHOLE, (b_t + b_r) - b_r, b_t)
                b_n += b_r.to(tl.int32)
                b_most = tl.max(tl.reshape(b_n, [BLOCK_M, BLOCK_N // GROUPS, GROUPS]), 1)
                b_x = b_most.to(tl.float32)
            m_g = step * GROUPS + o_g < 4 * n_blocks
            b_ks = tl.load(p_step + step * GROUPS + o_g, mask=m_g, other=0.0)
            b_x = (b_qs[:, None] * b_ks[None, :]) * b_x
            b_bits |= tl.where(b_x <= b_theta[:, None], 0, 1) << (step % 32)
        b_bits = tl.reduce(tl.reshape(b_bits, [PARTS, Q_BLOCK, GROUPS]), 1, _either)
        b_bits = tl.reduce(tl.reshape(b_bits, [PARTS, BLOCKS, 4]), 2, _either)
        o_row = i_row + tl.arange(0, PARTS)
        p_mask = mask + ((i_head.to(tl.int64) * Mq + o_row)[:, None] * n_words + word) * BLOCKS
        tl.store(p_mask + tl.arange(0, BLOCKS)[None, :], b_bits, mask=(o_row < Mq)[:, None])


@triton.jit(do_not_specialize=SIZES)
def sale_list_kernel(
    mask, theta, indices, counts, Tq, Tk, Mq, n_blocks, n_words, sink, local,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Lists what a query block keeps."""
    pid = tl.program_id(0).to(tl.int64)
    i_row = (pid % Mq).to(tl.int32)
    first, middle, seen = _region(i_row, Tq, Tk, sink, local, Q_BLOCK, KV_BLOCK)
    o_q, o_c = i_row * Q_BLOCK + tl.arange(0, Q_BLOCK), tl.arange(0, CHUNK)
    b_theta = tl.load(theta + pid // Mq * Tq + o_q, mask=o_q < Tq, other=0.0)
    every = tl.max(tl.where(b_theta > -float("inf"), 0, 1)) > 0
    count = 0
    for start in range(0, seen, CHUNK):
        o = start + o_c
        in_middle = (o >= first) & (o < middle)
        i_step = o // BLOCKS
        p = mask + (pid * n_words + i_step // 32) * BLOCKS + o % BLOCKS
        bit = tl.load(p, mask=in_middle, other=0) >> (i_step % 32) & 1
        keep = (o < seen) & ((bit > 0) | (in_middle == 0) | every)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(indices + pid * n_blocks + place, o, mask=keep)
        count += tl.sum(keep.to(tl.int32))
    tl.store(counts + pid, count)
    for start in range(0, n_blocks, CHUNK):
        o = start + o_c
        tl.store(indices + pid * n_blocks + o, 0, mask=(o >= count) & (o < n_blocks))


def sale_estimate(
    query_packed: torch.Tensor,
    query_step: torch.Tensor,
    key_packed: torch.Tensor,
    key_step: torch.Tensor,
    key_bias: torch.Tensor,
    theta: torch.Tensor,
    q_block: int = 64,
    kv_block: int = 32,
    local: int = 128,
    sink: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As sparse_attn/reference/sale_estimate.py."""
    query, key = map(launch.last_dim_contiguous, (query_packed, key_packed))
    query_step, key_step, key_bias, theta = (
        x.contiguous() for x in (query_step, key_step, key_bias, theta)
    )
    batch, heads, n_queries, half = query.shape
    key_heads, n_keys = key.shape[1:3]
    n_rows, n_blocks = triton.cdiv(n_queries, q_block), triton.cdiv(n_keys, kv_block)
    tile = configs.estimate_tile(launch.arch_of(query), 2 * half, n_queries, q_block)
    block_n, blocks = tile["BLOCK_N"], tile["BLOCK_N"] // kv_block
    steps = triton.cdiv(n_blocks, blocks)
    n_words, total = triton.cdiv(steps, 32), batch * heads

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    codes = new(batch * key_heads, steps * block_n, 2, tile["BLOCK_D"], dtype=torch.int8)
    launch.run(
        sale_expand_kernel, batch * key_heads * triton.cdiv(steps * block_n, EXPAND_ROWS), key,
        codes, key_heads, n_keys, steps * block_n, *key.stride()[:3], HALF=half,
        BLOCK_T=EXPAND_ROWS, BLOCK_D=tile["BLOCK_D"],
    )  # fmt: skip
    scaled = new(total, steps * block_n, dtype=torch.float32)
    most = new(total, steps, dtype=torch.float32)
    launch.run(
        sale_scale_kernel, total * steps, key_bias, key_step, scaled, most, heads, key_heads,
        n_keys, n_blocks, steps, KV_BLOCK=kv_block, BLOCK_N=block_n, num_warps=2,
    )  # fmt: skip
    mask = new(total, n_rows, n_words, blocks)
    indices, counts = new(batch, heads, n_rows, n_blocks), new(batch, heads, n_rows)
    # longer than all keys is as long as them
    edges = (
        triton.cdiv(min(sink, n_keys), kv_block),
        triton.cdiv(min(local, n_keys + 128), kv_block),
    )
    tiles = triton.cdiv(n_queries, tile["BLOCK_M"])
    splits = min(n_words, triton.cdiv(2 * launch.processors(query), total * tiles))
    launch.run(
        sale_estimate_kernel, total * tiles * splits, query, query_step, codes, key_step, scaled,
        most, theta, mask, heads, key_heads, n_queries, n_keys, n_rows, n_blocks, steps, n_words,
        *edges, tiles, splits, *query.stride()[:3], HALF=half, Q_BLOCK=q_block, KV_BLOCK=kv_block,
        **tile, enable_fp_fusion=False,
    )  # fmt: skip
    launch.run(
        sale_list_kernel, total * n_rows, mask, theta, indices, counts, n_queries, n_keys, n_rows,
        n_blocks, n_words, *edges, Q_BLOCK=q_block, KV_BLOCK=kv_block, BLOCKS=blocks,
        CHUNK=128 if n_blocks <= 128 else 1024,
    )  # fmt: skip
    return indices, counts

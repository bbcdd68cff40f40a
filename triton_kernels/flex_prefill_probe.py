"""The probe of `flex_prefill_select`: attention of the last queries, per key and per distance.

Scores are computed anew in each of three passes over the keys: cheaper than storing them. The rows
of the probe go in GROUPS of BLOCK_R, each to a program of its own, with arrays of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

# lengths vary from call to call: only strides are worth compiling for
SIZES = ["Hq", "Hkv", "Tq", "Tk", "rows", "chunks", "block", "n_blocks"]


@triton.jit
def _probe(query, q_b, q_h, q_t, i_bh, o_r, Hq, Tq, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of the last `rows` queries of a head those named by `o_r`, [BLOCK_R, BLOCK_D]."""
    o_d = tl.arange(0, BLOCK_D)
    p = query + (i_bh // Hq).to(tl.int64) * q_b + (i_bh % Hq).to(tl.int64) * q_h
    p += (Tq - rows + o_r).to(tl.int64)[:, None] * q_t + o_d[None, :]
    return tl.load(p, mask=(o_r < rows)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _key_head(key, k_b, k_h, i_bh, Hq, Hkv):
    i_kv = i_bh % Hq // (Hq // Hkv)
    return key + (i_bh // Hq).to(tl.int64) * k_b + i_kv.to(tl.int64) * k_h


@triton.jit
def _scores(b_q, p_key, k_t, o_r, o_n, Tk, rows, scale, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scores in units of log2 and which of them exist, [BLOCK_R, BLOCK_N]."""
    o_d = tl.arange(0, BLOCK_D)
    m_n = (o_n >= 0) & (o_n < Tk)
    p = p_key + o_n.to(tl.int64)[:, None] * k_t + o_d[None, :]
    b_k = tl.load(p, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    return b_s, m_n[None, :] & (o_n[None, :] <= (Tk - rows + o_r)[:, None])


@triton.jit(do_not_specialize=SIZES)
def probe_extent_kernel(
    query, key, part_max, part_sum, Hq, Hkv, Tq, Tk, rows, chunks, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Largest score and sum of 2^(score - largest) of each row over one chunk of keys."""
    pid = tl.program_id(0)
    i_bh, i_group, i_chunk = pid // chunks // GROUPS, pid // chunks % GROUPS, pid % chunks
    o_r = i_group * BLOCK_R + tl.arange(0, BLOCK_R)
    b_q = _probe(query, q_b, q_h, q_t, i_bh, o_r, Hq, Tq, rows, D, BLOCK_D)
    p_key = _key_head(key, k_b, k_h, i_bh, Hq, Hkv)
    b_m = tl.full([BLOCK_R], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_R], tl.float32)
    for i in range(tl.minimum(TILES, tl.cdiv(Tk, BLOCK_N) - i_chunk * TILES)):
        o_n = (i_chunk * TILES + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_s, m = _scores(b_q, p_key, k_t, o_r, o_n, Tk, rows, scale, D, BLOCK_D)
        b_s = tl.where(m, b_s, -float("inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_l = b_l * tl.exp2(b_m - b_ref) + tl.sum(tl.exp2(b_s - b_ref[:, None]), 1)
        b_m = b_new
    o_out = (i_bh.to(tl.int64) * chunks + i_chunk) * (GROUPS * BLOCK_R) + o_r
    tl.store(part_max + o_out, b_m)
    tl.store(part_sum + o_out, b_l)


@triton.jit(do_not_specialize=["chunks", "rows"])
def probe_join_kernel(
    part_max, part_sum, row_max, row_weight, finite, chunks, rows, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The softmax of each row: a weight is row_weight * 2^(score - row_max)."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    b_m = tl.full([BLOCK_R], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_R], tl.float32)
    for i in range(chunks):
        p = (i_bh * chunks + i) * BLOCK_R + o_r
        b_pm, b_pl = tl.load(part_max + p), tl.load(part_sum + p)
        b_new = tl.maximum(b_m, b_pm)
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_l = b_l * tl.exp2(b_m - b_ref) + b_pl * tl.exp2(b_pm - b_ref)
        b_m = b_new
    good = (tl.abs(b_m) < float("inf")) & (tl.abs(b_l) < float("inf")) & (b_l > 0)
    tl.store(finite + i_bh, tl.min((good | (o_r >= rows)).to(tl.int32)))
    tl.store(row_max + i_bh * BLOCK_R + o_r, b_m)
    b_w = tl.where(good & (o_r < rows), 1.0 / (b_l * rows), 0.0)
    tl.store(row_weight + i_bh * BLOCK_R + o_r, b_w)


@triton.jit(do_not_specialize=SIZES)
def probe_profile_kernel(
    query, key, row_max, row_weight, vertical, slash, by_key, by_distance,
    Hq, Hkv, Tq, Tk, rows, chunks, block, scale, q_b, q_h, q_t, k_b, k_h, k_t,
    ATTRIBUTE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Sums the weights of a group's rows per key and per distance, [B * Hq, GROUPS, Tk] each.

    With ATTRIBUTE each weight outside of the blocks that every row keeps is split between its key
    and its distance in proportion to their sums, `vertical` and `slash`, of the pass before.
    """
    pid = tl.program_id(0)
    i_bh, i_group, i_chunk = pid // chunks // GROUPS, pid // chunks % GROUPS, pid % chunks
    o_x, o_turn = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    o_r = i_group * BLOCK_R + o_turn
    b_q = _probe(query, q_b, q_h, q_t, i_bh, o_r, Hq, Tq, rows, D, BLOCK_D)
    p_key = _key_head(key, k_b, k_h, i_bh, Hq, Hkv)
    b_m = tl.load(row_max + i_bh.to(tl.int64) * (GROUPS * BLOCK_R) + o_r)[:, None]
    b_w = tl.load(row_weight + i_bh.to(tl.int64) * (GROUPS * BLOCK_R) + o_r)[:, None]
    o_in = i_bh.to(tl.int64) * GROUPS * Tk
    o_out = o_in + i_group.to(tl.int64) * Tk
    own = Tk - Tq + (Tq - rows + o_r) // block * block  # first position of the row's query block
    own = tl.maximum(own, 0) // block * block
    b_carry = tl.zeros([BLOCK_N], tl.float32)
    # the tile before shares distances with the first of this chunk; one past the keys with the last
    last = tl.minimum(TILES, tl.cdiv(Tk, BLOCK_N) + 1 - i_chunk * TILES)
    for i in range(tl.where(i_chunk == 0, 0, -1), last):
        first = (i_chunk * TILES + i) * BLOCK_N
        o_n = first + o_x
        b_s, m = _scores(b_q, p_key, k_t, o_r, o_n, Tk, rows, scale, D, BLOCK_D)
        b_p = tl.where(m, tl.exp2(b_s - b_m) * b_w, 0.0)
        m_n = (o_n >= 0) & (o_n < Tk)
        if ATTRIBUTE:
            b_p = tl.where((o_n >= block)[None, :] & (o_n[None, :] < own[:, None]), b_p, 0.0)
            p_v = vertical + o_in + o_n
            p_d = slash + o_in + ((Tk - rows + o_r)[:, None] - o_n[None, :])
            m_d = m & (o_r < rows)[:, None]
            b_v = tl.load(p_v, mask=m_n, other=0.0)
            b_d = tl.load(p_d, mask=m_d, other=0.0)
            for j in tl.static_range(1, GROUPS):
                b_v += tl.load(p_v + tl.cast(j, tl.int64) * Tk, mask=m_n, other=0.0)
                b_d += tl.load(p_d + tl.cast(j, tl.int64) * Tk, mask=m_d, other=0.0)
            b_column = b_p * (b_v[None, :] / tl.maximum(b_v[None, :] + b_d, 1e-30))
            b_p = tl.maximum(b_p - b_column, 0.0)
        else:
            b_column = b_p
        m_n = m_n & (i >= 0)
        tl.store(by_key + o_out + o_n, tl.sum(b_column, 0), mask=m_n)
        # turn row r by r places: entry x then holds distance base + x, or that minus BLOCK_N
        b_turned = tl.gather(b_p, (o_turn[:, None] - o_x[None, :]) & (BLOCK_N - 1), 1)
        lower = o_turn[:, None] >= o_x[None, :]
        o_d = Tk - rows + i_group * BLOCK_R - first + o_x
        b_sum = tl.sum(tl.where(lower, b_turned, 0.0), 0) + b_carry
        tl.store(by_distance + o_out + o_d, b_sum, mask=(o_d >= 0) & (o_d < Tk) & (i >= 0))
        b_carry = tl.sum(tl.where(lower, 0.0, b_turned), 0)


@triton.jit(do_not_specialize=SIZES)
def mean_key_kernel(
    key, mean, Hkv, Tk, block, n_blocks, k_b, k_h, k_t, D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Means of the keys of each block, [B, Hkv, n_blocks, D]."""
    pid = tl.program_id(0)
    i_bh, i_c = pid // n_blocks, pid % n_blocks
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    o_n = i_c * block + o_t
    m_n = (o_t < block) & (o_n < Tk)
    p = key + (i_bh // Hkv).to(tl.int64) * k_b + (i_bh % Hkv).to(tl.int64) * k_h
    p += o_n.to(tl.int64)[:, None] * k_t + o_d[None, :]
    b_k = tl.load(p, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    size = tl.minimum(block, Tk - i_c * block)
    tl.store(mean + pid.to(tl.int64) * D + o_d, tl.sum(b_k, 0) / size, mask=o_d < D)


@triton.jit(do_not_specialize=SIZES)
def block_sums_kernel(
    query, mean_key, vertical, columns, diagonals, mass, ranked, estimate,
    Hq, Hkv, Tq, Tk, rows, block, n_blocks, scale, q_b, q_h, q_t, GROUPS: tl.constexpr,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums per block, and the scores of the probe's mean against the means of the blocks.

    `ranked` [B * Hq, 2 * n_blocks] holds columns, then buckets of distances.
    """
    parts = tl.cdiv(n_blocks, BLOCK_C)
    i_bh, i_part = tl.program_id(0) // parts, tl.program_id(0) % parts
    o_c = i_part * BLOCK_C + tl.arange(0, BLOCK_C)
    o_t, o_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_c = o_c < n_blocks
    o_n = o_c[:, None] * block + o_t[None, :]
    m_n = (o_t < block)[None, :] & (o_n < Tk)
    b_mass = tl.zeros([BLOCK_C], tl.float32)
    b_column, b_bucket = b_mass, b_mass
    for i in range(GROUPS):
        o_in = (i_bh.to(tl.int64) * GROUPS + i) * Tk + o_n
        b_mass += tl.sum(tl.load(vertical + o_in, mask=m_n, other=0.0), 1)
        b_column += tl.sum(tl.load(columns + o_in, mask=m_n, other=0.0), 1)
        b_bucket += tl.sum(tl.load(diagonals + o_in, mask=m_n, other=0.0), 1)
    o_out = i_bh.to(tl.int64) * n_blocks + o_c
    o_rank = i_bh.to(tl.int64) * (2 * n_blocks) + o_c
    tl.store(mass + o_out, b_mass, mask=m_c)
    tl.store(ranked + o_rank, b_column, mask=m_c)
    tl.store(ranked + o_rank + n_blocks, b_bucket, mask=m_c)
    b_mean = tl.zeros([BLOCK_D], tl.float32)
    for i in range(GROUPS):
        o_r = i * BLOCK_R + tl.arange(0, BLOCK_R)
        b_q = _probe(query, q_b, q_h, q_t, i_bh, o_r, Hq, Tq, rows, D, BLOCK_D)
        b_mean += tl.sum(b_q.to(tl.float32), 0) / rows
    i_kv = i_bh // Hq * Hkv + i_bh % Hq // (Hq // Hkv)
    p = mean_key + (i_kv.to(tl.int64) * n_blocks + o_c)[:, None] * D + o_d[None, :]
    b_k = tl.load(p, mask=m_c[:, None] & (o_d < D)[None, :], other=0.0)  # [BLOCK_C, BLOCK_D]
    size = tl.minimum(block, Tk - o_c * block).to(tl.float32)
    b_s = tl.sum(b_k * b_mean[None, :], 1) * scale + tl.log(tl.maximum(size, 1.0))
    tl.store(estimate + o_out, b_s, mask=m_c)

"""`flex_prefill_select`, variant "exact": nine launches, no sort, nothing read by the host.

The probe's sums (flex_prefill_probe.py) go into one program per head, which finds how many columns
and buckets of distances reach gamma by a search over the bits of the values. Then each row of
blocks marks what it keeps and lists it. Heads that choose per row score all pairs of blocks first,
in the memory of the result.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import configs, launch
from .flex_prefill_probe import (
    SIZES,
    block_sums_kernel,
    mean_key_kernel,
    probe_extent_kernel,
    probe_join_kernel,
    probe_profile_kernel,
)

COLUMN, BUCKET, AT_PROBE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
QUERY_AWARE, EVERYTHING = tl.constexpr(1), tl.constexpr(2)
BISECT = tl.constexpr(16)  # thresholds tried at once: four bits of the value


@triton.jit
def _threshold(p_x, n, target, BY_COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """How to take the fewest of `n` values, largest first, that reach a count or a sum.

    Returns the bits of the smallest value to take, and how many that are equal to it to take, in
    order of their places. Bits of non-negative floats are ordered as they are; negative values are
    never taken. Values of 0 are all taken, where even all of them do not reach the target.
    """
    o_i, o_c = tl.arange(0, BISECT), tl.arange(0, CHUNK)
    low = 0
    for digit in range(8):
        shift = 28 - 4 * digit
        # the sign bit: of the first digit only the lower half are values
        usable = (o_i < 8) | (digit > 0)
        bound = low + (tl.where(usable, o_i, 0) << shift)
        b_reached = tl.zeros([BISECT], tl.float32)
        for start in range(0, n, CHUNK):
            b_x = tl.load(p_x + start + o_c, mask=start + o_c < n, other=-1.0)
            b_gain = tl.full([CHUNK], 1.0, tl.float32) if BY_COUNT else b_x
            above = b_x.to(tl.int32, bitcast=True)[:, None] >= bound[None, :]
            b_reached += tl.sum(tl.where(above, b_gain[:, None], 0.0), 0)
        low += tl.max(tl.where((b_reached >= target) & usable, o_i, 0)) << shift
    over = tl.zeros([CHUNK], tl.float32)
    for start in range(0, n, CHUNK):
        b_x = tl.load(p_x + start + o_c, mask=start + o_c < n, other=-1.0)
        b_gain = tl.full([CHUNK], 1.0, tl.float32) if BY_COUNT else b_x
        over += tl.where(b_x.to(tl.int32, bitcast=True) > low, b_gain, 0.0)
    missing = target - tl.sum(over)
    if BY_COUNT:
        return low, missing.to(tl.int32)
    else:
        value = low.to(tl.float32, bitcast=True)
        equal = tl.ceil(tl.minimum(missing / tl.maximum(value, 1e-37), 1e9)).to(tl.int32)
        return low, tl.where(low > 0, equal, 2147483647)


@triton.jit
def _taken(b_x, low, equal, seen):
    """Which of a chunk's values a threshold takes; `seen` counts those equal to it before."""
    bits = b_x.to(tl.int32, bitcast=True)
    b_equal = (bits == low).to(tl.int32)
    place = seen + tl.cumsum(b_equal, 0) - b_equal
    return (bits > low) | ((b_equal > 0) & (place < equal)), seen + tl.sum(b_equal)


@triton.jit
def _count_taken(p_x, n, low, equal, CHUNK: tl.constexpr):
    """How many values lie above a threshold, and how many equal it, up to `equal`."""
    o_c = tl.arange(0, CHUNK)
    above, same = 0, 0
    for start in range(0, n, CHUNK):
        b_x = tl.load(p_x + start + o_c, mask=start + o_c < n, other=-1.0)
        bits = b_x.to(tl.int32, bitcast=True)
        above += tl.sum((bits > low).to(tl.int32))
        same += tl.sum((bits == low).to(tl.int32))
    return above, tl.minimum(same, equal)


@triton.jit
def _softmax_extent(p_x, n, CHUNK: tl.constexpr):
    """Maximum, and sum of exp(x - maximum)."""
    o_c = tl.arange(0, CHUNK)
    top = -float("inf")
    for start in range(0, n, CHUNK):
        b_x = tl.load(p_x + start + o_c, mask=start + o_c < n, other=-float("inf"))
        top = tl.maximum(top, tl.max(b_x))
    total = 0.0
    for start in range(0, n, CHUNK):
        b_x = tl.load(p_x + start + o_c, mask=start + o_c < n, other=-float("inf"))
        total += tl.sum(tl.exp(b_x - top))
    return top, total


@triton.jit
def _divergence(p_estimate, p_mass, n, CHUNK: tl.constexpr):
    """Square root of the Jensen-Shannon divergence of softmax(estimate) and mass."""
    o_c = tl.arange(0, CHUNK)
    top, total = _softmax_extent(p_estimate, n, CHUNK)
    divergence = 0.0
    for start in range(0, n, CHUNK):
        m = start + o_c < n
        b_a = tl.exp(tl.load(p_estimate + start + o_c, mask=m, other=-float("inf")) - top) / total
        b_b = tl.load(p_mass + start + o_c, mask=m, other=0.0)
        b_m = tl.maximum((b_a + b_b) / 2, 1e-37)
        divergence += tl.sum(tl.where(b_a > 0, b_a * tl.log(tl.maximum(b_a, 1e-37) / b_m), 0.0))
        divergence += tl.sum(tl.where(b_b > 0, b_b * tl.log(tl.maximum(b_b, 1e-37) / b_m), 0.0))
    # NaN stays: it is below no threshold
    return tl.sqrt(tl.where(divergence < 0, 0.0, divergence / 2))


@triton.jit(do_not_specialize=["n_blocks", "low", "high"])
def choose_kernel(
    mass, ranked, estimate, finite, flags, state, pattern, gamma, tau, n_blocks, low, high,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Per head: which columns and buckets to keep, [B * Hq, n_blocks] of flags."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, CHUNK)
    p_mass, p_columns = mass + i_bh * n_blocks, ranked + i_bh * (2 * n_blocks)
    p_buckets = p_columns + n_blocks
    is_finite = tl.load(finite + i_bh) > 0
    divergence = _divergence(estimate + i_bh * n_blocks, p_mass, n_blocks, CHUNK)
    aware = is_finite & (divergence < tau)
    b_paid = tl.zeros([CHUNK], tl.float32)
    for start in range(0, 2 * n_blocks, CHUNK):
        b_paid += tl.load(p_columns + start + o_c, mask=start + o_c < 2 * n_blocks, other=0.0)
    # the rest of the mass lies in blocks that are kept anyway
    needed = tl.where(aware, -1.0, gamma - 1.0 + tl.sum(b_paid))
    least, equal = _threshold(p_columns, 2 * n_blocks, needed, False, CHUNK)
    above, same = _count_taken(p_columns, n_blocks, least, equal, CHUNK)
    n_columns = tl.where(needed > 0, above + same, 0)
    above, same = _count_taken(p_buckets, n_blocks, least, equal - same, CHUNK)
    n_buckets = tl.where(needed > 0, above + same, 0)
    n_columns = tl.minimum(tl.minimum(tl.maximum(n_columns, low), high), n_blocks)
    n_buckets = tl.minimum(tl.minimum(tl.maximum(n_buckets, low), high), n_blocks)
    c_low, c_equal = _threshold(p_columns, n_blocks, n_columns.to(tl.float32), True, CHUNK)
    b_low, b_equal = _threshold(p_buckets, n_blocks, n_buckets.to(tl.float32), True, CHUNK)
    # the estimate promises nothing: where the truth is known, the probe rows, keep that too
    m_low, m_equal = _threshold(p_mass, n_blocks, gamma, False, CHUNK)
    c_seen, b_seen, m_seen = 0, 0, 0
    for start in range(0, n_blocks, CHUNK):
        m = start + o_c < n_blocks
        b_x = tl.load(p_columns + start + o_c, mask=m, other=-1.0)
        column, c_seen = _taken(b_x, c_low, c_equal, c_seen)
        b_x = tl.load(p_buckets + start + o_c, mask=m, other=-1.0)
        bucket, b_seen = _taken(b_x, b_low, b_equal, b_seen)
        b_x = tl.load(p_mass + start + o_c, mask=m, other=-1.0)
        at_probe, m_seen = _taken(b_x, m_low, m_equal, m_seen)
        b_flag = tl.where(column, COLUMN, 0) + tl.where(bucket, BUCKET, 0)
        b_flag += tl.where(at_probe & aware, AT_PROBE, 0)
        tl.store(flags + i_bh * n_blocks + start + o_c, b_flag.to(tl.int8), mask=m)
    tl.store(pattern + i_bh, aware.to(tl.int32))
    tl.store(state + i_bh, tl.where(is_finite, tl.where(aware, QUERY_AWARE, 0), EVERYTHING))


@triton.jit(do_not_specialize=[*SIZES, "n_rows"])
def pooled_scores_kernel(
    query, mean_key, state, scores, Hq, Hkv, Tq, Tk, block, n_blocks, n_rows, scale,
    q_b, q_h, q_t, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of means of query blocks against means of key blocks, for query-aware heads."""
    parts = tl.cdiv(n_rows, BLOCK_M)
    i_bh, i_part = tl.program_id(0) // parts, tl.program_id(0) % parts
    if tl.load(state + i_bh) != QUERY_AWARE:
        return
    o_row, o_d = i_part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    p = query + (i_bh // Hq).to(tl.int64) * q_b + (i_bh % Hq).to(tl.int64) * q_h
    b_mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(block):
        o_q = o_row * block + i
        p_q = p + o_q.to(tl.int64)[:, None] * q_t + o_d[None, :]
        m = (o_q < Tq)[:, None] & (o_d < D)[None, :]
        b_mean += tl.load(p_q, mask=m, other=0.0).to(tl.float32)
    size = tl.minimum(block, Tq - o_row * block)
    b_mean = b_mean / tl.maximum(size, 1).to(tl.float32)[:, None]
    i_kv = i_bh // Hq * Hkv + i_bh % Hq // (Hq // Hkv)
    p_mean = mean_key + i_kv.to(tl.int64) * n_blocks * D
    p_out = scores + (i_bh.to(tl.int64) * n_rows + o_row)[:, None] * n_blocks
    last = Tk - Tq + tl.minimum((i_part + 1) * BLOCK_M * block, Tq)  # keys that some row sees
    for start in range(0, tl.cdiv(tl.maximum(last, 0), block), BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        m = (o_c < n_blocks)[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_mean + o_c.to(tl.int64)[:, None] * D + o_d[None, :], mask=m, other=0.0)
        b_s = tl.dot(b_mean, tl.trans(b_k), input_precision="ieee") * scale
        b_s += tl.log(tl.maximum(tl.minimum(block, Tk - o_c * block), 1).to(tl.float32))[None, :]
        m = (o_row < n_rows)[:, None] & (o_c < n_blocks)[None, :]
        tl.store(p_out + o_c[None, :], b_s, mask=m)


@triton.jit
def _kept(p_flags, o_c, first, last, block, n_blocks):
    """Blocks that a row keeps by its head's choice: sink, own, columns and buckets."""
    m = (o_c < n_blocks) & (o_c * block <= last)
    kept = (o_c == 0) | (o_c >= tl.maximum(first, 0) // block)
    kept = kept | ((tl.load(p_flags + o_c, mask=m, other=0) & COLUMN) > 0)
    # distances of the row's queries to the block's keys lie in up to three buckets
    near = tl.maximum(first - o_c * block - block + 1, 0) // block
    far = tl.maximum(last - o_c * block, 0) // block
    for i in tl.static_range(3):
        m_b = m & (near + i <= far)
        kept = kept | ((tl.load(p_flags + near + i, mask=m_b, other=0) & BUCKET) > 0)
    return kept & m


@triton.jit
def _weigh_row(p_scores, p_flags, first, last, visible, block, n_blocks, CHUNK: tl.constexpr):
    """Turns scores into softmax weights, -1 where the block is kept already.

    Returns the weight of what is kept, NaN if a score is not finite.
    """
    o_c = tl.arange(0, CHUNK)
    top, total = _softmax_extent(p_scores, visible, CHUNK)
    b_held = tl.zeros([CHUNK], tl.float32)
    for start in range(0, visible, CHUNK):
        o = start + o_c
        b_w = tl.exp(tl.load(p_scores + o, mask=o < visible, other=-float("inf")) - top) / total
        kept = _kept(p_flags, o, first, last, block, n_blocks)
        b_held += tl.where(kept, b_w, 0.0)
        tl.debug_barrier()  # where threads outnumber the chunk, several load the same weight
        tl.store(p_scores + o, tl.where(kept, -1.0, b_w), mask=o < visible)
    tl.debug_barrier()
    return tl.sum(b_held) + 0.0 * total


@triton.jit(do_not_specialize=[*SIZES, "n_rows"])
def list_kernel(
    flags, state, indices, scores, counts, Tq, Tk, rows, block, n_blocks, n_rows, gamma,
    ALL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of blocks: marks what it keeps, and lists it. `scores` and `indices` share memory."""
    pid = tl.program_id(0).to(tl.int64)
    i_bh, i_row = pid // n_rows, (pid % n_rows).to(tl.int32)
    o_c = tl.arange(0, CHUNK)
    first = Tk - Tq + i_row * block
    last = tl.minimum(first + block, Tk) - 1
    visible = tl.where(last < 0, 0, tl.maximum(last, 0) // block + 1)
    p_flags, p_row = flags + i_bh * n_blocks, pid * n_blocks
    kind = EVERYTHING if ALL else tl.load(state + i_bh)
    low, equal, seen = 2147483647, 0, 0
    if kind == QUERY_AWARE:
        held = _weigh_row(scores + p_row, p_flags, first, last, visible, block, n_blocks, CHUNK)
        if held == held:
            low, equal = _threshold(scores + p_row, visible, gamma - held, False, CHUNK)
            # a row whose weights do not reach gamma takes all that are not 0
            equal = tl.where(low > 0, equal, 0)
        else:
            kind = EVERYTHING
    count = 0
    for start in range(0, visible, CHUNK):
        o = start + o_c
        m = o < visible
        if ALL:
            keep = m
        else:
            keep = m & (_kept(p_flags, o, first, last, block, n_blocks) | (kind == EVERYTHING))
            if kind == QUERY_AWARE:
                b_w = tl.load(scores + p_row + o, mask=m, other=-1.0)
                chosen, seen = _taken(b_w, low, equal, seen)
                at_probe = (tl.load(p_flags + o, mask=m, other=0) & AT_PROBE) > 0
                keep = keep | (m & (chosen | (at_probe & (i_row >= (Tq - rows) // block))))
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.debug_barrier()  # entries are written where others were read
        tl.store(indices + p_row + place, o, mask=keep)
        count += tl.sum(keep.to(tl.int32))
    tl.debug_barrier()
    tl.store(counts + pid, count)
    for start in range(0, n_blocks, CHUNK):
        o = start + o_c
        tl.store(indices + p_row + o, 0, mask=(o >= count) & (o < n_blocks))


def flex_prefill_select(
    query: torch.Tensor,
    key: torch.Tensor,
    gamma: float = 0.95,
    tau: float = 0.1,
    min_budget: int = 1024,
    max_budget: int | None = None,
    block_size: int = 128,
    variant: str = "exact",
    causal: bool = True,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `exact` in sparse_attn/reference/flex_prefill_select.py."""
    query, key = map(launch.last_dim_contiguous, (query, key))
    batch, heads, n_queries, head_dim = query.shape
    n_keys, n_rows = key.shape[2], triton.cdiv(n_queries, block_size)
    n_blocks = triton.cdiv(n_keys, block_size)
    device, total = query.device, batch * heads
    indices = torch.empty((batch, heads, n_rows, n_blocks), dtype=torch.int32, device=device)
    counts = torch.empty((batch, heads, n_rows), dtype=torch.int32, device=device)
    pattern = torch.empty((batch, heads), dtype=torch.int32, device=device)
    state = torch.empty((total,), dtype=torch.int32, device=device)
    flags = torch.empty((total, n_blocks), dtype=torch.int8, device=device)
    chunk = 128 if n_blocks <= 128 else 1024
    rows = min(block_size, n_queries, n_keys)
    if gamma >= 1:
        pattern.zero_()
    else:
        scale = 1 / math.sqrt(head_dim) if scale is None else scale
        mean_key, mass, ranked, estimate, finite = _profiles(query, key, rows, block_size, scale)
        low = triton.cdiv(min(min_budget, n_keys), block_size)
        high = n_blocks if max_budget is None else triton.cdiv(min(max_budget, n_keys), block_size)
        launch.run(
            choose_kernel, total, mass, ranked, estimate, finite, flags, state, pattern,
            gamma, tau, n_blocks, low, high, CHUNK=chunk, num_warps=8,
        )  # fmt: skip
        launch.run(
            pooled_scores_kernel, total * triton.cdiv(n_rows, 16), query, mean_key, state,
            indices.view(torch.float32), heads, key.shape[1], n_queries, n_keys, block_size,
            n_blocks, n_rows, scale, *query.stride()[:3], D=head_dim, BLOCK_M=16,
            BLOCK_C=min(64, 8192 // configs.padded(head_dim)), BLOCK_D=configs.padded(head_dim),
        )  # fmt: skip
    launch.run(
        list_kernel, total * n_rows, flags, state, indices, indices.view(torch.float32), counts,
        n_queries, n_keys, rows, block_size, n_blocks, n_rows, gamma, ALL=gamma >= 1, CHUNK=chunk,
    )  # fmt: skip
    return indices, counts, pattern


def _profiles(
    query: torch.Tensor, key: torch.Tensor, rows: int, block: int, scale: float
) -> tuple[torch.Tensor, ...]:
    """mean_key, then per head and block: mass, columns and buckets, estimate; and finite."""
    batch, heads, n_queries, head_dim = query.shape
    key_heads, n_keys = key.shape[1:3]
    total, n_blocks = batch * heads, triton.cdiv(n_keys, block)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    tile = configs.probe_tile(query.dtype, head_dim, rows)
    # one tile past the keys: the distances below the last tile's are stored with it
    tiles = triton.cdiv(n_keys, tile["BLOCK_N"]) + 1
    chunks = triton.cdiv(tiles, tile["TILES"])
    sizes = (heads, key_heads, n_queries, n_keys, rows)
    strides = (*query.stride()[:3], *key.stride()[:3])
    log2_scale = scale * math.log2(math.e)
    groups, padded = tile["GROUPS"], tile["GROUPS"] * tile["BLOCK_R"]
    part_max, part_sum = new(total, chunks, padded), new(total, chunks, padded)
    launch.run(probe_extent_kernel, total * groups * chunks, query, key, part_max, part_sum, *sizes,
               chunks, log2_scale, *strides, **tile)  # fmt: skip
    row_max, row_weight = new(total, padded), new(total, padded)
    finite = new(total, dtype=torch.int32)
    launch.run(probe_join_kernel, total, part_max, part_sum, row_max, row_weight, finite, chunks,
               rows, BLOCK_R=padded)  # fmt: skip
    vertical, columns = new(total * groups, n_keys), new(total * groups, n_keys)
    # no row of a group may reach the largest distances
    slash, diagonals = torch.zeros((2, total * groups, n_keys), device=query.device).unbind()
    for attribute, by_key, by_distance in ((False, vertical, slash), (True, columns, diagonals)):
        launch.run(
            probe_profile_kernel, total * groups * chunks, query, key, row_max, row_weight,
            vertical, slash, by_key, by_distance, *sizes, chunks, block, log2_scale, *strides,
            ATTRIBUTE=attribute, **tile,
        )  # fmt: skip
    mean_key = new(batch, key_heads, n_blocks, head_dim)
    block_t, block_d = configs.padded(block, 1), configs.padded(head_dim)
    launch.run(mean_key_kernel, batch * key_heads * n_blocks, key, mean_key, key_heads, n_keys,
               block, n_blocks, *key.stride()[:3], D=head_dim, BLOCK_T=block_t,
               BLOCK_D=block_d)  # fmt: skip
    mass, ranked, estimate = new(total, n_blocks), new(total, 2 * n_blocks), new(total, n_blocks)
    block_c = max(1, 2048 // max(block_t, block_d))
    launch.run(
        block_sums_kernel, total * triton.cdiv(n_blocks, block_c), query, mean_key, vertical,
        columns, diagonals, mass, ranked, estimate, *sizes, block, n_blocks, scale,
        *query.stride()[:3], GROUPS=groups, D=head_dim, BLOCK_R=tile["BLOCK_R"], BLOCK_C=block_c,
        BLOCK_T=block_t, BLOCK_D=block_d,
    )  # fmt: skip
    return mean_key, mass, ranked, estimate, finite

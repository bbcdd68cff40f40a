"""`squeezed_attend`: runs become a list of tokens, a fixed grid attends, what was split is joined.

A tile of rows holds queries of all heads of a group that share a list, or of one head. Its keys
come in tiles: the listed tokens, then the tail. Tiles of keys are dealt out in units, and the units
of all tiles of rows in equal shares to a grid that depends on shapes alone: heads that keep very
different numbers of keys are balanced, and nothing is read by the host. A program has at most one
tile of rows that others began and one that others finish; these are joined in order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import configs, launch
from .block_sparse_attention import LN_2, LOG2_E, _attend, _load_rows

UNIT_KEYS = 128  # the fewest keys of a tile of rows that a program takes
CHUNK = tl.constexpr(256)


@triton.jit(do_not_specialize=["capacity", "Sc"])
def expand_runs_kernel(starts, sums, counts, listed, capacity, Sc, BLOCK: tl.constexpr):
    """The tokens of each list of runs, in order: listed [B * H', Sc]."""
    blocks = tl.cdiv(Sc, BLOCK)
    i_list, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    p_starts, p_sums = starts + i_list * capacity, sums + i_list * capacity
    count = tl.minimum(tl.maximum(tl.load(counts + i_list), 0), capacity)
    n = tl.load(p_sums + count - 1, mask=count > 0, other=0)
    if first >= n:
        return
    o = first + tl.arange(0, BLOCK)
    # the number of runs that end at or before a place
    b_run = tl.zeros([BLOCK], tl.int32)
    span = count
    while span > 1:
        step = span // 2
        b_end = tl.load(p_sums + b_run + step - 1)
        b_run = tl.where(b_end <= o, b_run + step, b_run)
        span -= step
    b_before = tl.load(p_sums + b_run - 1, mask=b_run > 0, other=0)
    b_token = tl.load(p_starts + b_run) + o - b_before
    # a wrong run is clamped: none leads outside of the keys
    b_token = tl.minimum(tl.maximum(b_token, 0), Sc - 1)
    tl.store(listed + i_list * Sc + o, b_token, mask=(o < n) & (o < Sc))


@triton.jit
def _sizes(o_i, m_i, sums, counts, tail_lengths, Tq, Sc, N, capacity, query_tiles, lists,
           LENGTHS: tl.constexpr, HEAD_TILES: tl.constexpr, QUERIES: tl.constexpr):  # fmt: skip
    """Of tiles of rows: how many listed keys and how many keys of the tail they see."""
    o_list = o_i // query_tiles // HEAD_TILES
    count = tl.load(counts + o_list, mask=m_i, other=0)
    count = tl.minimum(tl.maximum(count, 0), capacity)
    p_last = sums + o_list.to(tl.int64) * capacity + count - 1
    n = tl.load(p_last, mask=m_i & (count > 0), other=0)
    length = N
    if LENGTHS:
        length = tl.load(tail_lengths + o_list // lists, mask=m_i, other=0)
        length = tl.minimum(tl.maximum(length, 0), N)
    end_query = tl.minimum((o_i % query_tiles + 1) * QUERIES, Tq)
    tail = tl.maximum(length - Tq + end_query, 0)  # up to the last query
    return tl.minimum(tl.maximum(n, 0), Sc), tail


@triton.jit
def _units(n, tail, BLOCK_N: tl.constexpr, UNIT: tl.constexpr):
    """Of a tile of rows, at least one: its result has to be written."""
    return tl.maximum(tl.cdiv(tl.cdiv(n, BLOCK_N) + tl.cdiv(tail, BLOCK_N), UNIT), 1)


@triton.jit
def _program_of(unit, total, programs):
    """Which program has a unit: program c begins at total * c // programs."""
    return ((unit + 1) * programs + total - 1) // total - 1


@triton.jit(do_not_specialize=["Tq", "Sc", "N", "Hkv", "lists", "capacity", "query_tiles", "items"])
def squeezed_attend_kernel(
    query, key, value, tail_key, tail_value, listed, sums, counts, tail_lengths,
    out, lse, parts, part_lse, split,
    Tq, Sc, N, Hkv, lists, capacity, query_tiles, items, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, tk_b, tk_h, tk_t, tv_b, tv_h, tv_t,
    G: tl.constexpr, LIST_HEADS: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UNIT: tl.constexpr, LENGTHS: tl.constexpr,
    NEGATE: tl.constexpr,
):  # fmt: skip
    HEAD_TILES: tl.constexpr = (LIST_HEADS + HEADS - 1) // HEADS
    pid = tl.program_id(0)
    o_c, o_m, o_d = tl.arange(0, CHUNK), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    total = tl.zeros([], tl.int64)
    for start in range(0, items, CHUNK):
        m = start + o_c < items
        n, tail = _sizes(start + o_c, m, sums, counts, tail_lengths, Tq, Sc, N, capacity,
                         query_tiles, lists, LENGTHS, HEAD_TILES, QUERIES)  # fmt: skip
        total += tl.sum(tl.where(m, _units(n, tail, BLOCK_N, UNIT), 0)).to(tl.int64)
    programs = tl.minimum(tl.num_programs(0), total)
    tl.store(split + 2 * pid, -1)
    if pid >= programs:
        return
    unit, end = total * pid // programs, total * (pid + 1) // programs
    # the tile of rows that the first unit belongs to, and where that begins
    i_item, first_unit, seen = 0, tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for start in range(0, items, CHUNK):
        m = start + o_c < items
        n, tail = _sizes(start + o_c, m, sums, counts, tail_lengths, Tq, Sc, N, capacity,
                         query_tiles, lists, LENGTHS, HEAD_TILES, QUERIES)  # fmt: skip
        b_u = tl.where(m, _units(n, tail, BLOCK_N, UNIT), 0)
        before = m & (seen + tl.cumsum(b_u, 0) <= unit)
        i_item += tl.sum(before.to(tl.int32))
        first_unit += tl.sum(tl.where(before, b_u, 0)).to(tl.int64)
        seen += tl.sum(b_u).to(tl.int64)

    while unit < end:
        n, tail = _sizes(i_item, True, sums, counts, tail_lengths, Tq, Sc, N, capacity,
                         query_tiles, lists, LENGTHS, HEAD_TILES, QUERIES)  # fmt: skip
        n_units = _units(n, tail, BLOCK_N, UNIT)
        full = tl.cdiv(n, BLOCK_N)  # tiles of listed keys
        begin_tile = (unit - first_unit).to(tl.int32) * UNIT
        stop = tl.minimum(end - first_unit, n_units).to(tl.int32)
        end_tile = tl.minimum(stop * UNIT, full + tl.cdiv(tail, BLOCK_N))

        i_list = i_item // query_tiles // HEAD_TILES
        i_batch, i_head = (i_list // lists).to(tl.int64), i_list % lists * LIST_HEADS
        i_kv = (i_head // G).to(tl.int64)
        first_query = i_item % query_tiles * QUERIES
        o_query = first_query + o_m % QUERIES
        o_head = i_item // query_tiles % HEAD_TILES * HEADS + o_m // QUERIES
        m_m = (o_query < Tq) & (o_head < LIST_HEADS) & (o_m < HEADS * QUERIES)
        o_head += i_head
        o_q = o_head.to(tl.int64) * q_h + o_query.to(tl.int64) * q_t
        b_q = _load_rows(query + i_batch * q_b, o_q, 1, m_m, True, D, BLOCK_D)
        if NEGATE:  # `scale` is an absolute value, as in block_sparse_attention
            b_q = (-b_q.to(tl.float32)).to(b_q.dtype)
        # place of each query in the tail; the last sees all of it
        o_position = tail - tl.minimum(first_query + QUERIES, Tq) + o_query

        b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        b_l = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        p_list = listed + i_list.to(tl.int64) * Sc
        p_key, p_value = key + i_batch * k_b + i_kv * k_h, value + i_batch * v_b + i_kv * v_h
        for i in range(begin_tile, tl.minimum(end_tile, full)):
            o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = o_n < n
            o_n = tl.load(p_list + o_n, mask=m_n, other=0)
            b_acc, b_m, b_l = _attend(
                b_q, b_acc, b_m, b_l, p_key, p_value, o_n, m_n, m_n[None, :], k_t, v_t, scale,
                p_key, 0, 0, 0, True, D, DV, BLOCK_D, BLOCK_DV, 0,
            )  # fmt: skip
        p_key = tail_key + i_batch * tk_b + i_kv * tk_h
        p_value = tail_value + i_batch * tv_b + i_kv * tv_h
        for i in range(tl.maximum(begin_tile, full), end_tile):
            o_n = (i - full) * BLOCK_N + tl.arange(0, BLOCK_N)
            b_acc, b_m, b_l = _attend(
                b_q, b_acc, b_m, b_l, p_key, p_value, o_n, o_n < tail,
                o_n[None, :] <= o_position[:, None], tk_t, tv_t, scale,
                p_key, 0, 0, 0, True, D, DV, BLOCK_D, BLOCK_DV, 0,
            )  # fmt: skip

        b_acc = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
        b_lse = b_m + tl.log2(b_l)
        m_out = m_m[:, None] & (o_d < DV)[None, :]
        begins, ends = unit == first_unit, end - first_unit >= n_units
        if begins & ends:
            o_out = (i_batch * Hkv * G + o_head) * Tq + o_query
            tl.store(lse + o_out, b_lse * LN_2, mask=m_m)
            p_out = out + o_out[:, None] * DV + o_d[None, :]
            tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_out)
        else:
            o_part = (2 * pid + begins.to(tl.int32)).to(tl.int64) * BLOCK_M + o_m
            tl.store(part_lse + o_part, b_lse, mask=m_m)
            tl.store(parts + o_part[:, None] * DV + o_d[None, :], b_acc, mask=m_out)
            if begins:
                last = _program_of(first_unit + n_units - 1, total, programs)
                tl.store(split + 2 * pid, i_item)
                tl.store(split + 2 * pid + 1, (last - pid + 1).to(tl.int32))
        first_unit += n_units
        unit = first_unit
        i_item += 1


@triton.jit(do_not_specialize=["Tq", "Hq", "query_tiles"])
def join_units_kernel(
    parts, part_lse, split, out, lse, Tq, Hq, query_tiles,
    LIST_HEADS: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Joins what several programs found for a row of a tile that the first of them began."""
    HEAD_TILES: tl.constexpr = (LIST_HEADS + HEADS - 1) // HEADS
    i_program, i_m = tl.program_id(0) // BLOCK_M, tl.program_id(0) % BLOCK_M
    i_item = tl.load(split + 2 * i_program)
    i_query = i_item % query_tiles * QUERIES + i_m % QUERIES
    i_head = i_item // query_tiles % HEAD_TILES * HEADS + i_m // QUERIES
    if (i_item < 0) | (i_query >= Tq) | (i_head >= LIST_HEADS) | (i_m >= HEADS * QUERIES):
        return
    n = tl.load(split + 2 * i_program + 1)
    o_p, o_d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_DV)
    top, total = -float("inf"), 0.0
    b_acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, n, BLOCK_P):
        o = start + o_p
        o_part = (2 * (i_program + o) + (o == 0).to(tl.int32)).to(tl.int64) * BLOCK_M + i_m
        b_s = tl.load(part_lse + o_part, mask=o < n, other=-float("inf"))
        m_p = (o < n)[:, None] & (o_d < DV)[None, :]
        b_o = tl.load(parts + o_part[:, None] * DV + o_d[None, :], mask=m_p, other=0.0)
        new = tl.maximum(top, tl.max(b_s))
        ref = tl.where(new == -float("inf"), 0.0, new)
        b_w, shrink = tl.exp2(b_s - ref), tl.exp2(top - ref)
        b_acc = b_acc * shrink + tl.sum(b_o * b_w[:, None], 0)
        total = total * shrink + tl.sum(b_w)
        top = new
    b_acc = b_acc / tl.where(total == 0.0, 1.0, total)
    i_list = i_item // query_tiles // HEAD_TILES
    lists = Hq // LIST_HEADS
    row = (i_list // lists * Hq + i_list % lists * LIST_HEADS + i_head).to(tl.int64) * Tq + i_query
    tl.store(lse + row, (top + tl.log2(total)) * LN_2)
    tl.store(out + row * DV + o_d, b_acc.to(out.dtype.element_ty), mask=o_d < DV)


def squeezed_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tail_key: torch.Tensor,
    tail_value: torch.Tensor,
    starts: torch.Tensor,
    sums: torch.Tensor,
    counts: torch.Tensor,
    tail_lengths: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As sparse_attn/reference/squeezed_attend.py; the runs are not checked."""
    query, key, value, tail_key, tail_value = map(
        launch.last_dim_contiguous, (query, key, value, tail_key, tail_value)
    )
    starts, sums, counts = (x.contiguous() for x in (starts, sums, counts))
    batch, heads, n_queries, head_dim = query.shape
    kv_heads, n_tokens, value_dim = value.shape[1:]
    lists, capacity = starts.shape[1:]
    n_tail = tail_key.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    tile = configs.squeezed_tile(
        launch.arch_of(query), query.dtype, head_dim, value_dim, heads // lists, n_queries
    )  # fmt: skip
    options = tile.options
    block_m, block_n = options["BLOCK_M"], options["BLOCK_N"]
    unit = triton.cdiv(UNIT_KEYS, block_n)
    query_tiles = triton.cdiv(n_queries, options["QUERIES"])
    items = batch * lists * query_tiles * tile.per_block
    most = triton.cdiv(triton.cdiv(n_tokens, block_n) + triton.cdiv(n_tail, block_n), unit)
    resident = 2 if block_m < 128 else 1
    programs = min(resident * launch.processors(query), items * most)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    out = new(*query.shape[:3], value_dim, dtype=query.dtype)
    lse = new(*query.shape[:3])
    parts, part_lse = new(programs, 2, block_m, value_dim), new(programs, 2, block_m)
    split = new(programs, 2, dtype=torch.int32)
    listed = new(batch * lists, n_tokens, dtype=torch.int32)
    block = 1024
    if capacity > 0:
        launch.run(
            expand_runs_kernel, len(listed) * triton.cdiv(n_tokens, block),
            starts, sums, counts, listed, capacity, n_tokens, BLOCK=block,
        )  # fmt: skip
    k_b, v_b = (0 if x.shape[0] == 1 else x.stride(0) for x in (key, value))
    launch.run(
        squeezed_attend_kernel, programs,
        query, key, value, tail_key, tail_value, listed, sums, counts,
        counts if tail_lengths is None else tail_lengths, out, lse, parts, part_lse, split,
        n_queries, n_tokens, n_tail, kv_heads, lists, capacity, query_tiles, items,
        max(abs(scale), 1e-30) * LOG2_E.value, *query.stride()[:3], k_b, *key.stride()[1:3],
        v_b, *value.stride()[1:3], *tail_key.stride()[:3], *tail_value.stride()[:3],
        G=heads // kv_heads, UNIT=unit, LENGTHS=tail_lengths is not None, NEGATE=scale < 0,
        **options,
    )  # fmt: skip
    launch.run(
        join_units_kernel, programs * block_m,
        parts, part_lse, split, out, lse, n_queries, heads, query_tiles, BLOCK_P=16,
        **{k: options[k] for k in ("LIST_HEADS", "HEADS", "QUERIES", "DV", "BLOCK_M", "BLOCK_DV")},
    )  # fmt: skip
    return out, lse

"""`block_sparse_attention`: one kernel for prefill and decode, and one that joins split results.

A program owns a tile of rows: queries of one query block, and of all heads of a group that read
the same list, so that each key is loaded once for all of them. Its keys come in tiles from three
disjoint sources: the sink, listed blocks without what sink and window hold, and the window. Tiles
that every row sees whole go through a loop without masks, the others through a second one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import configs, launch

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _listed_below(p_list, count, a, b, c, d):
    """How many of the first `count` ascending ids are below each of four bounds."""
    o_k = tl.arange(0, 256)
    n_a, n_b, n_c, n_d = 0, 0, 0, 0
    for start in range(0, count, 256):
        ids = tl.load(p_list + start + o_k, mask=start + o_k < count, other=2147483647)
        n_a += tl.sum((ids < a).to(tl.int32))
        n_b += tl.sum((ids < b).to(tl.int32))
        n_c += tl.sum((ids < c).to(tl.int32))
        n_d += tl.sum((ids < d).to(tl.int32))
    return n_a, n_b, n_c, n_d


@triton.jit
def _load_rows(base, o_row, stride, m_row, MASKED: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows [rows, D] padded to [rows, BLOCK_D] with zeros."""
    o_d = tl.arange(0, BLOCK_D)
    p = base + (o_row.to(tl.int64) * stride)[:, None] + o_d[None, :]
    if MASKED:
        return tl.load(p, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    elif D != BLOCK_D:
        return tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def _tokens(p_list, first, stop, is_list, n_blocks, KV_BLOCK: tl.constexpr,
            BLOCK_N: tl.constexpr, GATHER: tl.constexpr):  # fmt: skip
    """Keys of the tile that starts at entry `first` of a list's tokens, or at key `first`.

    A wrong id is clamped: no list leads outside of the keys.
    """
    o_n = tl.arange(0, BLOCK_N)
    if GATHER:
        o_v = first + o_n
        ids = tl.load(p_list + o_v // KV_BLOCK, mask=is_list & (o_v < stop), other=0)
        ids = tl.minimum(tl.maximum(ids, 0), n_blocks - 1)
        return tl.where(is_list, ids * KV_BLOCK + o_v % KV_BLOCK, o_v)
    else:
        i_b = tl.load(p_list + first // KV_BLOCK, mask=is_list, other=0)
        i_b = tl.minimum(tl.maximum(i_b, 0), n_blocks - 1)
        return tl.where(is_list, i_b * KV_BLOCK + first % KV_BLOCK, first) + o_n


@triton.jit
def _load_cached(base, o_n, stride, m_n, i_page, page_stride, MASKED: tl.constexpr,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Keys or values of tokens, one after the other or, with PAGE tokens in each, in pages."""
    if PAGE == 0:
        return _load_rows(base, o_n, stride, m_n, MASKED, D, BLOCK_D)
    else:
        o_row = i_page.to(tl.int64) * page_stride + (o_n % PAGE).to(tl.int64) * stride
        return _load_rows(base, o_row, 1, m_n, MASKED, D, BLOCK_D)


@triton.jit
def _pages(p_table, n_pages, o_n, m_n, MASKED: tl.constexpr, PAGE: tl.constexpr):
    """In which page tokens are. A wrong page is clamped: no table leads outside of the cache."""
    if PAGE == 0:
        return o_n  # not used
    else:
        if MASKED:  # places beyond the keys of a sequence may hold anything
            i_page = tl.load(p_table + o_n // PAGE, mask=m_n, other=0)
        else:
            i_page = tl.load(p_table + o_n // PAGE)
        return tl.minimum(tl.maximum(i_page, 0), n_pages - 1)


@triton.jit
def _attend(b_q, b_acc, b_m, b_l, key, value, o_n, m_n, mask, k_t, v_t, scale, p_table, n_pages,
            k_b, v_b, MASKED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Adds one tile of keys to the running softmax of the rows."""
    i_page = _pages(p_table, n_pages, o_n, m_n, MASKED, PAGE)
    # [BLOCK_N, BLOCK_D]
    b_k = _load_cached(key, o_n, k_t, m_n, i_page, k_b, MASKED, D, BLOCK_D, PAGE)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if MASKED:
        b_s = tl.where(mask, b_s, -float("inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    # a row that has seen no key yet: any finite reference gives weights of 0
    b_ref = tl.where(b_new == -float("inf"), 0.0, b_new) if MASKED else b_new
    b_p = tl.exp2(b_s * scale - b_ref[:, None])
    b_alpha = tl.exp2(b_m - b_ref)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    # [BLOCK_N, BLOCK_DV]
    b_v = _load_cached(value, o_n, v_t, m_n, i_page, v_b, MASKED, DV, BLOCK_DV, PAGE)
    b_acc = b_acc * b_alpha[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_acc, b_new, b_l


# lengths vary from call to call, and the strides of lists with them: only strides of queries, keys
# and values are worth compiling for
@triton.jit(
    do_not_specialize=[
        "Tq", "Tk", "Hkv", "Mq", "n_blocks", "capacity", "sink", "window", "splits", "rows",
        "i_b", "i_h", "i_m", "c_b", "c_h", "c_m", "n_pages", "t_b",
    ]
)  # fmt: skip
def block_sparse_attention_kernel(
    query, key, value, indices, counts, out, lse,
    Tq, Tk, Hkv, Mq, n_blocks, capacity, sink, window, scale, splits, rows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, i_b, i_h, i_m, c_b, c_h, c_m,
    block_table, kv_lengths, n_pages, t_b,  # of a cache, otherwise None
    G: tl.constexpr, LIST_HEADS: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, EDGES: tl.constexpr, GATHER: tl.constexpr, NEGATE: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    # G query heads per KV head, LIST_HEADS per list; a tile is HEADS of them x QUERIES queries
    TILES: tl.constexpr = (Q_BLOCK + QUERIES - 1) // QUERIES  # of a query block
    HEAD_TILES: tl.constexpr = (G + HEADS - 1) // HEADS
    pid = tl.program_id(0)
    i_split = pid % splits
    pid = pid // splits
    i_head = pid % HEAD_TILES * HEADS
    pid = pid // HEAD_TILES
    # the last queries see most keys: first, so that the short rows fill the gaps at the end
    i_tile = Mq * TILES - 1 - pid % (Mq * TILES)
    pid = pid // (Mq * TILES)
    i_kv, i_batch = pid % Hkv, (pid // Hkv).to(tl.int64)
    i_row = i_tile // TILES
    first_query = i_row * Q_BLOCK + i_tile % TILES * QUERIES
    end_query = tl.minimum(tl.minimum(first_query + QUERIES, (i_row + 1) * Q_BLOCK), Tq)
    if first_query >= Tq:
        return
    if kv_lengths is not None:
        Tk = tl.minimum(tl.maximum(tl.load(kv_lengths + i_batch), 0), Tk)

    o_m = tl.arange(0, BLOCK_M)
    o_query = first_query + o_m % QUERIES
    o_head = i_head + o_m // QUERIES
    m_m = (o_query < end_query) & (o_head < G) & (o_m < HEADS * QUERIES)
    o_head = i_kv * G + o_head
    o_position = Tk - Tq + o_query
    o_q = o_head.to(tl.int64) * q_h + o_query.to(tl.int64) * q_t
    b_q = _load_rows(query + i_batch * q_b, o_q, 1, m_m, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if NEGATE:  # `scale` is an absolute value, so that a row's maximum can be scaled after the fact
        b_q = (-b_q.to(tl.float32)).to(b_q.dtype)
    p_table = block_table
    if PAGE == 0:
        key += i_batch * k_b + i_kv.to(tl.int64) * k_h
        value += i_batch * v_b + i_kv.to(tl.int64) * v_h
    else:
        p_table += i_batch * t_b
        key += i_kv.to(tl.int64) * k_h
        value += i_kv.to(tl.int64) * v_h
    i_list = (i_kv * G + i_head) // LIST_HEADS
    p_list = indices + i_batch * i_b + i_list.to(tl.int64) * i_h + i_row.to(tl.int64) * i_m
    count = tl.load(counts + i_batch * c_b + i_list.to(tl.int64) * c_h + i_row.to(tl.int64) * c_m)
    count = tl.minimum(tl.maximum(count, 0), capacity)

    # keys below `whole` are seen by every row, keys from `end` on by none
    first_p, last_p = Tk - Tq + first_query, Tk - Tq + end_query - 1
    whole = tl.maximum(first_p + 1, 0) if CAUSAL else Tk
    end = tl.maximum(last_p + 1, 0) if CAUSAL else Tk
    if EDGES:
        clear = tl.where(window > 0, tl.maximum(tl.minimum(whole, first_p - window + 1), 0), whole)
        n_a, n_b, n_c, n_d = _listed_below(
            p_list, count, sink // KV_BLOCK, tl.cdiv(sink, KV_BLOCK), clear // KV_BLOCK,
            tl.cdiv(end, KV_BLOCK),
        )  # fmt: skip
    else:
        n_a, n_b, n_c, n_d = _listed_below(
            p_list, count, 0, 0, whole // KV_BLOCK, tl.cdiv(end, KV_BLOCK)
        )
    # list entries: [0, a) inside the sink, [a, b) partly, [b, c) whole, [c, d) partly
    n_b = tl.minimum(n_b, n_d)
    n_a = tl.minimum(n_a, n_b)
    n_c = tl.maximum(n_c, n_b)
    full_list = (n_c - n_b) * KV_BLOCK // BLOCK_N
    rest_list = n_b * KV_BLOCK + full_list * BLOCK_N
    if EDGES:
        full_sink = tl.minimum(sink, whole) // BLOCK_N
        end_sink = tl.minimum(sink, end)
        low = tl.maximum(tl.maximum(first_p - window + 1, sink), 0)
        high = tl.where(window > 0, last_p + 1, 0)
        full_low = tl.maximum(tl.maximum(last_p - window + 1, sink), 0)
        full_window = tl.maximum(tl.where(window > 0, first_p + 1, 0) - full_low, 0) // BLOCK_N
        full_low = tl.where(full_window > 0, full_low, low)
        rest_window = full_low + full_window * BLOCK_N
        # masked tiles up to the end of: sink, list a to b, list c to d, window below, window above
        e_sink = tl.cdiv(tl.maximum(end_sink - full_sink * BLOCK_N, 0), BLOCK_N)
        e_a = e_sink + tl.cdiv((n_b - n_a) * KV_BLOCK, BLOCK_N)
        e_list = e_a + tl.cdiv(n_d * KV_BLOCK - rest_list, BLOCK_N)
        e_low = e_list + tl.cdiv(full_low - low, BLOCK_N)
        n_masked = e_low + tl.cdiv(tl.maximum(high - rest_window, 0), BLOCK_N)
        n_full = full_sink + full_list + full_window
    else:
        n_masked = tl.cdiv(n_d * KV_BLOCK - rest_list, BLOCK_N)
        n_full = full_list

    b_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in range(n_full * i_split // splits, n_full * (i_split + 1) // splits):
        first = i * BLOCK_N
        is_list = True
        if EDGES:
            is_list = (i >= full_sink) & (i < full_sink + full_list)
            first = tl.where(is_list, n_b * KV_BLOCK + (i - full_sink) * BLOCK_N, first)
            in_window = i >= full_sink + full_list
            first = tl.where(in_window, full_low + (i - full_sink - full_list) * BLOCK_N, first)
        o_n = _tokens(p_list, first, first + BLOCK_N, is_list, n_blocks, KV_BLOCK, BLOCK_N, GATHER)
        o_n = tl.minimum(o_n, Tk - 1)  # only a list out of order needs it
        b_acc, b_m, b_l = _attend(
            b_q, b_acc, b_m, b_l, key, value, o_n, None, None, k_t, v_t, scale, p_table, n_pages,
            k_b, v_b, False, D, DV, BLOCK_D, BLOCK_DV, PAGE,
        )  # fmt: skip
    for i in range(n_masked * i_split // splits, n_masked * (i_split + 1) // splits):
        first, stop = rest_list + i * BLOCK_N, n_d * KV_BLOCK
        is_list = True
        if EDGES:
            is_list = (i >= e_sink) & (i < e_list)
            before = i < e_a
            first = tl.where(before, n_a * KV_BLOCK + (i - e_sink) * BLOCK_N,
                             first - e_a * BLOCK_N)  # fmt: skip
            stop = tl.where(before, n_b * KV_BLOCK, stop)
            in_sink, in_window = i < e_sink, i >= e_list
            first = tl.where(in_sink, (full_sink + i) * BLOCK_N, first)
            stop = tl.where(in_sink, end_sink, stop)
            below = i < e_low
            at = tl.where(below, low + (i - e_list) * BLOCK_N, rest_window + (i - e_low) * BLOCK_N)
            first = tl.where(in_window, at, first)
            stop = tl.where(in_window, tl.where(below, full_low, high), stop)
        o_n = _tokens(p_list, first, stop, is_list, n_blocks, KV_BLOCK, BLOCK_N, GATHER)
        m_n = (first + tl.arange(0, BLOCK_N) < stop) & (o_n < Tk)
        mask = m_n[None, :]
        if CAUSAL:
            mask = mask & (o_n[None, :] <= o_position[:, None])
        if EDGES:
            near = o_n[None, :] > o_position[:, None] - window
            near = near & (o_n[None, :] <= o_position[:, None])
            mask = mask & (in_sink | ((o_n >= sink)[None, :] & (near == in_window)))
        b_acc, b_m, b_l = _attend(
            b_q, b_acc, b_m, b_l, key, value, o_n, m_n, mask, k_t, v_t, scale, p_table, n_pages,
            k_b, v_b, True, D, DV, BLOCK_D, BLOCK_DV, PAGE,
        )  # fmt: skip

    b_acc = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    o_out = i_split.to(tl.int64) * rows + (i_batch * Hkv * G + o_head) * Tq + o_query
    tl.store(lse + o_out, (b_m + tl.log2(b_l)) * LN_2, mask=m_m)
    o_d = tl.arange(0, BLOCK_DV)
    p_out = out + o_out[:, None] * DV + o_d[None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_m[:, None] & (o_d < DV)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def join_splits_kernel(
    parts, part_lse, out, lse, rows, splits, DV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Joins what the splits of a row found, in their order."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_DV)
    m_r = o_r < rows
    b_m = tl.full([BLOCK_R], -float("inf"), tl.float32)
    b_l = tl.zeros([BLOCK_R], tl.float32)
    b_acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for i in range(splits):
        o_p = rows.to(tl.int64) * i + o_r
        b_s = tl.load(part_lse + o_p, mask=m_r, other=-float("inf")) * LOG2_E
        m_p = m_r[:, None] & (o_d < DV)[None, :]
        b_o = tl.load(parts + o_p[:, None] * DV + o_d[None, :], mask=m_p, other=0.0)
        b_new = tl.maximum(b_m, b_s)
        b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_alpha, b_w = tl.exp2(b_m - b_ref), tl.exp2(b_s - b_ref)
        b_acc = b_acc * b_alpha[:, None] + b_o * b_w[:, None]
        b_l = b_l * b_alpha + b_w
        b_m = b_new
    b_acc = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    tl.store(lse + o_r, (b_m + tl.log2(b_l)) * LN_2, mask=m_r)
    p_out = out + o_r[:, None] * DV + o_d[None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_r[:, None] & (o_d < DV)[None, :])


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    q_block: int,
    kv_block: int,
    causal: bool = True,
    sink: int = 0,
    window: int = 0,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As sparse_attn/reference/block_sparse_attention.py; no contents of tables are checked."""
    query, key, value, indices = map(launch.last_dim_contiguous, (query, key, value, indices))
    batch, heads, n_queries, head_dim = query.shape
    key_heads, n_keys = key.shape[1:3]
    page, n_pages, table_stride = 0, None, None
    if block_table is not None:
        block_table = launch.last_dim_contiguous(block_table)
        page, n_pages, table_stride = n_keys, key.shape[0], block_table.stride(0)
        n_keys = page * block_table.shape[1]
    if kv_lengths is not None:
        kv_lengths = launch.last_dim_contiguous(kv_lengths)
    sink, window = min(sink, n_keys), min(window, n_keys)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    tile = configs.attention_tile(
        launch.arch_of(query), query.dtype, head_dim, value.shape[3], heads // key_heads,
        heads // indices.shape[1], configs.query_rows(n_queries, q_block), kv_block,
    )  # fmt: skip
    tiles = batch * key_heads * indices.shape[2] * tile.per_block
    listed = min(n_keys, indices.shape[3] * kv_block + sink + window)
    splits = _splits(tiles, listed // tile.options["BLOCK_N"], launch.processors(query))
    rows = batch * heads * n_queries
    out = torch.empty((*query.shape[:3], value.shape[3]), dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((splits, rows, value.shape[3]), dtype=lse.dtype, device=lse.device)
        part_lse = torch.empty((splits, rows), dtype=lse.dtype, device=lse.device)
    launch.run(
        block_sparse_attention_kernel, tiles * splits,
        query, key, value, indices, counts, parts, part_lse,
        n_queries, n_keys, key_heads, indices.shape[2], triton.cdiv(n_keys, kv_block),
        indices.shape[3], sink, window, max(abs(scale), 1e-30) * LOG2_E.value, splits, rows,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *indices.stride()[:3],
        *counts.stride(), block_table, kv_lengths, n_pages, table_stride, CAUSAL=causal,
        EDGES=sink > 0 or window > 0, NEGATE=scale < 0, PAGE=page, **tile.options,
    )  # fmt: skip
    if splits > 1:
        block_r = max(1, 1024 // tile.options["BLOCK_DV"])
        launch.run(
            join_splits_kernel, triton.cdiv(rows, block_r),
            parts, part_lse, out, lse, rows, splits, DV=value.shape[3], BLOCK_R=block_r,
            BLOCK_DV=tile.options["BLOCK_DV"],
        )  # fmt: skip
    return out, lse


def _splits(tiles: int, key_tiles: int, n_processors: int) -> int:
    """Into how many programs the keys of a tile go; shapes alone decide, never the lists."""
    if tiles >= n_processors:
        return 1
    return max(1, min(triton.cdiv(2 * n_processors, tiles), key_tiles // 4, 128))

"""`squeezed_lookup`: scores of queries against centroids, the test, runs; nothing read by the host.

A program scores a tile of rows against a share of the centroids. With few queries the rows are
those of all heads of a group, each centroid is read once for all of them, and the scores are
kept; with many, a second pass computes them again and sums each cluster's probabilities over the
rows, so that no memory of queries x clusters is needed. Then one program per choice tests the
clusters and lists the runs. A coarse level goes first and marks the clusters that take part.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import configs, launch
from .block_sparse_attention import LOG2_E, _load_rows

KEEP, EXTENT, SUM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what to do with scores
MOST_SPLITS = 128


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _joined_extent(p_top, p_total, splits, m_row, BLOCK_M: tl.constexpr):
    """log2 of the rows' sums over all clusters, from those of the splits, in their order."""
    b_top = tl.load(p_top, mask=m_row, other=0.0)
    for i in range(1, splits):
        b_top = tl.maximum(b_top, tl.load(p_top + i, mask=m_row, other=0.0))
    b_ref = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    for i in range(splits):
        b_part = tl.load(p_total + i, mask=m_row, other=1.0)
        b_total += b_part * tl.exp2(tl.load(p_top + i, mask=m_row, other=0.0) - b_ref)
    return b_top + tl.log2(b_total)


@triton.jit
def _log_sum(p_top, p_total, splits, SPLITS: tl.constexpr):
    """The same of one row."""
    o_s = tl.arange(0, SPLITS)
    b_top = tl.load(p_top + o_s, mask=o_s < splits, other=-float("inf"))
    b_total = tl.load(p_total + o_s, mask=o_s < splits, other=0.0)
    top = tl.max(b_top)
    ref = tl.where(top == -float("inf"), 0.0, top)
    return top + tl.log2(tl.sum(b_total * tl.exp2(b_top - ref)))


@triton.jit
def _probability(b_s, b_log_sum):
    """Of scores in units of log2 e; infinite in a row whose sum is not finite."""
    return tl.where(tl.abs(b_log_sum) < float("inf"), tl.exp2(b_s - b_log_sum), float("inf"))


# lengths vary from call to call: only strides of queries and centroids are worth compiling for
@triton.jit(do_not_specialize=["Tq", "K", "Hkv", "splits", "query_tiles", "n_b", "n_h"])
def cluster_scores_kernel(
    query, centroids, log_counts, alive, scores, top, total,
    Tq, K, Hkv, splits, query_tiles, scale,
    q_b, q_h, q_t, c_b, c_h, c_t, n_b, n_h,
    G: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, CHOICES: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIVE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    # a tile is HEADS of the G query heads of a KV head, which make CHOICES choices, x QUERIES
    HEAD_TILES: tl.constexpr = (G + HEADS - 1) // HEADS
    pid = tl.program_id(0)
    i_split = pid % splits
    pid = pid // splits
    i_head = pid % HEAD_TILES * HEADS
    pid = pid // HEAD_TILES
    i_tile = pid % query_tiles
    pid = pid // query_tiles
    i_kv, i_batch = pid % Hkv, (pid // Hkv).to(tl.int64)

    o_m = tl.arange(0, BLOCK_M)
    o_query = i_tile * QUERIES + o_m % QUERIES
    o_head = i_head + o_m // QUERIES
    m_m = (o_query < Tq) & (o_head < G) & (o_m < HEADS * QUERIES)
    o_q = (i_kv * G + o_head).to(tl.int64) * q_h + o_query.to(tl.int64) * q_t
    b_q = _load_rows(query + i_batch * q_b, o_q, 1, m_m, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    centroids += i_batch * c_b + i_kv.to(tl.int64) * c_h
    log_counts += i_batch * n_b + i_kv.to(tl.int64) * n_h
    ONE_CHOICE: tl.constexpr = HEADS == 1 or CHOICES == 1
    if ONE_CHOICE:
        p_alive = alive + ((i_batch * Hkv + i_kv) * CHOICES + i_head // (G // CHOICES)) * K
    else:
        o_choice = (i_batch * Hkv + i_kv) * CHOICES + tl.minimum(o_head, G - 1)
        p_alive = alive + o_choice.to(tl.int64) * K
    o_row = ((i_batch * Hkv + i_kv) * G + o_head).to(tl.int64) * Tq + o_query
    if MODE == SUM:
        p = o_row * splits
        b_log_sum = _joined_extent(top + p, total + p, splits, m_m, BLOCK_M)
    b_top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    tiles = tl.cdiv(K, BLOCK_N)
    for i in range(tiles * i_split // splits, tiles * (i_split + 1) // splits):
        o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < K
        b_w = tl.load(log_counts + o_n, mask=m_n, other=-float("inf")) * LOG2_E
        m_n = b_w != -float("inf")
        if ALIVE and ONE_CHOICE:
            m_n = m_n & (tl.load(p_alive + o_n, mask=m_n, other=0) > 0)
        m_mn = m_m[:, None] & m_n[None, :]
        if ALIVE and not ONE_CHOICE:
            m_mn = m_mn & (tl.load(p_alive[:, None] + o_n[None, :], mask=m_mn, other=0) > 0)
            m_n = tl.max(m_mn.to(tl.int32), 0) > 0
        b_c = _load_rows(centroids, o_n, c_t, m_n, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_s = tl.dot(b_q, tl.trans(b_c), input_precision="ieee") * scale
        if MODE == KEEP:
            p_s = scores + o_row[:, None] * K + o_n[None, :]
            tl.store(p_s, b_s, mask=m_m[:, None] & (o_n < K)[None, :])
        if MODE == SUM:
            b_p = tl.where(m_mn, _probability(b_s, b_log_sum[:, None]), 0.0)
            part = ((i_batch * Hkv + i_kv) * G + i_head).to(tl.int64) * query_tiles + i_tile
            tl.store(scores + part * K + o_n, tl.sum(b_p, 0), mask=o_n < K)
        else:
            b_s = tl.where(m_mn, b_s + b_w[None, :], -float("inf"))
            b_new = tl.maximum(b_top, tl.max(b_s, 1))
            b_ref = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_total = b_total * tl.exp2(b_top - b_ref) + tl.sum(tl.exp2(b_s - b_ref[:, None]), 1)
            b_top = b_new
    if MODE != SUM:
        tl.store(top + o_row * splits + i_split, b_top, mask=m_m)
        tl.store(total + o_row * splits + i_split, b_total, mask=m_m)


@triton.jit(do_not_specialize=["K", "Hkv", "splits", "rows", "parts", "n_b", "n_h"])
def test_clusters_kernel(
    scores, top, total, log_counts, alive, threshold, flags,
    K, Hkv, splits, rows, parts, n_b, n_h,
    CHOICES: tl.constexpr, SUMS: tl.constexpr, ALIVE: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """What one choice keeps of a chunk of clusters: flags [choices, K].

    The choice has `rows` rows: their scores, or sums of their probabilities in `parts` parts.
    """
    chunks = tl.cdiv(K, CHUNK)
    i_choice, i_chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    i_kv, i_batch = i_choice // CHOICES % Hkv, i_choice // CHOICES // Hkv
    o = i_chunk * CHUNK + tl.arange(0, CHUNK)
    m = o < K
    p_counts = log_counts + i_batch * n_b + i_kv * n_h
    taking_part = tl.load(p_counts + o, mask=m, other=-float("inf")) != -float("inf")
    if ALIVE:
        taking_part = taking_part & (tl.load(alive + i_choice * K + o, mask=m, other=0) > 0)
    bound = tl.load(threshold)
    always = bound <= 0.0  # scores are positive, but may underflow
    if SUMS:
        b_s = tl.zeros([CHUNK], tl.float32)
        for i in range(parts):
            b_s += tl.load(scores + (i_choice * parts + i) * K + o, mask=m, other=0.0)
        b_s = b_s / rows
    elif rows == 1:
        log_sum = _log_sum(top + i_choice * splits, total + i_choice * splits, splits, SPLITS)
        b_s = tl.load(scores + i_choice * K + o, mask=m, other=0.0) - log_sum
        b_s = tl.where(tl.abs(log_sum) < float("inf"), b_s, float("inf"))
        bound = tl.log2(bound)
    else:
        b_s = tl.zeros([CHUNK], tl.float32)
        for i in range(i_choice * rows, (i_choice + 1) * rows):
            log_sum = _log_sum(top + i * splits, total + i * splits, splits, SPLITS)
            b_s += _probability(tl.load(scores + i * K + o, mask=m, other=0.0), log_sum)
        b_s = b_s / rows
    # above: not at or below, so that it is kept where a side is NaN
    kept = taking_part & tl.where(b_s <= bound, always, True)
    tl.store(flags + i_choice * K + o, kept.to(tl.int8), mask=m)


@triton.jit(do_not_specialize=["K", "parents", "Hkv", "h_b", "h_h"])
def mark_children_kernel(
    flags, children, alive, K, parents, Hkv, h_b, h_h,
    CHOICES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Whether the parent of each cluster of a chunk was kept: alive [choices, K]."""
    chunks = tl.cdiv(K, CHUNK)
    i_choice, i_chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    i_kv, i_batch = i_choice // CHOICES % Hkv, i_choice // CHOICES // Hkv
    o = i_chunk * CHUNK + tl.arange(0, CHUNK)
    p_children = children + i_batch * h_b + i_kv * h_h
    # the last parent whose clusters begin at or before this one
    b_parent = tl.zeros([CHUNK], tl.int32)
    span = parents
    while span > 1:
        step = span // 2
        b_next = b_parent + step
        begin = tl.load(p_children + b_next, mask=b_next < parents, other=2147483647)
        b_parent = tl.where(begin <= o, b_next, b_parent)
        span -= step
    b_flag = tl.load(flags + i_choice * parents + b_parent)
    tl.store(alive + i_choice * K + o, b_flag, mask=o < K)


@triton.jit(do_not_specialize=["K", "Hkv", "capacity", "o_b", "o_h"])
def list_runs_kernel(
    flags, offsets, starts, sums, counts, tokens, K, Hkv, capacity, o_b, o_h,
    CHOICES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The kept clusters of one choice as runs of tokens; clusters that touch are one run."""
    i_choice = tl.program_id(0).to(tl.int64)
    i_kv, i_batch = i_choice // CHOICES % Hkv, i_choice // CHOICES // Hkv
    p_offsets = offsets + i_batch * o_b + i_kv * o_h
    p_flags = flags + i_choice * K
    p_starts, p_sums = starts + i_choice * capacity, sums + i_choice * capacity
    o_c = tl.arange(0, CHUNK)
    n_runs, n_tokens, last = 0, 0, -1
    for start in range(0, K, CHUNK):
        o = start + o_c
        m = o < K
        before = tl.load(p_offsets + o - 1, mask=m & (o > 0), other=0)
        begin = tl.load(p_offsets + o, mask=m, other=0)
        size = tl.load(p_offsets + o + 1, mask=m, other=0) - begin
        kept = (tl.load(p_flags + o, mask=m, other=0) > 0) & m & (size > 0)
        # the last cluster before this one that is not empty: twice its number, plus 1 if kept
        earlier = tl.load(p_flags + o - 1, mask=m & (o > 0), other=0).to(tl.int32)
        earlier = tl.where((begin > before) & m & (o > 0), 2 * (o - 1) + earlier, -1)
        earlier = tl.maximum(tl.associative_scan(earlier, 0, _max), last)
        last = tl.max(earlier)
        first = kept & ((earlier < 0) | (earlier % 2 == 0))
        b_sum = n_tokens + tl.cumsum(tl.where(kept, size, 0), 0) - tl.where(kept, size, 0)
        place = n_runs + tl.cumsum(first.to(tl.int32), 0) - 1
        tl.store(p_starts + place, begin, mask=first)
        tl.store(p_sums + place - 1, b_sum, mask=first & (place > 0))
        n_runs += tl.sum(first.to(tl.int32))
        n_tokens += tl.sum(tl.where(kept, size, 0))
    if n_runs > 0:
        tl.store(p_sums + n_runs - 1, n_tokens)
    tl.store(counts + i_choice, n_runs)
    tl.store(tokens + i_choice, n_tokens)
    for start in range(0, capacity, CHUNK):
        o = start + o_c
        m = (o >= n_runs) & (o < capacity)
        tl.store(p_starts + o, 0, mask=m)
        tl.store(p_sums + o, 0, mask=m)


def _of_batch(x: torch.Tensor) -> tuple[int, int]:
    """Strides of batch and heads of what all sequences may share."""
    return 0 if x.shape[0] == 1 else x.stride(0), x.stride(1)


def _kept(
    query: torch.Tensor,
    centroids: torch.Tensor,
    log_counts: torch.Tensor,
    threshold: torch.Tensor,
    alive: torch.Tensor | None,
    choices: int,
    scale: float,
) -> torch.Tensor:
    """Which clusters of one level each choice keeps: int8 [B * Hkv * choices, K]."""
    batch, heads, n_queries, head_dim = query.shape
    kv_heads, n_clusters = centroids.shape[1:3]
    centroids, log_counts = map(launch.last_dim_contiguous, (centroids, log_counts))
    sums = n_queries > configs.LOOKUP_ROWS  # or every score is kept
    tile = configs.lookup_tile(query.dtype, head_dim, heads // kv_heads, n_queries)
    query_tiles = triton.cdiv(n_queries, tile.options["QUERIES"])
    tiles = batch * kv_heads * query_tiles * tile.per_block
    most = min(MOST_SPLITS, triton.cdiv(n_clusters, tile.options["BLOCK_N"]))
    splits = max(1, min(triton.cdiv(2 * launch.processors(query), tiles), most))
    rows, per_choice = batch * heads * n_queries, heads // kv_heads // choices

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    top, total = new(rows, splits), new(rows, splits)
    scores = new(batch * heads * query_tiles if sums else rows, n_clusters)
    flags = new(batch * kv_heads * choices, n_clusters, dtype=torch.int8)
    takes_part = {"CHOICES": choices, "ALIVE": alive is not None}
    alive = flags if alive is None else alive
    for mode in (EXTENT, SUM) if sums else (KEEP,):
        launch.run(
            cluster_scores_kernel, tiles * splits,
            query, centroids, log_counts, alive, scores, top, total,
            n_queries, n_clusters, kv_heads, splits, query_tiles, scale * LOG2_E.value,
            *query.stride()[:3], *_of_batch(centroids), centroids.stride(2), *_of_batch(log_counts),
            MODE=mode.value, **takes_part, **tile.options,
        )  # fmt: skip
    chunk = _chunk(n_clusters)
    launch.run(
        test_clusters_kernel, len(flags) * triton.cdiv(n_clusters, chunk),
        scores, top, total, log_counts, alive, threshold, flags,
        n_clusters, kv_heads, splits, per_choice * n_queries, per_choice * query_tiles,
        *_of_batch(log_counts), SUMS=sums, CHUNK=chunk, SPLITS=MOST_SPLITS, **takes_part,
    )  # fmt: skip
    return flags


def _chunk(n_clusters: int) -> int:
    return 128 if n_clusters <= 128 else 1024


def squeezed_lookup(
    query: torch.Tensor,
    centroids: torch.Tensor,
    log_counts: torch.Tensor,
    offsets: torch.Tensor,
    threshold: torch.Tensor,
    coarse_centroids: torch.Tensor | None = None,
    coarse_log_counts: torch.Tensor | None = None,
    children: torch.Tensor | None = None,
    coarse_threshold: torch.Tensor | None = None,
    shared: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As sparse_attn/reference/squeezed_lookup.py."""
    query, offsets = map(launch.last_dim_contiguous, (query, offsets))
    batch, heads, _, head_dim = query.shape
    kv_heads, n_clusters = centroids.shape[1:3]
    choices = 1 if shared else heads // kv_heads  # per KV head
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    alive, chunk = None, _chunk(n_clusters)
    if coarse_centroids is not None:
        parents = _kept(
            query, coarse_centroids, coarse_log_counts, coarse_threshold, None, choices, scale
        )  # fmt: skip
        children = launch.last_dim_contiguous(children)
        alive = parents.new_empty(len(parents), n_clusters)
        launch.run(
            mark_children_kernel, len(parents) * triton.cdiv(n_clusters, chunk),
            parents, children, alive, n_clusters, parents.shape[1], kv_heads,
            *_of_batch(children), CHOICES=choices, CHUNK=chunk,
        )  # fmt: skip
    flags = _kept(query, centroids, log_counts, threshold, alive, choices, scale)
    shape, capacity = (batch, kv_heads * choices), (n_clusters + 1) // 2
    starts, sums = (flags.new_empty((*shape, capacity), dtype=torch.int32) for _ in range(2))
    counts, tokens = (flags.new_empty(shape, dtype=torch.int32) for _ in range(2))
    launch.run(
        list_runs_kernel, len(flags),
        flags, offsets, starts, sums, counts, tokens, n_clusters, kv_heads, capacity,
        *_of_batch(offsets), CHOICES=choices, CHUNK=chunk,
    )  # fmt: skip
    return starts, sums, counts, tokens

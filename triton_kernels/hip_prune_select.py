"""`hip_prune_select`: one launch runs all stages, a program per list; nothing read by the host.

Candidates come in batches, in ascending order, behind those kept so far; when a batch is scored the
best stay. So a stage needs room for a few times what it keeps, however many chunks there are.
"""

from __future__ import annotations

from collections.abc import Sequence

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

SCANNED = tl.constexpr(8)  # chunks of at most so many keys are scored by all of them
MOST_KEPT = 1024


@triton.constexpr_function
def _room(size):
    """The next power of two: of the keys of a chunk that is scored by all of them."""
    return 1 << (size - 1).bit_length()


@triton.jit
def _scan(
    b_first, b_limit, p_query, q_h, q_t, parts, heads, last, n_rows, limit, stride,
    p_key, p_table, k_page, k_t, page_bits, pages, start, end, valid, sign, ROOM: tl.constexpr,
    HOLD: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, PAGED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The scores of chunks [start, end) of at most ROOM keys by all of them: [C]."""
    o_s = tl.arange(0, ROOM)
    tokens = start[:, None] + o_s[None, :]
    m = valid[:, None] & (tokens < end[:, None])
    b_s = best_of_rows(
        b_first, b_limit, p_query, q_h, q_t, parts, heads, last, n_rows, limit, stride, p_key,
        p_table, k_page, k_t, page_bits, pages, tl.reshape(tokens, [start.shape[0] * ROOM]),
        tl.reshape(m, [start.shape[0] * ROOM]), sign, HOLD, D, CAUSAL, PAGED, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    return tl.max(tl.reshape(b_s, [start.shape[0], ROOM]), 1)


@triton.jit
def _descend(
    b_first, b_limit, p_query, q_h, q_t, parts, heads, last, n_rows, limit, stride,
    p_key, p_table, k_page, k_t, page_bits, pages, start, end, valid, sign, LEVELS: tl.constexpr,
    CENTRE: tl.constexpr, HOLD: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    PAGED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The scores of chunks [start, end) by binary descent: [C]."""
    best = tl.full([start.shape[0]], -float("inf"), tl.float32)
    for _ in range(LEVELS):
        middle = start + (end - start) // 2
        left, right = start, middle
        if CENTRE:
            left, right = start + (middle - start) // 2, middle + (end - middle) // 2
        tokens = tl.reshape(tl.join(left, right), [2 * start.shape[0]])
        m = tl.reshape(tl.join(valid, valid), [2 * start.shape[0]])
        b_s = best_of_rows(
            b_first, b_limit, p_query, q_h, q_t, parts, heads, last, n_rows, limit, stride, p_key,
            p_table, k_page, k_t, page_bits, pages, tokens, m, sign, HOLD, D, CAUSAL, PAGED,
            BLOCK_R, BLOCK_D,
        )  # fmt: skip
        of_left, of_right = tl.split(tl.reshape(b_s, [start.shape[0], 2]))
        best = tl.maximum(best, tl.maximum(of_left, of_right))
        long = end - start > 1
        go_right = of_right > of_left
        start = tl.where(long & go_right, middle, start)
        end = tl.where(long & (of_right <= of_left), middle, end)
    return best


@triton.jit
def _stage(
    query, key, p_table, i_list, batch, begin, stop, n_keys, b_parent, count, block, heads, group,
    Tq, q_block, window, page_bits, pages, sign, q_b, q_h, q_t, k_b, k_h, k_t, FIRST: tl.constexpr,
    SIZE: tl.constexpr, SPLIT: tl.constexpr, STRIDE: tl.constexpr, KEEP: tl.constexpr,
    LEVELS: tl.constexpr, ROOM: tl.constexpr, CENTRE: tl.constexpr, CAUSAL: tl.constexpr,
    PAGED: tl.constexpr, HOLD: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best KEEP of the chunks into which `count` parents split, [ROOM], and their number.

    The first stage splits all keys of [begin, stop).
    """
    SCAN: tl.constexpr = SIZE <= SCANNED
    BLOCK_C: tl.constexpr = BLOCK_N // (_room(SIZE) if SCAN else 2)
    o_i, o_t = tl.arange(0, ROOM), tl.arange(0, BLOCK_C)
    last, n_rows, limit = sampled_rows(block, q_block, STRIDE, Tq, n_keys, window, CAUSAL)
    # heads that share keys are rows of one tile where all look at the same keys
    together = tl.minimum(heads, group) if SCAN else 1
    parts = tl.cdiv(together * n_rows, BLOCK_R)
    first_chunk, last_chunk, total = begin // SIZE, (stop - 1) // SIZE, count * SPLIT
    if FIRST:
        total = tl.where(count > 0, last_chunk - first_chunk + 1, 0)
    b_chunk, b_score = b_parent, tl.full([ROOM], NONE, tl.int32)
    done, held = 0, 0
    while done < total:
        n = held + tl.minimum(ROOM - held, total - done)
        of_all = done + o_i - held
        if FIRST:
            b_new = first_chunk + of_all
        else:
            at = tl.minimum(tl.maximum(of_all // SPLIT, 0), ROOM - 1)
            b_new = tl.gather(b_parent, at, 0) * SPLIT + of_all % SPLIT
        b_chunk = tl.where((o_i >= held) & (o_i < n), b_new, b_chunk)
        is_new = (o_i >= held) & (o_i < n) & (b_chunk >= first_chunk) & (b_chunk <= last_chunk)
        b_score = tl.where(is_new, ordered(tl.full([ROOM], -float("inf"), tl.float32)), b_score)
        if total > KEEP:
            for i_head in range(0, heads, together):
                head = i_list * heads + i_head
                p_query = query + batch * q_b + head.to(tl.int64) * q_h
                p_key = key + (head // group).to(tl.int64) * k_h
                if not PAGED:
                    p_key += batch * k_b
                b_q, b_limit = query_rows(p_query, q_h, q_t, 0, together, last, n_rows, limit,
                                          STRIDE, D, CAUSAL, BLOCK_R, BLOCK_D)  # fmt: skip
                for i in range(held // BLOCK_C, tl.cdiv(n, BLOCK_C)):
                    b_c = tl.gather(tl.where(is_new, b_chunk, -1), i * BLOCK_C + o_t, 0)
                    valid = b_c >= 0
                    start = tl.where(valid, b_c * SIZE, 0)
                    end = start + tl.minimum(SIZE, stop - start)
                    start = tl.maximum(start, begin)
                    if SCAN:
                        b_s = _scan(
                            b_q, b_limit, p_query, q_h, q_t, parts, together, last, n_rows, limit,
                            STRIDE, p_key, p_table, k_b, k_t, page_bits, pages, start, end, valid,
                            sign, _room(SIZE), HOLD, D, CAUSAL, PAGED, BLOCK_R, BLOCK_D,
                        )  # fmt: skip
                    else:
                        b_s = _descend(
                            b_q, b_limit, p_query, q_h, q_t, parts, together, last, n_rows, limit,
                            STRIDE, p_key, p_table, k_b, k_t, page_bits, pages, start, end, valid,
                            sign, LEVELS, CENTRE, HOLD, D, CAUSAL, PAGED, BLOCK_R, BLOCK_D,
                        )  # fmt: skip
                    b_s = tl.gather(ordered(b_s), o_i % BLOCK_C, 0)
                    here = is_new & (o_i // BLOCK_C == i)
                    b_score = tl.where(here, tl.maximum(b_score, b_s), b_score)
        taken, kept = top(b_score, KEEP)
        at = places(taken, kept, ROOM)
        b_chunk = tl.gather(b_chunk, at, 0)
        b_score = tl.where(o_i < kept, tl.gather(b_score, at, 0), NONE)
        done += n - held
        held = kept
    return b_chunk, held


@triton.jit(do_not_specialize=SIZES)
def hip_prune_select_kernel(
    query, key, table, lengths, indices, counts, H, Hq, Hkv, Tq, Tk, Mq, K, q_block, sink, window,
    page_bits, pages, sign, q_b, q_h, q_t, k_b, k_h, k_t, t_b,
    CHUNKS: tl.constexpr, KEEPS: tl.constexpr, STRIDES: tl.constexpr, LEVELS: tl.constexpr,
    STAGES: tl.constexpr, ROOM: tl.constexpr, CENTRE: tl.constexpr, CAUSAL: tl.constexpr,
    PAGED: tl.constexpr, HAS_LENGTHS: tl.constexpr, ROWS: tl.constexpr, HOLD: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """LEVELS of the descents and ROWS of a tile of each stage; lists have ROOM for candidates."""
    # lists that share keys run side by side, for the sake of the second-level cache
    pid, side, group = tl.program_id(0), tl.maximum(H // Hkv, 1), Hq // Hkv
    block, rest, others = pid // side % Mq, pid // side // Mq, H // side
    batch, i_list = (rest // others).to(tl.int64), rest % others * side + pid % side
    n_keys = Tk
    if HAS_LENGTHS:
        n_keys = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), Tk)
    _, _, limit = sampled_rows(block, q_block, 1, Tq, n_keys, window, CAUSAL)
    begin, stop = sink // CHUNKS[STAGES - 1] * CHUNKS[STAGES - 1], limit + 1
    o_i = tl.arange(0, ROOM)
    b_chunk, count = tl.zeros([ROOM], tl.int32), (begin < stop).to(tl.int32)
    for stage in tl.static_range(STAGES):
        b_chunk, count = _stage(
            query, key, table + batch * t_b, i_list, batch, begin, stop, n_keys, b_chunk, count,
            block, Hq // H, group, Tq, q_block, window, page_bits, pages, sign, q_b, q_h, q_t, k_b,
            k_h, k_t, stage == 0, CHUNKS[stage], CHUNKS[stage - (stage > 0)] // CHUNKS[stage],
            STRIDES[stage], KEEPS[stage], LEVELS[stage], ROOM, CENTRE, CAUSAL, PAGED, HOLD, D,
            ROWS[stage], BLOCK_N, BLOCK_D,
        )  # fmt: skip
    o_out = (batch * H + i_list) * Mq + block
    for start in range(0, K, ROOM):
        o = start + o_i
        tl.store(indices + o_out * K + o, tl.where(o < count, b_chunk, 0), mask=o < K)
    tl.store(counts + o_out, count)


def hip_prune_select(
    query: torch.Tensor,
    key: torch.Tensor,
    chunks: Sequence[int],
    keeps: Sequence[int],
    q_strides: Sequence[int],
    q_block: int = 64,
    sink: int = 256,
    window: int = 1024,
    representative: str = "centre",
    merge_heads: str = "none",
    causal: bool = True,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As sparse_attn/reference/hip_prune_select.py."""
    query, key = prepared(query, key)
    tokens = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    lists = {"none": query.shape[1], "group": key.shape[1], "all": 1}[merge_heads]
    kept = [-(-n // c) for n, c in zip(keeps, chunks, strict=True)]
    together = 1 if merge_heads == "none" else query.shape[1] // key.shape[1]
    rows = [
        -(-min(q_block, query.shape[2]) // stride) * (together if chunk <= SCANNED.value else 1)
        for stride, chunk in zip(q_strides, chunks, strict=True)
    ]
    tile = options(query, max(rows), block_table, kv_lengths)
    most = tile.pop("BLOCK_R")
    results, args = arguments(
        query, key, lists, q_block, min(kept[-1], -(-tokens // chunks[-1])), (sink, window), scale,
        block_table, kv_lengths,
    )  # fmt: skip
    # more than MOST_KEPT are asked for only where all chunks are fewer
    kept = [min(n, MOST_KEPT) for n in kept]
    launch.run(
        hip_prune_select_kernel, results[1].numel(), *args, CHUNKS=tuple(chunks),
        KEEPS=tuple(kept), STRIDES=tuple(q_strides),
        LEVELS=tuple((c - 1).bit_length() for c in chunks), STAGES=len(chunks),
        ROOM=2 * configs.padded(max(kept), 64), CENTRE=representative == "centre", CAUSAL=causal,
        ROWS=tuple(min(most, configs.padded(n)) for n in rows), **tile,
    )  # fmt: skip
    return results

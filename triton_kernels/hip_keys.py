"""What the kernels of HiP's selections share: sampled queries, scores of gathered keys, top k.

Lists of nodes and candidates are tensors of one program; nothing but the result is written. The
best are found by radix select on histograms. Where a list is compacted, the place of each entry is
known by a sum over those before it; a histogram of the sums turns that round.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import configs, launch

NONE = tl.constexpr(-(2**31))  # the score of a place without a candidate
# lengths vary from call to call: only strides of query and key are worth compiling for
SIZES = [
    "H", "Hq", "Hkv", "Tq", "Tk", "Mq", "K", "q_block", "sink", "window", "page_bits",
    "pages", "t_b",
]  # fmt: skip


@triton.jit
def ordered(x):
    """Scores as integers of the same order; NaN is like -infinity, -0 like 0."""
    bits = (tl.where(x == x, x, -float("inf")) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _digit(b_x, low, above, keep, SHIFT: tl.constexpr):
    """Eight more bits of the smallest score to take, and how many are above those bits."""
    # from the largest digit to the smallest; the sign bit counts the other way round
    FLIP: tl.constexpr = 128 if SHIFT == 24 else 0
    alike = b_x != NONE
    if SHIFT < 24:
        alike = alike & ((b_x >> (SHIFT + 8)) == (low >> (SHIFT + 8)))
    b_count = tl.histogram(255 - (((b_x >> SHIFT) & 255) ^ FLIP), 256, mask=alike)
    digit = tl.sum((above + tl.cumsum(b_count, 0) < keep).to(tl.int32))
    above += tl.sum(tl.where(tl.arange(0, 256) < digit, b_count, 0))
    return low | (((255 - digit) ^ FLIP) << SHIFT), above


@triton.jit
def top(b_x, keep):
    """Which of [N] to take, the `keep` largest or all that there are; of equal ones the first.

    Returns how many too.
    """
    keep = tl.minimum(keep, tl.sum((b_x != NONE).to(tl.int32)))
    low, above = _digit(b_x, 0, 0, keep, 24)
    low, above = _digit(b_x, low, above, keep, 16)
    low, above = _digit(b_x, low, above, keep, 8)
    low, above = _digit(b_x, low, above, keep, 0)
    b_same = (b_x == low).to(tl.int32)
    place = tl.cumsum(b_same, 0) - b_same
    return (b_x > low) | ((b_same > 0) & (place < keep - above)), keep


@triton.jit
def places(taken, n, N: tl.constexpr):
    """The indices of the first n <= N of what is taken, ascending; of places beyond n, any."""
    b_sum = tl.cumsum(taken.to(tl.int32), 0)
    b_count = tl.histogram(tl.minimum(b_sum, N - 1), N, mask=b_sum < n)
    return tl.minimum(tl.cumsum(b_count, 0), taken.shape[0] - 1)


@triton.jit
def sampled_rows(block, q_block, stride, Tq, n_keys, window, CAUSAL: tl.constexpr):
    """Last query of a block, queries that a head samples, last key that the last may count."""
    first = block * q_block
    last = tl.minimum(first + q_block, Tq) - 1
    n = (last - first) // stride + 1
    if CAUSAL:
        limit = tl.maximum(tl.cast(n_keys, tl.int64) - Tq + last - window, -1).to(tl.int32)
    else:
        limit = n_keys - 1
    return last, n, limit


@triton.jit
def query_rows(
    p_query, q_h, q_t, part, heads, last, n, limit, stride,
    D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Part `part` of the sampled queries of `heads` heads, and the last key that each may count.

    Missing rows repeat the last one, which changes no maximum.
    """
    o_r, o_d = part * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    o_r = tl.minimum(o_r, heads * n - 1)
    back = stride * (n - 1 - o_r % n)
    p = p_query + (o_r // n).to(tl.int64)[:, None] * q_h
    p += (last - back).to(tl.int64)[:, None] * q_t + o_d[None, :]
    b_q = tl.load(p, mask=(o_d < D)[None, :] & (o_r >= 0)[:, None], other=0.0)
    return b_q, limit - back if CAUSAL else tl.full([BLOCK_R], 0, tl.int32) + limit


@triton.jit
def best_products(
    b_q, b_limit, p_key, p_table, k_page, k_t, page_bits, pages, tokens, valid, sign,
    D: tl.constexpr, PAGED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest product of each of the keys `tokens` with a row that may count it: [N].

    A wrong page is clamped: no table leads outside of the cache.
    """
    o_d = tl.arange(0, BLOCK_D)
    if PAGED:
        page = tl.load(p_table + (tokens >> page_bits), mask=valid, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
        offset = page * k_page + (tokens & ((1 << page_bits) - 1)).to(tl.int64) * k_t
    else:
        offset = tokens.to(tl.int64) * k_t
    p = p_key + offset[:, None] + o_d[None, :]
    b_k = tl.load(p, mask=valid[:, None] & (o_d < D)[None, :], other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * sign
    counts = valid[None, :] & (tokens[None, :] <= b_limit[:, None]) & (b_s == b_s)
    return tl.max(tl.where(counts, b_s, -float("inf")), 0)


@triton.jit
def best_of_rows(
    b_first, b_limit, p_query, q_h, q_t, parts, heads, last, n_rows, limit, stride,
    p_key, p_table, k_page, k_t, page_bits, pages, tokens, valid, sign, HOLD: tl.constexpr,
    D: tl.constexpr, CAUSAL: tl.constexpr, PAGED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The scores of the keys `tokens` by all parts of the queries: [N].

    With HOLD the first part is `b_first`, in registers; without, it is loaded again each time.
    """
    b_s = tl.full([tokens.shape[0]], -float("inf"), tl.float32)
    if HOLD:
        b_s = best_products(b_first, b_limit, p_key, p_table, k_page, k_t, page_bits, pages, tokens,
                            valid, sign, D, PAGED, BLOCK_D)  # fmt: skip
    for j in range(1 if HOLD else 0, parts):
        b_q, b_l = query_rows(p_query, q_h, q_t, j, heads, last, n_rows, limit, stride,
                              D, CAUSAL, BLOCK_R, BLOCK_D)  # fmt: skip
        b_s = tl.maximum(b_s, best_products(
            b_q, b_l, p_key, p_table, k_page, k_t, page_bits, pages, tokens, valid, sign, D, PAGED,
            BLOCK_D,
        ))  # fmt: skip
    return b_s


def arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    lists: int,
    q_block: int,
    places: int,
    edges: tuple[int, int],
    scale: float | None,
    block_table: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[Any, ...]]:
    """The results, and what a kernel's arguments begin with."""
    batch, heads, n_queries, _ = query.shape
    rows, tokens, page_bits = triton.cdiv(n_queries, q_block), key.shape[2], 0
    if block_table is not None:
        page_bits, tokens = key.shape[2].bit_length() - 1, tokens * block_table.shape[1]
    shape = (batch, lists, rows)
    indices = torch.empty((*shape, places), dtype=torch.int32, device=query.device)
    counts = torch.empty(shape, dtype=torch.int32, device=query.device)
    table = counts if block_table is None else block_table
    lengths = counts if kv_lengths is None else kv_lengths.contiguous()
    sign = 1.0 if scale is None or scale > 0 else -1.0 if scale < 0 else 0.0
    return (indices, counts), (
        query, key, table, lengths, indices, counts, lists, heads, key.shape[1], n_queries, tokens,
        rows, places, q_block, *edges, page_bits, key.shape[0], sign, *query.stride()[:3],
        *key.stride()[:3], table.stride(0),
    )  # fmt: skip


def prepared(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return launch.last_dim_contiguous(query), launch.last_dim_contiguous(key)


def options(query: torch.Tensor, rows: int, block_table: Any, kv_lengths: Any) -> dict[str, Any]:
    """Compile-time arguments; `rows` of queries make a tile, within bounds."""
    return {
        "PAGED": block_table is not None, "HAS_LENGTHS": kv_lengths is not None,
        **configs.hip_tile(query.dtype, query.shape[3], rows),
    }  # fmt: skip

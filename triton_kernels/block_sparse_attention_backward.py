"""`block_sparse_attention_backward`: a kernel per row, one for dQ, one for dK and dV.

P is computed again from lse. A program of the second kernel owns a tile of queries and reads their
list as the forward does; one of the third owns a tile of keys and reads the transposed index. Each
result is written by one program, from sums in a fixed order: the same bits each time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..block_index import BlockIndex
from . import configs, launch
from .block_sparse_attention import _listed_below, _load_rows, _tokens


# lengths vary from call to call, and the strides of lse and lists with them
@triton.jit(do_not_specialize=["H", "T", "rows", "l_b", "l_h", "l_t", "e_b", "e_h", "e_t"])
def attention_delta_kernel(
    out, grad_out, lse, grad_lse, reference, delta, H, T, rows,
    o_b, o_h, o_t, g_b, g_h, g_t, l_b, l_h, l_t, e_b, e_h, e_t,
    DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    i_b, i_h, i_t = o_r // T // H, o_r // T % H, o_r % T
    b_o = _load_rows(out, i_b * o_b + i_h * o_h + i_t * o_t, 1, m_r, True, DV, BLOCK_DV)
    b_g = _load_rows(grad_out, i_b * g_b + i_h * g_h + i_t * g_t, 1, m_r, True, DV, BLOCK_DV)
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        b_delta -= tl.load(grad_lse + i_b * e_b + i_h * e_h + i_t * e_t, mask=m_r, other=0.0)
    b_l = tl.load(lse + i_b * l_b + i_h * l_h + i_t * l_t, mask=m_r, other=0.0)
    # a row that saw no key: no score reaches +inf, so that its weights are 0
    empty = b_l == -float("inf")
    tl.store(reference + o_r, tl.where(empty, float("inf"), b_l), mask=m_r)
    tl.store(delta + o_r, tl.where(empty, 0.0, b_delta), mask=m_r)


@triton.jit
def _query_step(b_dq, b_q, b_do, b_ref, b_delta, key, value, o_n, m_n, mask, k_t, v_t, scale,
                MASKED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_DV: tl.constexpr):  # fmt: skip
    """Adds what one tile of keys gives to dQ, but for the scale."""
    b_k = _load_rows(key, o_n, k_t, m_n, MASKED, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_v = _load_rows(value, o_n, v_t, m_n, MASKED, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    if key.dtype.element_ty == tl.float32:
        # without matrix instructions a left operand that stays would stay in registers, all of it
        b_s = tl.trans(tl.dot(b_k, tl.trans(b_q), input_precision="ieee"))
        b_dp = tl.trans(tl.dot(b_v, tl.trans(b_do), input_precision="ieee"))
    else:
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BLOCK_M, BLOCK_N]
        b_dp = tl.dot(b_do, tl.trans(b_v))
    b_p = tl.exp(b_s * scale - b_ref[:, None])
    if MASKED:
        b_p = tl.where(mask, b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit(
    do_not_specialize=[
        "Tq", "Tk", "Hkv", "Mq", "n_blocks", "capacity", "sink", "window",
        "i_b", "i_h", "i_m", "c_b", "c_h", "c_m",
    ]
)  # fmt: skip
def query_gradient_kernel(
    query, key, value, grad_out, reference, delta, indices, counts, grad_query,
    Tq, Tk, Hkv, Mq, n_blocks, capacity, sink, window, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, i_b, i_h, i_m, c_b, c_h, c_m,
    G: tl.constexpr, LIST_HEADS: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, EDGES: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    # G query heads per KV head, LIST_HEADS per list; a tile is HEADS of them x QUERIES queries
    TILES: tl.constexpr = (Q_BLOCK + QUERIES - 1) // QUERIES  # of a query block
    HEAD_TILES: tl.constexpr = (G + HEADS - 1) // HEADS
    pid = tl.program_id(0)
    i_head = pid % HEAD_TILES * HEADS
    pid = pid // HEAD_TILES
    i_tile = Mq * TILES - 1 - pid % (Mq * TILES)  # the longest rows first
    pid = pid // (Mq * TILES)
    i_kv, i_batch = pid % Hkv, (pid // Hkv).to(tl.int64)
    i_row = i_tile // TILES
    first_query = i_row * Q_BLOCK + i_tile % TILES * QUERIES
    end_query = tl.minimum(tl.minimum(first_query + QUERIES, (i_row + 1) * Q_BLOCK), Tq)
    if first_query >= Tq:
        return

    o_m = tl.arange(0, BLOCK_M)
    o_query = first_query + o_m % QUERIES
    o_head = i_head + o_m // QUERIES
    m_m = (o_query < end_query) & (o_head < G) & (o_m < HEADS * QUERIES)
    o_head = (i_kv * G + o_head).to(tl.int64)
    o_position = Tk - Tq + o_query
    b_q = _load_rows(query + i_batch * q_b, o_head * q_h + o_query.to(tl.int64) * q_t, 1, m_m,
                     True, D, BLOCK_D)  # fmt: skip
    b_do = _load_rows(grad_out + i_batch * g_b, o_head * g_h + o_query.to(tl.int64) * g_t, 1, m_m,
                      True, DV, BLOCK_DV)  # fmt: skip
    o_row = (i_batch * Hkv * G + o_head) * Tq + o_query
    b_ref = tl.load(reference + o_row, mask=m_m, other=float("inf"))
    b_delta = tl.load(delta + o_row, mask=m_m, other=0.0)
    key += i_batch * k_b + i_kv.to(tl.int64) * k_h
    value += i_batch * v_b + i_kv.to(tl.int64) * v_h
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
    n_full = (tl.maximum(n_c, n_b) - n_b) * KV_BLOCK // BLOCK_N
    rest_list = n_b * KV_BLOCK + n_full * BLOCK_N
    # masked tiles up to the end of: list c to d, list a to b, the sink, the window
    e_list = tl.cdiv(n_d * KV_BLOCK - rest_list, BLOCK_N)
    n_masked = e_list
    if EDGES:
        end_sink = tl.minimum(sink, end)
        low = tl.maximum(tl.maximum(first_p - window + 1, sink), 0)
        high = tl.where(window > 0, last_p + 1, 0)
        e_a = e_list + tl.cdiv((n_b - n_a) * KV_BLOCK, BLOCK_N)
        e_sink = e_a + tl.cdiv(end_sink, BLOCK_N)
        n_masked = e_sink + tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(n_full):
        first = n_b * KV_BLOCK + i * BLOCK_N
        o_n = _tokens(p_list, first, first + BLOCK_N, True, n_blocks, KV_BLOCK, BLOCK_N, GATHER)
        o_n = tl.minimum(o_n, Tk - 1)  # only a list out of order needs it
        b_dq = _query_step(
            b_dq, b_q, b_do, b_ref, b_delta, key, value, o_n, None, None, k_t, v_t, scale,
            False, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for i in range(n_masked):
        first, stop = rest_list + i * BLOCK_N, n_d * KV_BLOCK
        is_list = True
        if EDGES:
            is_list, in_window = i < e_a, i >= e_sink
            partly = (i >= e_list) & is_list
            first = tl.where(partly, n_a * KV_BLOCK + (i - e_list) * BLOCK_N, first)
            stop = tl.where(partly, n_b * KV_BLOCK, stop)
            at = tl.where(in_window, low + (i - e_sink) * BLOCK_N, (i - e_a) * BLOCK_N)
            first = tl.where(is_list, first, at)
            stop = tl.where(is_list, stop, tl.where(in_window, high, end_sink))
        o_n = _tokens(p_list, first, stop, is_list, n_blocks, KV_BLOCK, BLOCK_N, GATHER)
        m_n = (first + tl.arange(0, BLOCK_N) < stop) & (o_n < Tk)
        mask = m_n[None, :]
        if CAUSAL:
            mask = mask & (o_n[None, :] <= o_position[:, None])
        if EDGES:
            near = o_n[None, :] > o_position[:, None] - window
            near = near & (o_n[None, :] <= o_position[:, None])
            in_sink = (i >= e_a) & (i < e_sink)
            mask = mask & (in_sink | ((o_n >= sink)[None, :] & (near == in_window)))
        b_dq = _query_step(
            b_dq, b_q, b_do, b_ref, b_delta, key, value, o_n, m_n, mask, k_t, v_t, scale,
            True, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    p_dq = grad_query + o_row[:, None] * D + o_d[None, :]
    m_dq = m_m[:, None] & (o_d < D)[None, :]
    tl.store(p_dq, (b_dq * scale).to(grad_query.dtype.element_ty), mask=m_dq)


@triton.jit(do_not_specialize=["Tq", "Tk", "Hkv", "n_blocks", "entries", "sink", "window"])
def key_gradient_kernel(
    query, key, value, grad_out, reference, delta, offsets, rows, grad_key, grad_value,
    Tq, Tk, Hkv, n_blocks, entries, sink, window, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    G: tl.constexpr, LIST_HEADS: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    KEY_TILES: tl.constexpr = (KV_BLOCK + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (Q_BLOCK + QUERIES - 1) // QUERIES
    SHARING: tl.constexpr = min(LIST_HEADS, G)  # heads of the group that share a list
    STEPS: tl.constexpr = (SHARING + HEADS - 1) // HEADS * TILES  # tiles of a query block
    LISTS: tl.constexpr = G // SHARING
    pid = tl.program_id(0)
    i_kv = pid % Hkv
    pid = pid // Hkv
    # the first keys are seen by most queries: first, so that the others fill the gaps at the end
    i_tile = pid % (n_blocks * KEY_TILES)
    i_batch = (pid // (n_blocks * KEY_TILES)).to(tl.int64)
    i_block = i_tile // KEY_TILES
    first_key = i_block * KV_BLOCK + i_tile % KEY_TILES * BLOCK_N
    end_key = tl.minimum(tl.minimum(first_key + BLOCK_N, (i_block + 1) * KV_BLOCK), Tk)
    if first_key >= Tk:
        return

    o_n = first_key + tl.arange(0, BLOCK_N)
    m_n = o_n < end_key
    b_k = _load_rows(key + i_batch * k_b + i_kv.to(tl.int64) * k_h, o_n, k_t, m_n, True, D, BLOCK_D)
    b_v = _load_rows(value + i_batch * v_b + i_kv.to(tl.int64) * v_h, o_n, v_t, m_n, True, DV,
                     BLOCK_DV)  # fmt: skip
    query += i_batch * q_b
    grad_out += i_batch * g_b
    # queries from `at_key` on stand at the first key or behind it
    at_key = tl.maximum(first_key - (Tk - Tq), 0)
    low, n_near = 0, 0
    if EDGES:  # query blocks from `low` on that see a key through sink or window
        high = tl.where(window > 0, tl.minimum(end_key - 1 + window - (Tk - Tq), Tq), 0)
        low = at_key
        if not CAUSAL:
            low = tl.where(first_key < sink, 0, at_key)
        high = tl.where(first_key < sink, Tq, high)
        low = low // Q_BLOCK
        n_near = tl.maximum(tl.cdiv(tl.maximum(high, 0), Q_BLOCK) - low, 0)

    o_m = tl.arange(0, BLOCK_M)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i_share in range(LISTS):
        i_list = i_batch * (Hkv * G // LIST_HEADS) + (i_kv * G + i_share * SHARING) // LIST_HEADS
        p_list = rows + i_list * entries
        start = tl.load(offsets + i_list * (n_blocks + 1) + i_block)
        stop = tl.load(offsets + i_list * (n_blocks + 1) + i_block + 1)
        if CAUSAL:  # leaves out query blocks before the first key
            n_before, _, _, _ = _listed_below(
                p_list + start, stop - start, at_key // Q_BLOCK, 0, 0, 0
            )
            start += n_before
        for i in range((n_near + stop - start) * STEPS):
            i_entry = i // STEPS
            is_near = i_entry < n_near
            i_row = tl.load(p_list + start + i_entry - n_near, mask=i_entry >= n_near, other=0)
            i_row = tl.where(is_near, low + i_entry, i_row)
            first_query = i_row * Q_BLOCK + i % TILES * QUERIES
            end_query = tl.minimum(tl.minimum(first_query + QUERIES, (i_row + 1) * Q_BLOCK), Tq)
            o_query = first_query + o_m % QUERIES
            o_head = i % STEPS // TILES * HEADS + o_m // QUERIES
            m_m = (o_query < end_query) & (o_head < SHARING) & (o_m < HEADS * QUERIES)
            o_head = (i_kv * G + i_share * SHARING + o_head).to(tl.int64)
            b_q = _load_rows(query, o_head * q_h + o_query.to(tl.int64) * q_t, 1, m_m, True, D,
                             BLOCK_D)  # fmt: skip
            b_do = _load_rows(grad_out, o_head * g_h + o_query.to(tl.int64) * g_t, 1, m_m, True,
                              DV, BLOCK_DV)  # fmt: skip
            o_row = (i_batch * Hkv * G + o_head) * Tq + o_query
            b_ref = tl.load(reference + o_row, mask=m_m, other=float("inf"))
            b_delta = tl.load(delta + o_row, mask=m_m, other=0.0)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            b_p = tl.exp(b_s * scale - b_ref[None, :])
            o_position = Tk - Tq + o_query
            if EDGES:
                near = o_n[:, None] > o_position[None, :] - window
                near = near & (o_n[:, None] <= o_position[None, :])
                near = near | (o_n < sink)[:, None]
                b_p = tl.where(near == is_near, b_p, 0.0)
            if CAUSAL:
                b_p = tl.where(o_n[:, None] <= o_position[None, :], b_p, 0.0)
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    o_out = (i_batch * Hkv + i_kv) * Tk + o_n
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    tl.store(grad_key + o_out[:, None] * D + o_d[None, :],
             (b_dk * scale).to(grad_key.dtype.element_ty),
             mask=m_n[:, None] & (o_d < D)[None, :])  # fmt: skip
    tl.store(grad_value + o_out[:, None] * DV + o_dv[None, :],
             b_dv.to(grad_value.dtype.element_ty),
             mask=m_n[:, None] & (o_dv < DV)[None, :])  # fmt: skip


def _prepare(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row lse, +inf where no key was seen, and rowsum(grad_out * out) - grad_lse."""
    _, heads, n_queries, value_dim = out.shape
    reference, delta = (
        torch.empty(lse.shape, dtype=torch.float32, device=lse.device) for _ in range(2)
    )
    block_dv = triton.next_power_of_2(value_dim)
    block_r = max(1, 2048 // block_dv)
    given = lse if grad_lse is None else grad_lse
    launch.run(
        attention_delta_kernel, triton.cdiv(lse.numel(), block_r),
        out, grad_out, lse, given, reference, delta, heads, n_queries, lse.numel(),
        *out.stride()[:3], *grad_out.stride()[:3], *lse.stride(), *given.stride(),
        DV=value_dim, BLOCK_R=block_r, BLOCK_DV=block_dv, HAS_GRAD_LSE=grad_lse is not None,
    )  # fmt: skip
    return reference, delta


def block_sparse_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    q_block: int,
    kv_block: int,
    causal: bool = True,
    sink: int = 0,
    window: int = 0,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference; the lists' contents are not checked."""
    grad_out, query, key, value, out, indices = map(
        launch.last_dim_contiguous, (grad_out, query, key, value, out, indices)
    )
    batch, heads, n_queries, head_dim = query.shape
    key_heads, n_keys = key.shape[1:3]
    n_blocks = triton.cdiv(n_keys, kv_block)
    sink, window = min(sink, n_keys), min(window, n_keys)
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    of_queries, of_keys = configs.backward_tiles(
        launch.arch_of(query), query.dtype, head_dim, value.shape[3], heads // key_heads,
        heads // indices.shape[1], configs.query_rows(n_queries, q_block), kv_block,
    )  # fmt: skip
    reference, delta = _prepare(grad_out, grad_lse, out, lse)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    edges = sink > 0 or window > 0
    strides = [s for x in (query, key, value, grad_out) for s in x.stride()[:3]]
    launch.run(
        query_gradient_kernel, batch * key_heads * indices.shape[2] * of_queries.per_block,
        query, key, value, grad_out, reference, delta, indices, counts, grads[0],
        n_queries, n_keys, key_heads, indices.shape[2], n_blocks, indices.shape[3], sink, window,
        scale, *strides, *indices.stride()[:3], *counts.stride(), CAUSAL=causal, EDGES=edges,
        **of_queries.options,
    )  # fmt: skip
    offsets, rows = BlockIndex(indices, counts, q_block, kv_block).transpose(n_keys)
    launch.run(
        key_gradient_kernel, batch * key_heads * n_blocks * of_keys.per_block,
        query, key, value, grad_out, reference, delta, offsets, rows, grads[1], grads[2],
        n_queries, n_keys, key_heads, n_blocks, rows.shape[2], sink, window, scale, *strides,
        CAUSAL=causal, EDGES=edges, **of_keys.options,
    )  # fmt: skip
    return tuple(grads)

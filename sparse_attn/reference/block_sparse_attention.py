"""Reference of `block_sparse_attention`: dense attention under a token mask."""

from __future__ import annotations

import math

import torch


def block_mask(indices: torch.Tensor, counts: torch.Tensor, n_blocks: int) -> torch.Tensor:
    """Listed blocks as a mask: [B, Hi, Mq, K] int32 -> bool [B, Hi, Mq, n_blocks]."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    mask = torch.zeros((*counts.shape, n_blocks + 1), dtype=torch.bool, device=indices.device)
    mask.scatter_(-1, torch.where(listed, indices, n_blocks).long(), True)
    return mask[..., :n_blocks]


def token_mask(
    indices: torch.Tensor,
    counts: torch.Tensor,
    queries: slice,
    shape: tuple[int, int, int, int],
    q_block: int,
    kv_block: int,
    causal: bool,
    sink: int,
    window: int,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which keys each of `queries` attends to: bool [B, Hq, queries, Tk].

    `shape` is (Hq, Hkv, Tq, Tk); `lengths` [B] how many of the Tk keys each sequence has.
    """
    n_query_heads, _, n_queries, n_keys = shape
    device = indices.device
    query = torch.arange(queries.start, queries.stop, device=device)
    blocks = block_mask(indices, counts, -(-n_keys // kv_block))
    blocks = blocks.repeat_interleave(n_query_heads // blocks.shape[1], dim=1)
    key = torch.arange(n_keys, device=device)
    mask = blocks[:, :, query // q_block][..., key // kv_block]
    end = n_keys if lengths is None else lengths[:, None, None, None]
    position = end - n_queries + query[:, None]
    mask = mask | (key < sink) | ((key > position - window) & (key <= position))
    mask = mask & (key < end)
    return mask & (key <= position) if causal else mask


def in_one_piece(pages: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """Pages [pages, Hkv, page_size, D] as [B, Hkv, capacity, D]; a wrong page as some other."""
    table = block_table.long().clamp(0, pages.shape[0] - 1)
    return pages[table].transpose(1, 2).flatten(2, 3)


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
    """Attention over listed blocks, sink and window; float64 inputs are computed in float64."""
    check_cache(key, block_table, kv_lengths)
    if block_table is not None:
        key, value = (in_one_piece(x, block_table) for x in (key, value))
    if kv_lengths is not None:  # what lies beyond may be NaN
        beyond = torch.arange(key.shape[2], device=key.device) >= kv_lengths[:, None]
        key, value = (x.masked_fill(beyond[:, None, :, None], 0) for x in (key, value))
    check_index(indices, counts, -(-key.shape[2] // kv_block))
    batch, n_query_heads, n_queries, head_dim = query.shape
    n_key_heads, n_keys = key.shape[1:3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((batch, n_query_heads, n_queries, value.shape[3]))
    lse = query.new_empty((batch, n_query_heads, n_queries), dtype=dtype)
    groups = n_query_heads // n_key_heads
    keys = key.to(dtype).repeat_interleave(groups, dim=1)
    values = value.to(dtype).repeat_interleave(groups, dim=1)
    rows = max(1, 2**24 // (batch * n_query_heads * n_keys))  # bounds the scores held at once
    for start in range(0, n_queries, rows):
        part = slice(start, min(start + rows, n_queries))
        mask = token_mask(
            indices, counts, part, (n_query_heads, n_key_heads, n_queries, n_keys),
            q_block, kv_block, causal, sink, window, kv_lengths,
        )  # fmt: skip
        scores = (query[:, :, part].to(dtype) @ keys.mT) * scale
        scores = scores.masked_fill(~mask, -torch.inf)
        total = torch.logsumexp(scores, dim=-1)
        empty = ~mask.any(-1)
        weights = torch.exp(scores - total.masked_fill(empty, 0)[..., None])
        out[:, :, part] = (weights @ values).to(out.dtype)
        lse[:, :, part] = total
    return out, lse


def check_index(indices: torch.Tensor, counts: torch.Tensor, n_blocks: int) -> None:
    """Raises unless every row lists ascending, unique block ids in range."""
    capacity = indices.shape[-1]
    if (counts < 0).any() or (counts > capacity).any():
        raise RuntimeError(
            f"counts: a value is negative or larger than the capacity of indices, {capacity}"
        )
    if capacity == 0:
        return
    listed = torch.arange(capacity, device=indices.device) < counts[..., None]
    previous = torch.cat([torch.full_like(indices[..., :1], -1), indices[..., :-1]], dim=-1)
    if (listed & ((indices <= previous) | (indices >= n_blocks))).any():
        raise RuntimeError(f"indices: rows must be ascending, unique block ids in [0, {n_blocks})")


def check_cache(
    key: torch.Tensor, block_table: torch.Tensor | None, kv_lengths: torch.Tensor | None
) -> None:
    """Raises unless lengths fit the cache and the pages in use exist."""
    capacity = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    if kv_lengths is not None and ((kv_lengths < 0) | (kv_lengths > capacity)).any():
        raise RuntimeError(f"kv_lengths: a value is not in [0, {capacity}], the capacity")
    if block_table is None:
        return
    wrong = (block_table < 0) | (block_table >= key.shape[0])
    if kv_lengths is not None:
        first = torch.arange(block_table.shape[1], device=key.device) * key.shape[2]
        wrong = wrong & (first < kv_lengths[:, None])
    if wrong.any():
        raise RuntimeError(f"block_table: a page in use is not in [0, {key.shape[0]})")

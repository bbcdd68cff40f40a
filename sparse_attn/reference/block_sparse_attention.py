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
) -> torch.Tensor:
    """Which keys each of `queries` attends to: bool [B, Hq, queries, Tk].

    `shape` is (Hq, Hkv, Tq, Tk).
    """
    n_query_heads, _, n_queries, n_keys = shape
    device = indices.device
    query = torch.arange(queries.start, queries.stop, device=device)
    blocks = block_mask(indices, counts, -(-n_keys // kv_block))
    blocks = blocks.repeat_interleave(n_query_heads // blocks.shape[1], dim=1)
    key = torch.arange(n_keys, device=device)
    mask = blocks[:, :, query // q_block][..., key // kv_block]
    position = (n_keys - n_queries + query)[:, None]
    mask = mask | (key < sink) | ((key > position - window) & (key <= position))
    return mask & (key <= position) if causal else mask


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over listed blocks, sink and window; float64 inputs are computed in float64."""
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
            q_block, kv_block, causal, sink, window,
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

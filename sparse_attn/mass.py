"""The true attention mass, and how much of it a selection keeps: for measuring, not for speed."""

from __future__ import annotations

import torch

from .block_index import BlockIndex

ROWS = 256  # queries looked at, evenly spaced
SCORES = 1 << 26  # at a time


def allowed(
    index: BlockIndex, rows: torch.Tensor, n_queries: int, n_keys: int, causal: bool = True
) -> torch.Tensor:
    """Which keys the queries `rows` (int64 [R]) attend to, bool [B, H', R, Tk]."""
    keys = torch.arange(n_keys, device=rows.device)
    at = rows // index.q_block  # the lists of these queries alone: a whole mask can be large
    indices, counts = index.indices[:, :, at], index.counts[:, :, at]
    listed = BlockIndex(indices, counts, index.q_block, index.kv_block).to_mask(n_keys)
    mask = listed[..., keys // index.kv_block]
    behind = n_keys - n_queries + rows[:, None] - keys
    mask = mask | (keys < index.sink) | ((behind >= 0) & (behind < index.window))
    return mask & (behind >= 0) if causal else mask


def shares(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """The softmax weights of the queries `rows` in causal attention, float32 [B, Hq, R, Tk]."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    asked = query[:, :, rows].float().unflatten(1, (key.shape[1], -1))
    scores = (asked @ key.float().mT[:, :, None]).flatten(1, 2).mul_(scale)
    later = torch.arange(n_keys, device=rows.device) > n_keys - n_queries + rows[:, None]
    return scores.masked_fill_(later, -torch.inf).softmax(-1)


def kept(
    query: torch.Tensor, key: torch.Tensor, index: BlockIndex, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(share of the attention mass kept, share of the pairs computed), float32 [Hq] each.

    Means over `ROWS` evenly spaced queries and the batch; causal.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    rows = torch.linspace(0, n_queries - 1, min(ROWS, n_queries), device=query.device).long()
    mass, pairs = query.new_zeros((2, query.shape[1]), dtype=torch.float32)
    at_once = max(1, SCORES // (query.shape[0] * query.shape[1] * n_keys))
    for piece in rows.split(at_once):
        mask = allowed(index, piece, n_queries, n_keys)
        mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], 1)
        mass += shares(query, key, piece, scale).masked_fill_(~mask, 0).sum((0, 2, 3))
        pairs += mask.sum((0, 2, 3))
    batch = query.shape[0]
    seen = batch * (n_keys - n_queries + rows + 1).sum()
    return mass / (batch * len(rows)), pairs / seen


def cells(
    query: torch.Tensor,
    key: torch.Tensor,
    index: BlockIndex,
    scale: float | None = None,
    size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of the first sequence on a grid of at most size x size cells.

    Returns (mass, kept), float32 [Hq, n, m]: the share of a query's attention that lies in a
    cell, mean over up to 8 queries of each row of cells, and the part of it on chosen keys.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    n, m = min(size, n_queries), min(size, n_keys)
    column = torch.arange(n_keys, device=query.device) * m // n_keys
    found = []
    for i in range(n):
        begin, end = -(-i * n_queries // n), -(-(i + 1) * n_queries // n)
        rows = torch.linspace(begin, end - 1, min(8, end - begin), device=query.device).long()
        mask = allowed(index, rows, n_queries, n_keys)[0]
        mask = mask.repeat_interleave(query.shape[1] // mask.shape[0], 0)
        mass = shares(query[:1], key[:1], rows, scale)[0]
        both = torch.stack((mass.mean(1), mass.masked_fill_(~mask, 0).mean(1)))
        found.append(both.new_zeros((*both.shape[:2], m)).index_add_(2, column, both))
    whole, part = torch.stack(found, 2)
    return whole, part

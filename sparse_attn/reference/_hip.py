"""What the references of HiP's selections share: geometry, pages, scores, ranking."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .block_sparse_attention import check_cache, in_one_piece


class Rows(NamedTuple):
    """The sampled queries of one query block, and how far each of them may look.

    Attributes:
        query: int64 [R], ascending: every `stride`-th query counted back from the block's last.
        limit: int64 [R], the last key that each may vote for: the one before its own window, the
            last of all without causality. Negative where there is none.
        end: keys the last query searches, limit[-1] + 1, at least 0.
    """

    query: torch.Tensor
    limit: torch.Tensor
    end: int


def rows_of(
    block: int, q_block: int, stride: int, n_queries: int, n_keys: int, window: int, causal: bool,
    device: torch.device,
) -> Rows:  # fmt: skip
    """The sampled queries of query block `block`; the last one of a ragged block is its last."""
    first, last = block * q_block, min((block + 1) * q_block, n_queries) - 1
    query = torch.arange(last, first - 1, -stride, device=device).flip(0)
    limit = n_keys - n_queries + query - window if causal else torch.full_like(query, n_keys - 1)
    return Rows(query, limit, max(0, int(limit[-1]) + 1))


def sequences(
    key: torch.Tensor, batch: int, block_table: torch.Tensor | None, kv_lengths: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """The keys [Hkv, Tk_b, D] of each sequence, gathered from its pages where there are any."""
    check_cache(key, block_table, kv_lengths)
    if block_table is not None:
        key = in_one_piece(key, block_table)
    for b in range(batch):
        yield key[b] if kv_lengths is None else key[b, :, : int(kv_lengths[b])]


def scores(
    query: torch.Tensor, key: torch.Tensor, limit: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The best score of each candidate for each head: [H, N].

    query [H, R, D], key [H, Tk, D], limit [R], tokens int64 [N, S] or, per head, [H, N, S]: the
    sampled keys of each candidate. A pair counts if the key exists and does not lie beyond the
    query's limit; a NaN does not count; nothing that counts gives -inf.
    """
    n_keys = key.shape[1]
    tokens = tokens.expand(key.shape[0], *tokens.shape[-2:])
    head = torch.arange(key.shape[0], device=key.device)[:, None, None]
    gathered = key[head, tokens.clamp(max=n_keys - 1)]  # [H, N, S, D]
    dots = torch.einsum("hrd,hnsd->hrns", query, gathered)
    counts = (tokens[:, None] < n_keys) & (tokens[:, None] <= limit[:, None, None])
    return dots.masked_fill(~counts | dots.isnan(), -torch.inf).amax((1, 3))


def best(values: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` largest, ascending; ties go to the lower index."""
    return values.sort(descending=True, stable=True).indices[:keep].sort().values


def sign_of(scale: float | None) -> float:
    """A scale shifts no rank, only its sign does; 0 makes all scores equal."""
    return 1.0 if scale is None or scale > 0 else -1.0 if scale < 0 else 0.0


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

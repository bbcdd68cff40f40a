"""Reference of `squeezed_attend`: dense attention under a mask of tokens."""

from __future__ import annotations

import math

import torch


def token_mask(
    starts: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor, n_tokens: int
) -> torch.Tensor:
    """Runs as a mask of the tokens of the sorted context: bool [B, H', n_tokens]."""
    listed = torch.arange(starts.shape[-1], device=starts.device) < counts[..., None]
    before = torch.nn.functional.pad(sums, (1, 0))[..., :-1]
    length = torch.where(listed, sums - before, 0)
    begin = torch.where(listed, starts, n_tokens).long()
    change = torch.zeros((*starts.shape[:2], n_tokens + 1), dtype=torch.int32, device=starts.device)
    change.scatter_add_(-1, begin, listed.int())
    change.scatter_add_(-1, torch.where(listed, begin + length, n_tokens), -listed.int())
    return change.cumsum(-1)[..., :n_tokens] > 0


def check_runs(
    starts: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor, n_tokens: int
) -> None:
    """Raises unless the runs are ascending, disjoint, not empty and within the context."""
    capacity = starts.shape[-1]
    if (counts < 0).any() or (counts > capacity).any():
        raise RuntimeError(
            f"counts: a value is negative or larger than the capacity of starts, {capacity}"
        )
    listed = torch.arange(capacity, device=starts.device) < counts[..., None]
    length = sums - torch.nn.functional.pad(sums, (1, 0))[..., :-1]
    end = starts.long() + length
    previous = torch.nn.functional.pad(end, (1, 0))[..., :-1]
    wrong = (starts < previous) | (length < 1) | (end > n_tokens)
    if (listed & wrong).any():
        raise RuntimeError(
            "starts, sums: runs must be ascending, disjoint, not empty and within the "
            f"{n_tokens} tokens of key"
        )


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
    """One softmax over the kept runs of the context and the tail up to each query.

    Args:
        query: [B, Hq, Tq, D].
        key, value: [C, Hkv, Sc, D], [C, Hkv, Sc, Dv], the context sorted by cluster; C is B, or 1
            for a context that all share. Every query may see all of it: no order, no causality.
        tail_key, tail_value: [B, Hkv, N, D], [B, Hkv, N, Dv]: the observation window, the input
            and what was generated, in order, the queries' own tokens last. N may be 0.
        starts, sums, counts: what `squeezed_lookup` returns; H' is Hkv or Hq.
        tail_lengths: int32 [B], how many tokens of the tail are there, 0 to N; None: all N. The
            rest is never read. Query i of sequence b stands at position tail_lengths[b] - Tq + i
            of the tail and sees the tail up to itself.
        scale: multiplies query @ key; None for 1 / sqrt(D).

    Returns:
        out [B, Hq, Tq, Dv] in query's dtype, lse [B, Hq, Tq] float32, natural log (float64 for
        float64). A query that sees nothing has out = 0, lse = -inf.
    """
    check_runs(starts, sums, counts, key.shape[2])
    batch, n_heads, n_queries, dim = query.shape
    kv_heads, n_tail = tail_key.shape[1:3]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    place = torch.arange(n_tail, device=query.device)
    lengths = query.new_full((batch,), n_tail, dtype=torch.int32)
    lengths = lengths if tail_lengths is None else tail_lengths
    position = lengths[:, None] - n_queries + torch.arange(n_queries, device=query.device)
    near = (place <= position[..., None])[:, None, None]  # [B, 1, 1, Tq, N]
    far = token_mask(starts, sums, counts, key.shape[2]).unflatten(1, (kv_heads, -1))
    far = far[..., None, :]  # [B, Hkv, G or 1, 1, Sc]
    rows = query.to(dtype).unflatten(1, (kv_heads, -1)) * scale
    # tail that no query sees may hold anything
    real = (place < lengths[:, None])[:, None, :, None]
    tail_key, tail_value = (x.masked_fill(~real, 0) for x in (tail_key, tail_value))
    keys = torch.cat([key.expand(batch, -1, -1, -1), tail_key], 2).to(dtype)[:, :, None]
    values = torch.cat([value.expand(batch, -1, -1, -1), tail_value], 2).to(dtype)[:, :, None]
    seen = torch.cat([far.expand(*rows.shape[:4], -1), near.expand(*rows.shape[:4], -1)], -1)
    scores = (rows @ keys.mT).masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    empty = ~seen.any(-1)
    weights = torch.exp(scores - lse.masked_fill(empty, 0)[..., None])
    out = (weights @ values).flatten(1, 2).to(query.dtype)
    return out.contiguous(), lse.flatten(1, 2).contiguous()

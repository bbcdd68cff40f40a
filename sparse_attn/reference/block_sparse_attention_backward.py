"""Reference of `block_sparse_attention_backward`: the formulas, dense under a token mask."""

from __future__ import annotations

import math

import torch

from .block_sparse_attention import check_index, token_mask


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
    """With P = exp(scale QK' - lse) and dS = P (dO V' - delta): dQ, dK and dV.

    delta = rowsum(dO O) - grad_lse: what every score of a row loses for the row's normalisation.
    """
    check_index(indices, counts, -(-key.shape[2] // kv_block))
    batch, n_query_heads, n_queries, head_dim = query.shape
    n_key_heads, n_keys = key.shape[1:3]
    groups = n_query_heads // n_key_heads
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    dtype = lse.dtype
    keys, values = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))
    empty = lse == -torch.inf
    known = lse.masked_fill(empty, 0)
    delta = delta_of(grad_out, grad_lse, out, lse)
    grad_query = query.new_empty(query.shape)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    rows = max(1, 2**24 // (batch * n_query_heads * n_keys))  # bounds the scores held at once
    for start in range(0, n_queries, rows):
        part = slice(start, min(start + rows, n_queries))
        mask = token_mask(
            indices, counts, part, (n_query_heads, n_key_heads, n_queries, n_keys),
            q_block, kv_block, causal, sink, window,
        )  # fmt: skip
        mask = mask & ~empty[:, :, part, None]
        queries, grads = query[:, :, part].to(dtype), grad_out[:, :, part].to(dtype)
        scores = (queries @ keys.mT * scale).masked_fill(~mask, -torch.inf)
        weights = torch.exp(scores - known[:, :, part, None])
        grad_scores = weights * (grads @ values.mT - delta[:, :, part, None])
        grad_query[:, :, part] = (grad_scores @ keys * scale).to(query.dtype)
        grad_keys += grad_scores.mT @ queries * scale
        grad_values += weights.mT @ grads
    grad_key, grad_value = (
        x.unflatten(1, (n_key_heads, groups)).sum(2).to(key.dtype) for x in (grad_keys, grad_values)
    )
    return grad_query, grad_key, grad_value


def delta_of(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """rowsum(grad_out * out) - grad_lse [B, Hq, Tq]; 0 for rows that saw no key."""
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    return delta.masked_fill(lse == -torch.inf, 0)

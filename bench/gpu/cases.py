"""Inputs of the GPU check, and what their results must be."""

from __future__ import annotations

import torch

from sparse_attn import BlockIndex

from .context import Context

BLOCK = 128


def tensors(
    context: Context, n_queries: int, n_keys: int, heads: int, key_heads: int, batch: int = 1
) -> tuple[torch.Tensor, ...]:
    """Random query, key, value [B, H, T, D], head dimension 128."""
    dim = context.size(128, 32)
    shapes = ((heads, n_queries), (key_heads, n_keys), (key_heads, n_keys))
    return tuple(
        torch.randn(batch, h, n, dim, device=context.device, dtype=context.dtype) for h, n in shapes
    )


def random_index(
    n: int, heads: int, density: float, device: str, block: int = BLOCK
) -> tuple[BlockIndex, float]:
    """Blocks at random, the diagonal always; and the share of the causal blocks that it is."""
    rows = -(-n // block)
    mask = torch.rand(1, heads, rows, rows, device=device) < density
    mask |= torch.eye(rows, dtype=torch.bool, device=device)
    mask &= torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    share = mask.sum().item() / (heads * rows * (rows + 1) / 2)
    return BlockIndex.from_mask(mask, block, block), share


def causal_flops(n: int, heads: int, dim: int) -> float:
    """Of dense causal attention: two matrix products over half of the square."""
    return 2 * 2 * heads * dim * n * (n + 1) / 2


def rows_error(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    index: BlockIndex | None = None,
    sink: int = 0,
    window: int = 0,
    samples: int = 48,
) -> float:
    """Relative error of sampled rows of three heads against float64; NaN counts as infinite."""
    heads, n_queries, n_keys = query.shape[1], query.shape[2], key.shape[2]
    group = heads // key.shape[1]
    rows = torch.linspace(0, n_queries - 1, samples, device=query.device).long().unique()
    top = bottom = 0.0
    for h in {0, heads // 2, heads - 1}:
        keys, values = (x[0, h // group].double() for x in (key, value))
        scores = query[0, h, rows].double() @ keys.T / query.shape[3] ** 0.5
        position = torch.arange(n_keys, device=query.device)
        own = (rows + n_keys - n_queries)[:, None]
        seen = position <= own
        if index is not None:
            lists = index.to_mask(n_keys)[0, h * index.indices.shape[1] // heads]
            listed = lists[rows // index.q_block][:, position // index.kv_block]
            seen &= listed | (position < sink) | (position > own - window)
        want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        top += (out[0, h, rows].double() - want).square().sum().item()
        bottom += want.square().sum().item()
    error = (top / bottom) ** 0.5
    return error if error == error else float("inf")

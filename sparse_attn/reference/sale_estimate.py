"""Reference of `sale_estimate`: SALE's selection pass (arXiv 2505.24179, integer form).

All of it is exact in integers or one rounded float32 operation at a time, none fused into another:
every backend returns the same lists.
"""

from __future__ import annotations

import torch

from ..ops._sale import grid, group_of, list_blocks
from .sale_quantize import unpack

LIMIT = 2.0**30  # of what is added to an integer product
TINY = 2.0**-126  # theta below it in size counts as 0, since GPUs flush such numbers


def sale_estimate(
    query_packed: torch.Tensor,
    query_step: torch.Tensor,
    key_packed: torch.Tensor,
    key_step: torch.Tensor,
    key_bias: torch.Tensor,
    theta: torch.Tensor,
    q_block: int = 64,
    kv_block: int = 32,
    local: int = 128,
    sink: int = 32,
    per_token: bool = False,
    official: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks in which a pair's estimated score exceeds its row's theta, and the reference.

    Query block m chooses, among the middle blocks of `grid`, each that holds a kept pair:

        a = sum over channels of code(i) * code(j)         int32, exact
        r(s) = 1 / s, or 0 where s == 0                    float32, correctly rounded
        t = (key_bias[j] * r(key_step)) * r(query_step)    two products, from left to right
        t = t if t < LIMIT else LIMIT                      (so NaN becomes LIMIT)
        t = t if t > -LIMIT else -LIMIT
        n = a + int32(rint(t))                             to nearest even
        x = (query_step * key_step) * float32(n)           to nearest even; two products
        kept = not (x <= theta[i])                         (so NaN is kept)

    with the steps of the groups of i ("query") and j ("key"), or with `per_token`, which only the
    reference serves, of the tokens themselves, [B, Hq, Tq] and [B, Hkv, Tk]. For keys of one group
    x rises with n, so the largest n of a row and group decides for all of them: kernels compare
    once per group. A theta below TINY in size counts as 0. A query block with a row whose theta is
    -inf or NaN (`not theta > -inf`) keeps every middle block. Rows past the last query keep none.

    `official`, an option of the reference alone too: the published code's local blocks, of `grid`.

    Returns indices int32 [B, Hq, Mq, Nk], the ascending ids of sink, kept and local blocks, and
    counts int32 [B, Hq, Mq]. Places past the counts hold 0.
    """
    batch, heads, n_queries = query_packed.shape[:3]
    n_keys, device = key_packed.shape[2], query_packed.device
    blocks = -(-n_keys // kv_block)
    g = grid(n_queries, n_keys, q_block, kv_block, local, sink, device, official)
    block = torch.arange(blocks, device=device)
    mask = (block < g.seen[:, None]) & ((block < g.sink[:, None]) | (block >= g.local[:, None]))
    mask = mask.repeat(batch, heads, 1, 1)
    kinds = ("token", "token") if per_token else ("query", "key")
    q_place = group_of(torch.arange(n_queries, device=device), kinds[0], 0)
    k_place = group_of(torch.arange(n_keys, device=device), kinds[1], kv_block)
    theta = theta.masked_fill(theta.abs() < TINY, 0)
    bounds = list(zip(g.sink.tolist(), g.local.tolist(), strict=True))
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // key_packed.shape[1])
            query, key = unpack(query_packed[b, h]).float(), unpack(key_packed[b, kv]).float()
            q_step, k_step = query_step[b, h, q_place], key_step[b, kv, k_place]
            bias = key_bias[b, h] * reciprocal(k_step)
            for m, (first, end) in enumerate(bounds):
                rows = slice(m * q_block, min((m + 1) * q_block, n_queries))
                if not (theta[b, h, rows] > -torch.inf).all():
                    mask[b, h, m, first:end] = True
                elif first < end:
                    keys = slice(first * kv_block, end * kv_block)
                    kept = kept_pairs(
                        query[rows], q_step[rows], key[keys], k_step[keys], bias[keys],
                        theta[b, h, rows],
                    )  # fmt: skip
                    mask[b, h, m, first:end] = kept.any(0).view(-1, kv_block).any(-1)
    return list_blocks(mask)


def reciprocal(step: torch.Tensor) -> torch.Tensor:
    return (torch.ones_like(step) / step).masked_fill(step == 0, 0)


def kept_pairs(query, q_step, key, k_step, bias, theta):
    """bool [rows, keys]; `query` and `key` hold codes, `bias` is divided by the step of its key."""
    a = (query @ key.T).to(torch.int32)  # float32 holds these integers and their sums exactly
    t = bias * reciprocal(q_step)[:, None]
    t = torch.where(t < LIMIT, t, LIMIT)
    t = torch.where(t > -LIMIT, t, -LIMIT)
    n = a + torch.round(t).to(torch.int32)
    x = (q_step[:, None] * k_step) * n.float()
    return ~(x <= theta[:, None])

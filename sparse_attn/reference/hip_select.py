"""Reference of `hip_select` (HiP, arXiv 2406.09827, section 3): the definition, step by step.

For each query block of each head (or group of heads):

1. Which blocks may be chosen. With s = sink // kv_block and, for the last query of the block at
   position p, e = (p - window) // kv_block + 1 (without causality all blocks: e = ceil(Tk /
   kv_block)): the blocks s <= i < e, B of them. If B <= K' = ceil(budget / kv_block), all are
   chosen.
2. Chunks. Chunk j of K' holds blocks [s + j * B // K', s + (j + 1) * B // K').
3. Until every chunk is one block: a chunk [f, f + g) splits into `branch` children [f + i * g //
   branch, f + (i + 1) * g // branch); the empty ones vanish (a chunk of one block stays). The K'
   children of the highest scores become the chunks, in ascending order; of equal scores the lower
   block wins.
4. A child's score is that of its representative block, f + g // 2 ("centre") or f ("first"): the
   largest q . k over the sampled queries of the block and over keys 0, key_stride, 2 * key_stride,
   ... of the representative. The sampled queries are every q_stride-th one, counted back from the
   last of the block. Query i at position p counts a key only at or before p - window: the rest its
   own window holds.

`//` rounds down; all of it is integer arithmetic (j * B needs 64 bits). Scores are float32 sums of
products of the inputs, -0 equals 0, and a NaN never counts. The first key of every candidate counts
for the block's last query, so a candidate without a score (-inf) needs a NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._hip import best, compute_dtype, rows_of, scores, sequences, sign_of


def hip_select(
    query: torch.Tensor,
    key: torch.Tensor,
    budget: int = 512,
    q_block: int = 64,
    kv_block: int = 2,
    q_stride: int = 2,
    key_stride: int = 1,
    sink: int = 16,
    window: int = 256,
    representative: str = "centre",
    branch: int = 4,
    share_kv_heads: bool = False,
    causal: bool = True,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """indices [B, H', Mq, K] and counts [B, H', Mq]; what follows the listed blocks is 0."""
    batch, heads, n_queries, _ = query.shape
    n_key_heads = key.shape[1]
    capacity = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    keep = -(-budget // kv_block)
    group = heads // n_key_heads if share_kv_heads else 1
    blocks = -(-n_queries // q_block)
    shape = (batch, heads // group, blocks)
    places = min(keep, -(-capacity // kv_block))
    indices = torch.zeros((*shape, places), dtype=torch.int32, device=query.device)
    counts = torch.zeros(shape, dtype=torch.int32, device=query.device)
    queries = query.to(compute_dtype(query)) * sign_of(scale)
    for b, keys in enumerate(sequences(key, batch, block_table, kv_lengths)):
        keys = keys.to(queries.dtype)
        for m in range(blocks):
            rows = rows_of(
                m, q_block, q_stride, n_queries, keys.shape[1], window, causal, query.device
            )
            end = -(-rows.end // kv_block)
            for h in range(heads // group):
                k = keys[h * group * n_key_heads // heads][None].expand(group, -1, -1)
                q = queries[b, h * group : (h + 1) * group, rows.query]

                def score(block, q=q, k=k, rows=rows):
                    offset = torch.arange(0, kv_block, key_stride, device=block.device)
                    tokens = block[:, None] * kv_block + offset
                    return scores(q, k, rows.limit, tokens).amax(0)

                chosen = search(
                    score, sink // kv_block, end, keep, branch, representative, query.device
                )
                indices[b, h, m, : len(chosen)] = chosen
                counts[b, h, m] = len(chosen)
    return indices, counts


def search(
    score: Callable[[torch.Tensor], torch.Tensor],
    start: int,
    end: int,
    keep: int,
    branch: int,
    representative: str,
    device: torch.device,
) -> torch.Tensor:
    """Blocks of [start, end), ascending: all, or the `keep` at which the search arrives.

    `score` maps block ids int64 [N] to scores [N].
    """
    if end - start <= keep:
        return torch.arange(start, max(start, end), device=device)
    bound = start + torch.arange(keep + 1, device=device) * (end - start) // keep
    begin, length = bound[:-1], bound.diff()
    while length.max() > 1:
        part = torch.arange(branch + 1, device=device)
        cut = begin[:, None] + part * length[:, None] // branch
        begin, length = cut[:, :-1].flatten(), cut.diff().flatten()
        begin, length = begin[length > 0], length[length > 0]
        kept = best(score(begin + length // 2 if representative == "centre" else begin), keep)
        begin, length = begin[kept], length[kept]
    return begin

"""Reference of `hip_prune_select` (InfiniteHiP, arXiv 2502.08910, appendix A), step by step.

For each query block, with e = p - window + 1 for its last query at position p (without causality
e = Tk), s = sink rounded down to a multiple of the last chunk size, and the stages (c_1, k_1),
(c_2, k_2), ...:

1. The candidates of the first stage are the chunks j of c_1 keys with a key in [s, e); chunk j
   holds the keys [max(j * c_1, s), min((j + 1) * c_1, e)).
2. Each query head gives each candidate [L, R) a score: the largest q . k over the sampled queries
   (every q_strides[i]-th, counted back from the block's last) and over the keys that it visits.
   * Chunks of at most 8 keys (c_i <= 8): all keys of [L, R).
   * Longer ones: ceil(log2(c_i)) times, halves [L, C) and [C, R) with C = L + (R - L) // 2 are
     represented by L + (C - L) // 2 and C + (R - C) // 2 ("centre") or by L and C ("first"). Both
     are visited, and the half whose representative has the larger q . k stays; of equal ones the
     left. A chunk of one key is visited once and stays.
   A key counts for a query at position p only at or before p - window; a NaN never counts.
3. The scores of a set of heads are joined by the maximum: each query head alone ("none"), those of
   a KV head ("group") or all ("all"). The ceil(k_i / c_i) candidates of the highest scores stay, in
   ascending order; of equal scores the lower chunk.
4. Each chunk that stays splits into chunks of c_{i+1} keys, c_i / c_{i+1} of them; those without a
   key in [s, e) vanish. They are the candidates of the next stage.

The chunks that the last stage keeps are the blocks; kv_block is its chunk size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._hip import best, compute_dtype, rows_of, scores, sequences, sign_of

SCANNED = 8  # chunks of at most so many keys are scored by all of them


def hip_prune_select(
    query: torch.Tensor,
    key: torch.Tensor,
    chunks: Sequence[int],
    keeps: Sequence[int],
    q_strides: Sequence[int],
    q_block: int = 64,
    sink: int = 256,
    window: int = 1024,
    representative: str = "centre",
    merge_heads: str = "none",
    causal: bool = True,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """indices [B, H', Mq, K] and counts [B, H', Mq]; what follows the listed blocks is 0."""
    batch, heads, n_queries, _ = query.shape
    n_key_heads, block = key.shape[1], chunks[-1]
    capacity = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    group = {"none": 1, "group": heads // n_key_heads, "all": heads}[merge_heads]
    blocks = -(-n_queries // q_block)
    shape = (batch, heads // group, blocks)
    places = min(-(-keeps[-1] // block), -(-capacity // block))
    indices = torch.zeros((*shape, places), dtype=torch.int32, device=query.device)
    counts = torch.zeros(shape, dtype=torch.int32, device=query.device)
    queries = query.to(compute_dtype(query)) * sign_of(scale)
    for b, keys in enumerate(sequences(key, batch, block_table, kv_lengths)):
        keys = keys.to(queries.dtype).repeat_interleave(heads // n_key_heads, 0)
        for m in range(blocks):
            rows = [
                rows_of(m, q_block, s, n_queries, keys.shape[1], window, causal, query.device)
                for s in q_strides
            ]
            for h in range(heads // group):
                these = slice(h * group, (h + 1) * group)
                chosen = prune(
                    queries[b, these], keys[these], rows, chunks, keeps, sink, representative
                )
                indices[b, h, m, : len(chosen)] = chosen
                counts[b, h, m] = len(chosen)
    return indices, counts


def prune(query, key, rows, chunks, keeps, sink, representative):
    """The blocks that one set of heads keeps: query [H, Tq, D], key [H, Tk, D]."""
    start, end = sink // chunks[-1] * chunks[-1], rows[0].end
    chunk = torch.arange(start // chunks[0], max(start, end) // chunks[0] + 1, device=key.device)
    size = chunks[0]
    for (part, limit, _), next_size, keep in zip(rows, chunks, keeps, strict=True):
        children = torch.arange(size // next_size, device=key.device)
        chunk, size = (chunk[:, None] * (size // next_size) + children).flatten(), next_size
        chunk = chunk[((chunk + 1) * size > start) & (chunk * size < end)]
        if len(chunk) > -(-keep // size):
            first, last = (chunk * size).clamp(min=start), ((chunk + 1) * size).clamp(max=end)
            score = chunk_scores(query[:, part], key, limit, first, last, size, representative)
            chunk = chunk[best(score.amax(0), -(-keep // size))]
    return chunk if end > start else chunk[:0]


def chunk_scores(query, key, limit, first, last, size, representative):
    """The score of each chunk [first, last) for each head: [H, N]."""
    if size <= SCANNED:
        tokens = first[:, None] + torch.arange(size, device=key.device)
        # a key beyond the chunk is replaced by its first
        tokens = torch.where(tokens < last[:, None], tokens, first[:, None])
        return scores(query, key, limit, tokens)
    centre = representative == "centre"
    first, last = (x.expand(query.shape[0], -1).clone() for x in (first, last))
    score = torch.full(first.shape, -torch.inf, dtype=query.dtype, device=key.device)
    for _ in range((size - 1).bit_length()):
        middle = first + (last - first) // 2
        left = first + (middle - first) // 2 if centre else first
        right = middle + (last - middle) // 2 if centre else middle
        of_left, of_right = (scores(query, key, limit, x[..., None]) for x in (left, right))
        score = torch.maximum(score, torch.maximum(of_left, of_right))
        go_right = of_right > of_left
        long = last - first > 1
        first = torch.where(long & go_right, middle, first)
        last = torch.where(long & ~go_right, middle, last)
    return score

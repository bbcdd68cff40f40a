"""Reference of `squeezed_lookup`: scores of clusters, the test against a threshold, runs."""

from __future__ import annotations

import math

import torch

ROWS = 2**25  # scores held at once


def cluster_scores(
    query: torch.Tensor,
    centroids: torch.Tensor,
    log_counts: torch.Tensor,
    shared: bool = False,
    scale: float | None = None,
    alive: torch.Tensor | None = None,
) -> torch.Tensor:
    """The score per key of each cluster, [B, H', K] (arXiv 2411.09688, eq. of the lookup).

    For a query row u and a cluster j of n_j keys with centroid c_j, a_uj = scale q_u . c_j:

        p_uj = exp(a_uj) / sum_m n_m exp(a_um),    s_j = mean of p_uj over the rows of the head

    The sum goes over clusters that are not empty and, where `alive` [B, H', K] is given, alive;
    other clusters have score 0. The rows are the queries of one query head or, if `shared`, of
    all query heads of a KV head. A row whose sum is not finite (a score of NaN or +infinity) gives
    every cluster an infinite probability. float64 queries are computed in float64, others in
    float32.
    """
    batch, n_heads, n_queries, dim = query.shape
    kv_heads, n_clusters = centroids.shape[1:3]
    group = n_heads // kv_heads
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = 1 / math.sqrt(dim) if scale is None else scale
    weights = log_counts.to(dtype)[:, :, None]  # [C, Hkv, 1, K]
    if alive is not None:
        alive = alive.unflatten(1, (kv_heads, -1))
        weights = weights.masked_fill(~alive, -torch.inf)  # [B, Hkv, G or 1, K]
    weights = weights[..., None, :]
    dead = weights == -torch.inf
    total = torch.zeros((), dtype=dtype, device=query.device)
    rows = max(1, ROWS // (batch * n_heads * n_clusters))
    columns = centroids.to(dtype).mT[:, :, None]
    for part in query.split(rows, dim=2):
        logits = part.to(dtype).unflatten(1, (kv_heads, group)) @ columns * scale
        log_sum = torch.logsumexp(torch.where(dead, -torch.inf, logits + weights), -1, True)
        share = torch.exp(logits - log_sum).masked_fill(~log_sum.isfinite(), torch.inf)
        total = total + share.masked_fill(dead, 0).sum(3)
    if shared:
        return total.sum(2) / (group * n_queries)
    return total.flatten(1, 2) / n_queries


def keep(scores: torch.Tensor, log_counts: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Which clusters have a score above the threshold: bool [B, H', K].

    Strictly above; every cluster that is not empty if the threshold is 0 or less, whose scores are
    positive but may underflow; and where score or threshold are NaN, so that the result of
    attention shows it as that of dense attention would.
    """
    filled = per_decision(log_counts > -torch.inf, scores)
    return filled & (~(scores <= threshold) | (threshold <= 0))


def per_decision(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[C, Hkv, K] for each deciding head of `like` [B, H', K]."""
    return x.repeat_interleave(like.shape[1] // x.shape[1], 1)


def children_of(kept: torch.Tensor, children: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """For each cluster whether its parent was kept: bool [B, H', K]."""
    cluster = torch.arange(n_clusters, device=kept.device, dtype=torch.int32)
    cluster = cluster.expand(*children.shape[:2], n_clusters).contiguous()
    parent = torch.searchsorted(children.contiguous(), cluster, right=True) - 1
    parent = per_decision(parent, kept).expand(*kept.shape[:2], n_clusters)
    return kept.gather(-1, parent.clamp(0, kept.shape[-1] - 1))


def check_bounds(name: str, bounds: torch.Tensor, end: int | None = None) -> None:
    """Raises unless every row of bounds ascends from 0, to `end` where it is given."""
    wrong = (bounds[..., 0] != 0).any() or (bounds.diff(dim=-1) < 0).any()
    if wrong or (end is not None and (bounds[..., -1] != end).any()):
        where = "" if end is None else " to the number of centroids"
        raise RuntimeError(f"{name}: rows must ascend from 0{where}")


def runs_of(kept: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Kept clusters as runs of tokens, those that touch merged: starts, sums, counts, tokens."""
    n_clusters = kept.shape[-1]
    capacity = (n_clusters + 1) // 2
    begin = per_decision(offsets[..., :-1], kept)
    length = per_decision(offsets.diff(dim=-1), kept)
    kept = kept & (length > 0)
    length = (length * kept).int()
    sums = length.cumsum(-1, dtype=torch.int32)
    # a run begins where the last cluster that has keys was not kept
    place = torch.arange(n_clusters, device=kept.device)
    filled = per_decision(offsets.diff(dim=-1) > 0, kept).expand(kept.shape)
    last = torch.where(filled, place, -1).cummax(-1).values.roll(1, -1)
    last[..., 0] = -1
    first = kept & ~(kept.gather(-1, last.clamp(min=0)) & (last >= 0))
    run = first.cumsum(-1) - 1
    run = torch.where(kept, run, capacity)  # one place more, for what is not kept
    shape = (*kept.shape[:2], capacity + 1)
    starts = torch.zeros(shape, dtype=torch.int32, device=kept.device)
    starts.scatter_(-1, torch.where(first, run, capacity), begin.expand(kept.shape).contiguous())
    ends = torch.zeros_like(starts).scatter_reduce_(-1, run, sums, "amax")
    counts = first.sum(-1, dtype=torch.int32)
    parts = (x[..., :capacity].contiguous() for x in (starts, ends))
    return *parts, counts, sums[..., -1].contiguous()


def squeezed_lookup(
    query: torch.Tensor,
    centroids: torch.Tensor,
    log_counts: torch.Tensor,
    offsets: torch.Tensor,
    threshold: torch.Tensor,
    coarse_centroids: torch.Tensor | None = None,
    coarse_log_counts: torch.Tensor | None = None,
    children: torch.Tensor | None = None,
    coarse_threshold: torch.Tensor | None = None,
    shared: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The clusters that a call attends to, as runs of the tokens of the sorted context.

    A head keeps cluster j if `cluster_scores` s_j > threshold, see `keep`; one choice for all
    queries of the call. With a coarse level only clusters whose parent is kept by the same rule
    take part, in the sum over clusters too (arXiv 2411.09688, sec. 4: hierarchical lookup).

    A kernel may test a head of one row (one query, and not `shared` or one query head per KV
    head) in the log domain: s_j > t is a_j > log t + log sum_m n_m exp(a_m), with log t = -inf
    for t <= 0, and everything kept where the right side is NaN or +infinity.

    Args:
        query: [B, Hq, Tq, D], rotated at true positions.
        centroids: [C, Hkv, K, D] in query's dtype; C is B, or 1 for a context that all share.
        log_counts: float32 [C, Hkv, K], log of the keys per cluster, -inf for an empty one (its
            centroid is never looked at, it may be anything).
        offsets: int32 [C, Hkv, K + 1]: the keys of cluster j are tokens offsets[j] to
            offsets[j + 1] of the sorted context; ascending, starts with 0.
        threshold: float32, a tensor of no dimension, so that no host reads it.
        coarse_centroids, coarse_log_counts, coarse_threshold: the same of K1 parents; their
            log_counts count keys, not clusters. All four coarse arguments are given or none.
        children: int32 [C, Hkv, K1 + 1]: parent i has clusters children[i] to children[i + 1];
            ascending, from 0 to K.
        shared: one choice per KV head (H' = Hkv) from the mean over its query heads; otherwise
            each query head has its own (H' = Hq).
        scale: multiplies query @ centroid; None for 1 / sqrt(D).

    Returns:
        starts, sums: int32 [B, H', (K + 1) // 2]. Run r holds the tokens from starts[r] on; runs
            0 to r hold sums[r] tokens together, so run r has sums[r] - sums[r - 1]. Ascending,
            not empty, with at least one token that is not kept between two runs; 0 from place
            `counts` on.
        counts: int32 [B, H'], runs.
        tokens: int32 [B, H'], kept tokens: sums[counts - 1], 0 without runs.
    """
    check_bounds("offsets", offsets)
    alive = None
    if coarse_centroids is not None:
        check_bounds("children", children, centroids.shape[2])
        scores = cluster_scores(query, coarse_centroids, coarse_log_counts, shared, scale)
        parents = keep(scores, coarse_log_counts, coarse_threshold)
        alive = children_of(parents, children, centroids.shape[2])
    scores = cluster_scores(query, centroids, log_counts, shared, scale, alive)
    kept = keep(scores, log_counts, threshold)
    return runs_of(kept if alive is None else kept & alive, offsets)

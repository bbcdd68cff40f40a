"""Squeezed Attention over a long fixed context: whole, and its parts, against own dense."""

from __future__ import annotations

from typing import Any

import torch

from sparse_attn.ops.squeezed_attend import op as attend
from sparse_attn.ops.squeezed_attention import op as whole
from sparse_attn.ops.squeezed_lookup import op as lookup
from sparse_attn.reference.squeezed_lookup import cluster_scores

from .baselines import TOLERANCE
from .check import apart
from .context import Context
from .timing import time_in_turn

KEYS = 20  # of a cluster: 5 % centroids
CONTEXT, TAIL = 131072, 512


def run(context: Context) -> None:
    heads, key_heads = context.size((32, 8), (4, 2))
    for n_queries, goal in ((1, ">= 6.5"), (1024, "")):
        if not context.enough(3, f"squeezed, {n_queries} queries"):
            return
        args = inputs(context, context.size(n_queries, min(n_queries, 20)), heads, key_heads)
        for backend in context.backends(lookup.name):
            one(context, backend, args, goal)


def inputs(context: Context, n_queries: int, heads: int, key_heads: int) -> list[Any]:
    """The arguments of squeezed_attention: keys in clusters, a tenth of which is kept."""
    n, tail = context.size((CONTEXT, TAIL + n_queries), (600, 30))
    dim, clusters = context.size(128, 32), n // KEYS

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=context.device)

    centers = 2 * random(1, key_heads, clusters, 1, dim)
    key = (centers + random(1, key_heads, clusters, KEYS, dim)).to(context.dtype)
    centroids = key.float().mean(3).to(context.dtype)
    query = (2 * random(1, heads, n_queries, dim)).to(context.dtype)
    key, n_keys = key.flatten(2, 3), clusters * KEYS
    value = random(*key.shape).to(context.dtype)
    tails = [random(1, key_heads, tail, dim).to(context.dtype) for _ in range(2)]
    log_counts = torch.full((1, key_heads, clusters), KEYS, device=context.device).log()
    offsets = torch.arange(0, n_keys + 1, KEYS, device=context.device, dtype=torch.int32)
    offsets = offsets.expand(1, key_heads, -1).contiguous()
    threshold = cluster_scores(query, centroids, log_counts).flatten().kthvalue(
        int(0.9 * heads * clusters)
    )[0]  # fmt: skip
    return [query, key, value, *tails, centroids, log_counts, offsets, threshold]


def one(context: Context, backend: str, args: list[Any], goal: str) -> None:
    """Speed-up over attention to the whole context by the same kernel."""
    query, key, value, tail_key, tail_value, *level = args
    n_queries, n = query.shape[2], key.shape[2]
    what = f"squeezed {n}, {n_queries} queries, {backend}"
    starts, sums, counts, tokens = lookup(query, *level, backend=backend)
    states = (query, key, value, tail_key, tail_value)
    everything = (starts * 0, torch.full_like(sums, n), torch.ones_like(counts))
    # the last queries stand in the same places without those before
    out, _ = attend(*states, starts, sums, counts, backend=backend)
    last = (query[:, :, -2:], *states[1:])
    want, _ = attend(*last, starts, sums, counts, backend="reference")
    problem = apart(out[:, :, -2:], want.double(), TOLERANCE)
    if problem:
        context.failed(what, problem)
        return
    seconds = time_in_turn(context, {
        "dense": lambda: attend(*states, *everything, backend=backend),
        "whole": lambda: whole(*args, backend=backend),
        "lookup": lambda: lookup(query, *level, backend=backend),
    }, 1.0)  # fmt: skip
    if len(seconds) == 3:
        context.add(
            f"{what} vs own dense", seconds["dense"] / seconds["whole"], "x", goal,
            us=seconds["whole"] * 1e6, lookup_us=seconds["lookup"] * 1e6,
            kept=tokens.float().mean().item() / n,
        )  # fmt: skip

"""Cases of squeezed_attention: its two operators together."""

from __future__ import annotations

import torch

from sparse_attn.ops.squeezed_attend import op as attend_to_runs
from sparse_attn.ops.squeezed_attention import op
from sparse_attn.ops.squeezed_lookup import op as lookup
from sparse_attn.reference.squeezed_lookup import cluster_scores

from ..gpu.check import TOLERANCE, apart, call, double
from ..gpu.context import Context
from . import Checks


def squeezed_attention(context: Context, backend: str, n_queries: int) -> str | None:
    """A lookup of two levels makes the reference's runs; attention to them and to a tail."""
    dim, parents, each = context.size((128, 60, 8), (32, 6, 8))  # each: clusters of a parent
    dtype = torch.float32 if context.dry else torch.bfloat16
    query = torch.randn(2, 4, n_queries, dim, dtype=dtype)
    sizes = torch.randint(0, 9, (1, 2, parents * each))
    level = []
    for n_keys in (sizes, sizes.unflatten(-1, (parents, each)).sum(-1)):
        centroids = torch.randn(1, 2, n_keys.shape[-1], dim, dtype=dtype)
        log_counts = n_keys.float().log()
        below = n_keys if n_keys is sizes else torch.full_like(n_keys, each)
        bounds = torch.nn.functional.pad(below.cumsum(-1), (1, 0)).int()
        # between two scores
        threshold = cluster_scores(query, centroids, log_counts).median() * 1.001
        level += [centroids, log_counts, bounds, threshold]
    runs = [call(context, lookup, name, (query, *level)) for name in (backend, "reference")]
    if not all(torch.equal(x, y) for x, y in zip(*runs, strict=True)):
        return "other runs than the reference's"
    n = int(level[2].max())
    context_keys = [torch.randn(1, 2, n, dim, dtype=dtype) for _ in range(2)]
    tails = [torch.randn(2, 2, 60, dim, dtype=dtype) for _ in range(2)]
    states = (query, *context_keys, *tails)
    exact = attend_to_runs(*double(states), *runs[1][:3], backend="reference")[0]
    out, again = (call(context, op, backend, (*states, *level))[0] for _ in range(2))
    if not torch.equal(out, again):
        return "two runs differ"
    return apart(out, exact, TOLERANCE[dtype])


def checks(context: Context) -> Checks:
    return [
        (f"squeezed attention, {n} queries", op.name, squeezed_attention, (n,))
        for n in (1, context.size(40, 18))
    ]

"""From which length on a method is faster than dense attention: measured, one line per finding.

`python -m bench crossover` measures the entries of the CPU again, `python -m bench.gpu_check` those
of a GPU.
"""

from __future__ import annotations

import torch

# (method, backend) -> fewest keys at which the method wins, for at least as many queries
MIN_KEYS = {
    ("flex_prefill", "cpp"): 8192,
    ("flex_prefill", "triton"): 8192,  # not measured yet: the CPU's
}
MIN_QUERIES = 2048  # below this, choosing costs more than attending


def dense_is_faster(
    method: str, backend: str, query: torch.Tensor, key: torch.Tensor
) -> str | None:
    """Why the dense path is taken, or None."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    least = MIN_KEYS.get((method, backend))
    if least is None:
        return None
    if n_keys < least:
        return f"dense is faster below {least} keys ({n_keys} given)"
    if n_queries < MIN_QUERIES:
        return f"dense is faster below {MIN_QUERIES} queries ({n_queries} given)"
    return None

"""The lookup of a decoding step and of a prompt's input, against reading its centroids."""

from __future__ import annotations

import torch

from sparse_attn.ops.squeezed_lookup import op

from ..harness import Report, check, time_in_turn

HEADS, CLUSTERS, DIM, SIZE = 8, 6553, 128, 20


def run(report: Report) -> None:
    torch.manual_seed(0)
    centroids = torch.randn(1, HEADS, CLUSTERS, DIM).bfloat16()
    offsets = (torch.arange(CLUSTERS + 1) * SIZE).int().expand(1, HEADS, -1).contiguous()
    log_counts = offsets.diff(dim=-1).float().log()
    threshold = torch.tensor(1.0 / (CLUSTERS * SIZE))  # of equal clusters
    other, target = torch.randn(1 << 26).bfloat16(), torch.empty(1 << 26, dtype=torch.bfloat16)
    for queries in (1, 64, 1024):
        query = torch.randn(1, HEADS, queries, DIM).bfloat16()
        args = (query, centroids, log_counts, offsets, threshold)
        kept, want = (op(*args, backend=name)[3].double() for name in (None, "reference"))
        check("tokens kept", kept, want, 1e-2)  # but for scores on the threshold
        seconds = time_in_turn(
            {  # the copy takes the centroids out of the caches
                "copy": lambda: target.copy_(other),
                "lookup": lambda q=query: op(q, centroids, log_counts, offsets, threshold),
            },
            9,
        )
        flops = 2 * queries * centroids.numel()
        report.add(
            f"lookup, {queries} queries, {HEADS} heads x {CLUSTERS} clusters x {DIM}, ms",
            seconds["lookup"] * 1e3,
            gb_per_s=centroids.nbytes / seconds["lookup"] / 1e9,
            gflops=flops / seconds["lookup"] / 1e9,
        )

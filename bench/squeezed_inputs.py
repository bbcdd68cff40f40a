"""A long fixed context with structure, clustered as a user would, for the benches."""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import torch

from sparse_attn.evaluate.memory import MEASURABLE, forget_peak, resident
from sparse_attn.ops.squeezed_lookup import op as lookup
from sparse_attn.reference.squeezed_lookup import cluster_scores
from sparse_attn.squeezed import SqueezedContext, SqueezedLayer
from sparse_attn.squeezed.calibrate import weighted_quantile

from .inputs import gen

HEADS, DIM, WINDOW, LATER = 8, 128, 100, 16
KEPT = 0.10


class Prepared(NamedTuple):
    """A layer, queries behind it and what preparing it cost."""

    layer: SqueezedLayer
    queries: torch.Tensor  # [1, HEADS, LATER, DIM]
    seconds: float
    gib: float  # most memory beyond the tensors given


@cache
def structured(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query (the last tokens only), key, value of bench/inputs.py, 8 KV heads of 128, bfloat16."""
    parts = []
    for seed in (7, 8):  # four heads at a time: the generator works in float64
        q, k, v = gen(seed, n, "mixed", Hq=4, Hkv=4, D=DIM)
        parts.append([torch.from_numpy(x).transpose(1, 2).bfloat16() for x in (q[:, -256:], k, v)])
    return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))


@cache
def prepared(n: int, segment: int | None = 8192, iterations: int = 10) -> Prepared:
    """A context of n tokens and the window; the threshold keeps KEPT for a decoding query."""
    query, key, value = structured(n + WINDOW + LATER)
    end = n + WINDOW
    before = forget_peak() if MEASURABLE else 0
    start = time.perf_counter()
    context = SqueezedContext.build(
        [key[:, :, :end]], [value[:, :, :end]], [query[:, :, -LATER - WINDOW : -LATER]],
        window=WINDOW, segment=segment, iterations=iterations, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    gib = (resident("VmHWM") - before) / 2**30 if MEASURABLE else float("nan")
    queries = query[:, :, -LATER:]
    layer = context.layers[0]
    return Prepared(with_share(layer, queries[:, :, -1:], KEPT), queries, seconds, gib)


def with_share(layer: SqueezedLayer, query: torch.Tensor, share: float) -> SqueezedLayer:
    """The layer with the threshold at which this query keeps a share of the keys.

    A quantile of the window's mean scores keeps another share of a single query's, so this makes
    the goal's "10 % kept" true of what is timed.
    """
    scores = cluster_scores(query, layer.centroids, layer.log_counts, layer.shared)
    counts = layer.offsets.diff(dim=-1)
    counts = counts.repeat_interleave(scores.shape[1] // counts.shape[1], 1)
    value = weighted_quantile([scores], [counts], 1 - share)
    return layer._replace(threshold=torch.tensor(value, dtype=torch.float32))


def realised(layer: SqueezedLayer, query: torch.Tensor) -> tuple[float, float]:
    """Share of the keys kept and tokens per run, means over heads."""
    _, _, counts, tokens = lookup(query, *layer.lookup)
    return (tokens.sum() / tokens.numel() / layer.key.shape[2]).item(), (
        tokens.sum() / counts.sum().clamp(min=1)
    ).item()

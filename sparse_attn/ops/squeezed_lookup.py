"""Squeezed Attention's choice of clusters: which runs of a clustered context to attend to."""

from __future__ import annotations

import torch

from ..registry import Op
from . import _checks as check

LEVEL = (
    "Tensor log_counts, Tensor offsets, Tensor threshold, Tensor? coarse_centroids=None, "
    "Tensor? coarse_log_counts=None, Tensor? children=None, Tensor? coarse_threshold=None"
)

op = Op(
    "squeezed_lookup",
    f"(Tensor query, Tensor centroids, {LEVEL}, bool shared=False, float? scale=None) "
    "-> (Tensor starts, Tensor sums, Tensor counts, Tensor tokens)",
)


def deciding_heads(query, centroids, shared):
    """How many heads have a choice of their own."""
    return centroids.shape[1] if shared else query.shape[1]


@op.fake
def _(query, centroids, log_counts, offsets, threshold, coarse_centroids=None,
      coarse_log_counts=None, children=None, coarse_threshold=None, shared=False,
      scale=None):  # fmt: skip
    heads = (query.shape[0], deciding_heads(query, centroids, shared))
    runs = (centroids.shape[2] + 1) // 2  # two kept clusters that touch are one run
    starts = query.new_empty((*heads, runs), dtype=torch.int32)
    counts = query.new_empty(heads, dtype=torch.int32)
    return starts, torch.empty_like(starts), counts, torch.empty_like(counts)


def _level(prefix, centroids, log_counts, threshold, query, of):
    """One level of centroids: of one context or of one per sequence."""
    name = f"{prefix}centroids"
    check.tensor(name, centroids, ("C", "Hkv", "Kc", "D"), check.DTYPES)
    check.like(name, centroids, query, "query")
    check.shared_batch(name, centroids, query)
    check.same(name, "number of heads", centroids.shape[1], of.shape[1], "centroids")
    check.same(name, "head_dim", centroids.shape[3], query.shape[3], "query")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    check.tensor(f"{prefix}log_counts", log_counts, ("C", "Hkv", "Kc"), (wide,))
    check.same(f"{prefix}log_counts", "shape", tuple(log_counts.shape),
               tuple(centroids.shape[:3]), name)  # fmt: skip
    check.tensor(f"{prefix}threshold", threshold, (), (wide,))
    for label, x in (("log_counts", log_counts), ("threshold", threshold)):
        check.on_device(f"{prefix}{label}", x, query)


def _bounds(name, x, of, centroids):
    """Where each cluster begins and the last one ends: int32, one more per head than centroids."""
    check.tensor(name, x, ("C", "Hkv", "Kc"), (torch.int32,))
    check.on_device(name, x, centroids)
    shape = (*centroids.shape[:2], centroids.shape[2] + 1)
    check.same(name, "shape", tuple(x.shape), shape, f"{of}, with one more per head")


@op.validate
def _(query, centroids, log_counts, offsets, threshold, coarse_centroids, coarse_log_counts,
      children, coarse_threshold, shared, scale):  # fmt: skip
    check.tensor("query", query, ("B", "Hq", "Tq", "D"), check.DTYPES)
    check.tensor("centroids", centroids, ("C", "Hkv", "Kc", "D"), check.DTYPES)
    check.heads(query, centroids, "centroids")
    _level("", centroids, log_counts, threshold, query, centroids)
    _bounds("offsets", offsets, "centroids", centroids)
    coarse = {
        "coarse_centroids": coarse_centroids, "coarse_log_counts": coarse_log_counts,
        "children": children, "coarse_threshold": coarse_threshold,
    }  # fmt: skip
    missing = [name for name, x in coarse.items() if x is None]
    if 0 < len(missing) < len(coarse):
        raise ValueError(
            f"{missing[0]}: got None, expected a tensor: a lookup of two levels takes all of "
            f"{', '.join(coarse)}"
        )
    if not missing:
        _level("coarse_", coarse_centroids, coarse_log_counts, coarse_threshold, query, centroids)
        check.same("coarse_centroids", "batch size", coarse_centroids.shape[0],
                   centroids.shape[0], "centroids")  # fmt: skip
        _bounds("children", children, "coarse_centroids", coarse_centroids)
    check.finite_scale(scale)


def _triton_serves(query, *args):
    if query.shape[3] > 256:
        return f"head_dim {query.shape[3]}, served up to 256"
    return check.not_float64(query)


def _cuda_serves(query, *args):
    if query.shape[3] > 256 or query.shape[3] % 8 != 0:
        return f"head_dim {query.shape[3]}, served are multiples of 8 up to 256"
    return check.cuda_kernels_serve(query)


op.impl("triton", device="cuda", when=_triton_serves)
op.impl("cuda", device="cuda", when=_cuda_serves)
op.impl("cpp", device="cpu", when=check.not_float64)
op.impl("reference", device="any")
op.autocast(2)
op.no_grad("A selection has no gradient: call it on detached tensors.")

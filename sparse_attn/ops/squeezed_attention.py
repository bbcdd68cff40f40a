"""Squeezed Attention in one call: look the clusters up, then attend."""

from __future__ import annotations

import torch

from ..registry import Op
from . import _checks as check
from .block_sparse_attention import fake_result
from .squeezed_attend import check_tensors
from .squeezed_attend import op as attend
from .squeezed_lookup import LEVEL, deciding_heads
from .squeezed_lookup import op as lookup

op = Op(
    "squeezed_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor tail_key, Tensor tail_value, "
    f"Tensor centroids, {LEVEL}, bool shared=False, Tensor? tail_lengths=None, "
    "float? scale=None) -> (Tensor out, Tensor lse, Tensor tokens)",
)


@op.fake
def _(query, key, value, tail_key, tail_value, centroids, log_counts, offsets, threshold,
      coarse_centroids=None, coarse_log_counts=None, children=None, coarse_threshold=None,
      shared=False, tail_lengths=None, scale=None):  # fmt: skip
    heads = (query.shape[0], deciding_heads(query, centroids, shared))
    return *fake_result(query, value), query.new_empty(heads, dtype=torch.int32)


@op.validate
def _(query, key, value, tail_key, tail_value, centroids, *rest):
    *level, shared, tail_lengths, scale = rest
    check_tensors(query, key, value, tail_key, tail_value, tail_lengths)
    lookup.check(query, centroids, *level, shared, scale)
    check.same("centroids", "number of heads", centroids.shape[1], key.shape[1], "key")
    check.same("centroids", "batch size", centroids.shape[0], key.shape[0], "key")


def _run(backend, query, key, value, tail_key, tail_value, centroids, *rest):
    *level, shared, tail_lengths, scale = rest
    # their overloads themselves: what this operator has checked is not checked again, which would
    # cost a decoding step a tenth of its time
    look_up, attend_to = (_overload(op, backend) for op in (lookup, attend))
    starts, sums, counts, tokens = look_up(query, centroids, *level, shared, scale)
    out, lse = attend_to(
        query, key, value, tail_key, tail_value, starts, sums, counts, tail_lengths, scale
    )
    return out, lse, tokens


def _overload(op, backend):
    return next(row.overload for row in op.impls if row.backend == backend)


def _parts_serve(backend):
    def when(query, key, value, tail_key, tail_value, centroids, *rest):
        refused = lookup.refusal(backend, (query, centroids, *rest[:-2], rest[-1]))
        tensors = (query, key, value, tail_key, tail_value)
        return refused or attend.refusal(backend, tensors) or True

    return when


for _backend, _device in (("triton", "cuda"), ("cuda", "cuda"), ("cpp", "cpu")):
    op.composite(_backend, _device, _run, of=(lookup, attend), when=_parts_serve(_backend))
op.composite("reference", "any", _run, of=(lookup, attend))
op.autocast(6)
op.no_grad("It is for inference over a fixed context: call it on detached tensors.")

"""Exact attention over runs of a clustered context and over a tail of new tokens."""

from __future__ import annotations

import torch

from ..registry import Op
from . import _checks as check
from .block_sparse_attention import fake_result, triton_serves

op = Op(
    "squeezed_attend",
    "(Tensor query, Tensor key, Tensor value, Tensor tail_key, Tensor tail_value, Tensor starts, "
    "Tensor sums, Tensor counts, Tensor? tail_lengths=None, float? scale=None) "
    "-> (Tensor out, Tensor lse)",
)


@op.fake
def _(query, key, value, tail_key, tail_value, starts, sums, counts, tail_lengths=None,
      scale=None):  # fmt: skip
    return fake_result(query, value)


def check_tensors(query, key, value, tail_key, tail_value, tail_lengths):
    """The sorted context, of one sequence or shared by all, and the tail of each sequence."""
    check.tensor("query", query, ("B", "Hq", "Tq", "D"), check.DTYPES)
    check.tensor("key", key, ("C", "Hkv", "Tk", "D"), check.DTYPES)
    check.tensor("value", value, ("C", "Hkv", "Tk", "Dv"), check.DTYPES)
    check.tensor("tail_key", tail_key, ("B", "Hkv", "K", "D"), check.DTYPES)
    check.tensor("tail_value", tail_value, ("B", "Hkv", "K", "Dv"), check.DTYPES)
    named = {"key": key, "value": value, "tail_key": tail_key, "tail_value": tail_value}
    for name, x in named.items():
        check.like(name, x, query, "query")
    check.shared_batch("key", key, query)
    check.heads(query, key)
    check.same("value", "batch size", value.shape[0], key.shape[0], "key")
    check.same("value", "length", value.shape[2], key.shape[2], "key")
    check.same("tail_key", "batch size", tail_key.shape[0], query.shape[0], "query")
    check.same("tail_value", "batch size", tail_value.shape[0], query.shape[0], "query")
    check.same("tail_value", "length", tail_value.shape[2], tail_key.shape[2], "tail_key")
    for name, x in (("value", value), ("tail_key", tail_key), ("tail_value", tail_value)):
        check.same(name, "number of heads", x.shape[1], key.shape[1], "key")
    check.same("key", "head_dim", key.shape[3], query.shape[3], "query")
    check.same("tail_key", "head_dim", tail_key.shape[3], query.shape[3], "query")
    check.same("tail_value", "head_dim", tail_value.shape[3], value.shape[3], "value")
    check.lengths(query.shape[2], key.shape[2])
    check.lengths(query.shape[2], tail_key.shape[2])
    if tail_lengths is not None:
        check.tensor("tail_lengths", tail_lengths, ("B",), (torch.int32,))
        check.on_device("tail_lengths", tail_lengths, query)
        check.same("tail_lengths", "batch size", tail_lengths.shape[0], query.shape[0], "query")


@op.validate
def _(query, key, value, tail_key, tail_value, starts, sums, counts, tail_lengths, scale):
    check_tensors(query, key, value, tail_key, tail_value, tail_lengths)
    check.tensor("starts", starts, ("B", "H'", "K"), (torch.int32,))
    check.tensor("sums", sums, ("B", "H'", "K"), (torch.int32,))
    check.tensor("counts", counts, ("B", "H'"), (torch.int32,))
    for name, x in (("starts", starts), ("sums", sums), ("counts", counts)):
        check.on_device(name, x, query)
    check.same("starts", "batch size", starts.shape[0], query.shape[0], "query")
    if starts.shape[1] not in (key.shape[1], query.shape[1]):
        raise ValueError(
            f"starts: {starts.shape[1]} heads, expected {key.shape[1]} (key heads) "
            f"or {query.shape[1]} (query heads)"
        )
    check.same("sums", "shape", tuple(sums.shape), tuple(starts.shape), "starts")
    check.same("counts", "shape", tuple(counts.shape), tuple(starts.shape[:2]), "starts")
    check.finite_scale(scale)


def _cuda_serves(query, key, value, tail_key, *args):
    dims = query.shape[3], value.shape[3]
    if any(d % 8 or d > 256 for d in dims):
        served = "served: multiples of 8 up to 256; triton takes others"
        return f"head_dim {dims[0]} and {dims[1]}, {served}"
    longest = max(x.shape[2] for x in (query, key, tail_key))
    if not torch.compiler.is_compiling() and longest >= 2**30:  # as in check.lengths
        return f"{longest} tokens, served: less than 2**30; triton takes more"
    return check.cuda_kernels_serve(query)


op.impl("triton", device="cuda", when=triton_serves)
op.impl("cuda", device="cuda", when=_cuda_serves)
op.impl("cpp", device="cpu", when=check.not_float64)
op.impl("reference", device="any")
op.autocast(5)
op.no_grad("It is for inference over a fixed context: call it on detached tensors.")

"""Exact attention over listed blocks, a sink and a window."""

from __future__ import annotations

import torch

from ..registry import Op
from . import _checks as check

op = Op(
    "block_sparse_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, int q_block, "
    "int kv_block, bool causal=True, SymInt sink=0, SymInt window=0, float? scale=None) "
    "-> (Tensor out, Tensor lse)",
)


def fake_result(query, value):
    """Empty (out, lse) of any attention operator."""
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    return out, query.new_empty(query.shape[:3], dtype=lse_dtype)


@op.fake
def _(query, key, value, indices, counts, q_block, kv_block, causal=True, sink=0, window=0,
      scale=None):  # fmt: skip
    return fake_result(query, value)


@op.validate
def check_call(query, key, value, indices, counts, q_block, kv_block, causal, sink, window, scale):
    check.query_key_value(query, key, value)
    check.block_size("q_block", q_block)
    check.block_size("kv_block", kv_block)
    check.tensor("indices", indices, ("B", "Hi", "Mq", "K"), (torch.int32,))
    check.tensor("counts", counts, ("B", "Hi", "Mq"), (torch.int32,))
    for name, x in (("indices", indices), ("counts", counts)):
        if x.device != query.device:
            raise ValueError(f"{name}: device is {x.device}, expected {query.device} as query")
    check.same("indices", "batch size", indices.shape[0], query.shape[0], "query")
    # not `in`: where one of them is a symbol, torch.compile looks for the same object
    if all(indices.shape[1] != heads for heads in (1, key.shape[1], query.shape[1])):
        raise ValueError(
            f"indices: {indices.shape[1]} heads, expected 1, {key.shape[1]} (key heads) "
            f"or {query.shape[1]} (query heads)"
        )
    blocks = (query.shape[2] + q_block - 1) // q_block
    if indices.shape[2] != blocks:
        raise ValueError(
            f"indices: {indices.shape[2]} query blocks, expected {blocks} for "
            f"{query.shape[2]} queries in blocks of {q_block}"
        )
    check.same("counts", "shape", tuple(counts.shape), tuple(indices.shape[:3]), "indices")
    check.not_negative("sink", sink)
    check.not_negative("window", window)
    check.finite_scale(scale)


def triton_serves(query, key, value, *args):
    """Whether Triton's kernels serve a call, forward or backward."""
    if max(query.shape[3], value.shape[3]) > 256:
        return f"head_dim {query.shape[3]} and {value.shape[3]}, served up to 256"
    return check.not_float64(query)


def _cuda_serves(query, key, value, *args):
    dims = query.shape[3], value.shape[3]
    if any(d % 8 or d > 256 for d in dims):
        served = "served: multiples of 8 up to 256; triton takes others"
        return f"head_dim {dims[0]} and {dims[1]}, {served}"
    longest = max(query.shape[2], key.shape[2])
    if not torch.compiler.is_compiling() and longest >= 2**30:  # as in check.lengths
        return f"{longest} tokens, served: less than 2**30; triton takes more"
    return check.cuda_kernels_serve(query)


op.impl("triton", device="cuda", when=triton_serves)
op.impl("cuda", device="cuda", when=_cuda_serves)
op.impl("cpp", device="cpu", when=check.not_float64)
op.impl("reference", device="any")
op.autocast(3)  # its gradient: block_sparse_attention_backward.py

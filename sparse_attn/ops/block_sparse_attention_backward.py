"""Gradients of `block_sparse_attention` for the index it was given."""

from __future__ import annotations

import torch

from ..registry import Op
from . import _checks as check
from .block_sparse_attention import check_call, triton_serves
from .block_sparse_attention import op as attend

op = Op(
    "block_sparse_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, Tensor indices, Tensor counts, int q_block, int kv_block, bool causal=True, "
    "SymInt sink=0, SymInt window=0, float? scale=None) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
)


@op.fake
def _(grad_out, grad_lse, query, key, value, out, lse, indices, counts, q_block, kv_block,
      causal=True, sink=0, window=0, scale=None):  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


@op.validate
def _(grad_out, grad_lse, query, key, value, out, lse, *index_and_options):
    check_call(query, key, value, *index_and_options)
    shape = (*query.shape[:3], value.shape[3])
    for name, x in (("grad_out", grad_out), ("out", out)):
        check.tensor(name, x, ("B", "Hq", "Tq", "Dv"), check.DTYPES)
        check.like(name, x, query, "query")
        check.same(name, "shape", tuple(x.shape), shape, "query and value")
    expected = torch.float64 if query.dtype == torch.float64 else torch.float32
    for name, x in (("lse", lse), ("grad_lse", grad_lse)):
        if x is None and name == "grad_lse":
            continue
        check.tensor(name, x, ("B", "Hq", "Tq"), (expected,))
        check.same(name, "shape", tuple(x.shape), shape[:3], "query")
        check.on_device(name, x, query)


def _triton_serves(grad_out, grad_lse, query, key, value, *args):
    return triton_serves(query, key, value)


op.impl("triton", device="cuda", when=_triton_serves)
op.impl("cpp", device="cpu", when=check.not_float64)
op.impl("reference", device="any")
op.no_grad("There is no second derivative of sparse attention.")


def _save(ctx, inputs, output):
    query, key, value, indices, counts, *options = inputs
    ctx.given, ctx.options = len(inputs), options[:6]
    ctx.cached = any(x is not None for x in options[6:])
    ctx.save_for_backward(query, key, value, *output, indices, counts)
    ctx.set_materialize_grads(False)  # grad_lse is mostly not there


def _backward(backend, ctx, grad_out, grad_lse):
    if ctx.cached:
        raise NotImplementedError(
            "sparse_attn::block_sparse_attention has no gradient with block_table or kv_lengths: "
            "call it on contiguous keys and values without them, or detach the inputs"
        )
    grads = (None, None, None)
    if grad_out is not None or grad_lse is not None:
        if grad_out is None:
            grad_out = torch.zeros_like(ctx.saved_tensors[3])
        grads = op.prefer(backend, grad_out, grad_lse, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * (ctx.given - 3)


attend.autograd(_save, _backward)

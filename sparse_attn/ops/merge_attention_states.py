"""Joins attention over two disjoint sets of keys."""

from __future__ import annotations

import torch

from ..registry import Op
from . import _checks as check

op = Op(
    "merge_attention_states",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
)


@op.fake
def _(out_a, lse_a, out_b, lse_b):
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@op.validate
def _(out_a, lse_a, out_b, lse_b):
    for name, x in (("out_a", out_a), ("out_b", out_b)):
        check.tensor(name, x, ("B", "H", "T", "Dv"), check.DTYPES)
    check.like("out_b", out_b, out_a, "out_a")
    check.same("out_b", "shape", tuple(out_b.shape), tuple(out_a.shape), "out_a")
    expected = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b)):
        check.tensor(name, x, ("B", "H", "T"), (expected,))
        check.same(name, "shape", tuple(x.shape), tuple(out_a.shape[:3]), "out_a")
        if x.device != out_a.device:
            raise ValueError(f"{name}: device is {x.device}, expected {out_a.device} as out_a")


op.impl("triton", device="cuda", when=check.not_float64)
op.impl("cuda", device="cuda", when=check.cuda_kernels_serve)
op.impl("cpp", device="cpu", when=check.not_float64)
op.impl("reference", device="any")


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _backward(backend, ctx, grad_out, grad_lse):
    """Each side's weight is exp(lse_x - lse): its share of the keys' total."""
    out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
    known = lse.masked_fill(lse == -torch.inf, 0)
    grads = []
    for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(lse_x - known)
        apart = (grad_out.to(lse.dtype) * (out_x.to(lse.dtype) - out.to(lse.dtype))).sum(-1)
        grads.append((weight[..., None] * grad_out).to(out_x.dtype))
        grads.append(weight * (apart + grad_lse))
    return tuple(grads)


op.autograd(_save, _backward)

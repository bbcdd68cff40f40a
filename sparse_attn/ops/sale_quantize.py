"""SALE's 4-bit copy of queries or keys."""

from __future__ import annotations

import torch

from ..registry import Op
from . import _checks as check
from . import _sale as sale

op = Op(
    "sale_quantize",
    '(Tensor x, Tensor? mean=None, str group="query", int block=32) '
    "-> (Tensor packed, Tensor step, Tensor center)",
)


@op.fake
def _(x, mean=None, group="query", block=32):
    batch, heads, length, dim = x.shape
    return (
        x.new_empty((batch, heads, length, dim // 2), dtype=torch.uint8),
        x.new_empty((batch, heads, sale.n_groups(length, group, block)), dtype=torch.float32),
        x.new_empty((batch, heads, dim), dtype=torch.float32),
    )


@op.validate
def _(x, mean, group, block):
    check.tensor("x", x, ("B", "H", "T", "D"), check.DTYPES)
    if x.shape[3] % 2 != 0:
        raise ValueError(f"x: head_dim {x.shape[3]}, expected an even one: two channels a byte")
    if group not in sale.GROUPS:
        raise ValueError(f"group: got {group!r}, expected one of {sale.GROUPS}")
    check.integer("block", block)
    if block not in sale.KV_BLOCKS:
        raise ValueError(f"block: got {block}, expected one of {sale.KV_BLOCKS}")
    if mean is not None:
        sale.check_vector("mean", mean, (*x.shape[:2], x.shape[3]), "x")
        sale.check_device("mean", mean, x, "x")


def _cuda_serves(x, *args):
    if x.shape[3] > 256 or x.shape[3] % 8 != 0:
        return f"head_dim {x.shape[3]}, served are multiples of 8 up to 256"
    return check.cuda_kernels_serve(x)


def _triton_serves(x, *args):
    if x.shape[3] > 256:
        return f"head_dim {x.shape[3]}, served up to 256"
    return check.not_float64(x)


op.impl("triton", device="cuda", when=_triton_serves)
op.impl("cuda", device="cuda", when=_cuda_serves)
op.impl("cpp", device="cpu", when=check.not_float64)
op.impl("reference", device="any")
op.autocast(1)
op.no_grad("A selection has no gradient: call it on detached tensors.")

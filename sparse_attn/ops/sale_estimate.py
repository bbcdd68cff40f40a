"""SALE's choice of blocks by 4-bit scores."""

from __future__ import annotations

import torch

from ..registry import Op
from . import _checks as check
from . import _sale as sale

op = Op(
    "sale_estimate",
    "(Tensor query_packed, Tensor query_step, Tensor key_packed, Tensor key_step, "
    f"Tensor key_bias, Tensor theta, {sale.GRID}) -> (Tensor indices, Tensor counts)",
)


def fake_lists(query, heads, n_keys, q_block, kv_block):
    """Empty (indices, counts) of SALE's selectors."""
    rows, blocks = (query.shape[2] + q_block - 1) // q_block, (n_keys + kv_block - 1) // kv_block
    shape = (query.shape[0], heads, rows)
    return (
        query.new_empty((*shape, blocks), dtype=torch.int32),
        query.new_empty(shape, dtype=torch.int32),
    )


@op.fake
def _(query_packed, query_step, key_packed, key_step, key_bias, theta, q_block=64, kv_block=32,
      local=128, sink=32):  # fmt: skip
    return fake_lists(query_packed, query_packed.shape[1], key_packed.shape[2], q_block, kv_block)


@op.validate
def _(query_packed, query_step, key_packed, key_step, key_bias, theta, q_block, kv_block, local,
      sink):  # fmt: skip
    sale.check_grid(q_block, kv_block, local, sink)
    for name, x, heads in (("query_packed", query_packed, "Hq"), ("key_packed", key_packed, "Hkv")):
        check.tensor(name, x, ("B", heads, "T", "D/2"), (torch.uint8,))
        sale.check_device(name, x, query_packed, "query_packed")
    check.same(
        "key_packed", "batch size", key_packed.shape[0], query_packed.shape[0], "query_packed"
    )
    check.same("key_packed", "bytes", key_packed.shape[3], query_packed.shape[3], "query_packed")
    check.heads(query_packed, key_packed)
    check.lengths(query_packed.shape[2], key_packed.shape[2])
    batch, heads, n_queries = query_packed.shape[:3]
    n_keys = key_packed.shape[2]
    for name, x, shape in (
        ("query_step", query_step, (batch, heads, sale.n_groups(n_queries, "query", 0))),
        ("key_step", key_step, (*key_packed.shape[:2], sale.n_groups(n_keys, "key", kv_block))),
        ("key_bias", key_bias, (batch, heads, n_keys)),
        ("theta", theta, (batch, heads, n_queries)),
    ):
        sale.check_vector(name, x, shape, "query_packed and key_packed")
        sale.check_device(name, x, query_packed, "query_packed")


def _cuda_serves(query_packed, *args):
    dim = 2 * query_packed.shape[3]
    if dim > 256 or dim % 8 != 0:
        return f"head_dim {dim}, served are multiples of 8 up to 256"
    return check.cuda_kernels_run(query_packed)


def _triton_serves(query_packed, *args):
    dim = 2 * query_packed.shape[3]
    if dim > 256:  # a symbol's comparison is no bool: torch.compile must decide it here
        return f"head_dim {dim}, served up to 256"
    return True


op.impl("triton", device="cuda", when=_triton_serves)
op.impl("cuda", device="cuda", when=_cuda_serves)
op.impl("cpp", device="cpu")
op.impl("reference", device="any")
op.autocast(0)  # casts nothing, keeps autocast out of what is exact
op.no_grad("A selection has no gradient: call it on detached tensors.")

"""The score from which on a pair is important to SALE, per query."""

from __future__ import annotations

import math

import torch

from ..registry import Op
from . import _checks as check
from . import _sale as sale
from .block_sparse_attention import op as attend

DENSE_BELOW = 1e-5  # a head with a lower threshold keeps everything

op = Op(
    "sale_threshold",
    f"(Tensor query, Tensor key, Tensor key_mean, Tensor threshold, {sale.GRID}, "
    "bool causal=True, float? scale=None) -> Tensor theta",
)


@op.fake
def _(query, key, key_mean, threshold, q_block=64, kv_block=32, local=128, sink=32, causal=True,
      scale=None):  # fmt: skip
    return query.new_empty(query.shape[:3], dtype=torch.float32)


@op.validate
def _(query, key, key_mean, threshold, q_block, kv_block, local, sink, causal, scale):
    check.query_key(query, key)
    sale.check_vector("key_mean", key_mean, (*key.shape[:2], key.shape[3]), "key")
    sale.check_device("key_mean", key_mean, query, "query")
    sale.check_threshold(query, threshold)
    sale.check_grid(q_block, kv_block, local, sink)
    sale.check_causal(causal)
    check.finite_scale(scale)
    if scale is not None and scale < 0:
        raise ValueError(f"scale: got {scale}, expected 0 or more; negate the query instead")


def _run(backend, query, key, key_mean, threshold, q_block, kv_block, local, sink, causal, scale,
         official=False):  # fmt: skip
    """theta = (lse + ln threshold) / scale - query . key_mean, in units of query . centred key.

    The reference region is attended to for its lse alone, with eight channels for values. No
    operator takes `official`, the region of `sale.grid`.
    """
    lists = sale.reference_lists(
        query.shape[2], key.shape[2], q_block, kv_block, local, sink, query.device, official
    )
    lists = (x.expand(query.shape[0], *x.shape[1:]) for x in lists)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    _, lse = attend(
        query, key, key[..., :8], *lists, q_block, kv_block, causal, scale=scale, backend=backend
    )
    mean = key_mean.to(lse.dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    theta = (lse + threshold.to(lse.dtype).log()[:, None]) / scale
    theta -= sale.dots(query, None, mean[:, :, None])
    return theta.masked_fill_((threshold < DENSE_BELOW)[:, None], -torch.inf).float()


def _parts_serve(backend):
    def when(query, key, *options):
        return attend.refusal(backend, (query, key, key)) or True

    return when


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
op.composite("cpp", "cpu", _run, of=(attend,), when=_parts_serve("cpp"))
op.composite("reference", "any", _run, of=(attend,))
op.autocast(2)
op.no_grad("A selection has no gradient: call it on detached tensors.")

"""SALE's choice of blocks: quantise, threshold, estimate."""

from __future__ import annotations

from ..registry import Op
from . import _checks as check
from . import _sale as sale
from .sale_estimate import fake_lists
from .sale_estimate import op as estimate
from .sale_quantize import op as quantize
from .sale_threshold import op as bar

OPTIONS = (
    f"Tensor threshold, {sale.GRID}, bool share_kv_heads=False, bool causal=True, "
    "float? scale=None, Tensor? key_mean=None, Tensor? query_mean=None"
)

op = Op("sale_select", f"(Tensor query, Tensor key, {OPTIONS}) -> (Tensor indices, Tensor counts)")


@op.fake
def _(query, key, threshold, q_block=64, kv_block=32, local=128, sink=32, share_kv_heads=False,
      causal=True, scale=None, key_mean=None, query_mean=None):  # fmt: skip
    heads = key.shape[1] if share_kv_heads else query.shape[1]
    return fake_lists(query, heads, key.shape[2], q_block, kv_block)


@op.validate
def _(query, key, threshold, q_block, kv_block, local, sink, share_kv_heads, causal, scale,
      key_mean, query_mean):  # fmt: skip
    check.query_key(query, key)
    if query.shape[3] % 2 != 0:
        raise ValueError(f"query: head_dim {query.shape[3]}, expected an even one")
    sale.check_threshold(query, threshold)
    sale.check_grid(q_block, kv_block, local, sink)
    sale.check_share(share_kv_heads)
    sale.check_causal(causal)
    check.finite_scale(scale)
    for name, mean, x in (("key_mean", key_mean, key), ("query_mean", query_mean, query)):
        if mean is not None:
            sale.check_vector(name, mean, (*x.shape[:2], x.shape[3]), name.removesuffix("_mean"))
            sale.check_device(name, mean, query, "query")


def _run(backend, query, key, threshold, q_block, kv_block, local, sink, share_kv_heads, causal,
         scale, key_mean, query_mean):  # fmt: skip
    if scale is not None and scale < 0:
        query, scale = -query, -scale
        query_mean = None if query_mean is None else -query_mean
    grid = (q_block, kv_block, local, sink)
    groups = query.shape[1] // key.shape[1]
    q_packed, q_step, q_mean = quantize(query, query_mean, "query", backend=backend)
    k_packed, k_step, k_mean = quantize(key, key_mean, "key", kv_block, backend=backend)
    theta = bar(query, key, k_mean, threshold, *grid, causal, scale, backend=backend)
    bias = sale.dots(key, k_mean, q_mean.unflatten(1, (-1, groups)))
    lists = estimate(q_packed, q_step, k_packed, k_step, bias, theta, *grid, backend=backend)
    return sale.union(*lists, groups) if share_kv_heads else lists


def _parts_serve(backend):
    def when(query, key, *options):
        refused = quantize.refusal(backend, (query, None, "query", 32))
        return refused or bar.refusal(backend, (query, key)) or True

    return when


for _backend, _device in (("triton", "cuda"), ("cuda", "cuda"), ("cpp", "cpu")):
    op.composite(_backend, _device, _run, of=(quantize, bar, estimate), when=_parts_serve(_backend))
op.composite("reference", "any", _run, of=(quantize, bar, estimate))
op.autocast(2)
op.no_grad("A selection has no gradient: call it on detached tensors.")

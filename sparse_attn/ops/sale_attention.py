"""SALE in one call: select, then attend."""

from __future__ import annotations

from ..registry import Op
from . import _checks as check
from ._select_attend import compose
from .block_sparse_attention import fake_result
from .block_sparse_attention import op as attend
from .sale_select import OPTIONS
from .sale_select import op as select

op = Op(
    "sale_attention",
    f"(Tensor query, Tensor key, Tensor value, {OPTIONS}) -> (Tensor out, Tensor lse)",
)


@op.fake
def _(query, key, value, threshold, q_block=64, kv_block=32, local=128, sink=32,
      share_kv_heads=False, causal=True, scale=None, key_mean=None, query_mean=None):  # fmt: skip
    return fake_result(query, value)


@op.validate
def _(query, key, value, *options):
    check.query_key_value(query, key, value)
    select.check(query, key, *options)


def _run(backend, query, key, value, *options):
    _, q_block, kv_block, _, _, _, causal, scale, *_ = options
    lists = select(query, key, *options, backend=backend)
    return attend(
        query, key, value, *lists, q_block, kv_block, causal, scale=scale, backend=backend
    )


compose(op, select, _run)

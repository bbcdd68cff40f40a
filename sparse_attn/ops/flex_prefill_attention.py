"""FlexPrefill in one call: select, then attend."""

from __future__ import annotations

from ..registry import Op
from . import _checks as check
from ._select_attend import compose
from .block_sparse_attention import fake_result
from .block_sparse_attention import op as attend
from .flex_prefill_select import OPTIONS
from .flex_prefill_select import op as select

op = Op(
    "flex_prefill_attention",
    f"(Tensor query, Tensor key, Tensor value, {OPTIONS}) -> (Tensor out, Tensor lse)",
)


@op.fake
def _(query, key, value, gamma=0.95, tau=0.1, min_budget=1024, max_budget=None, block_size=128,
      variant="exact", causal=True, scale=None):  # fmt: skip
    return fake_result(query, value)


@op.validate
def _(query, key, value, *options):
    check.query_key_value(query, key, value)
    select.check(query, key, *options)


def _run(backend, query, key, value, *options):
    *_, block_size, _, causal, scale = options
    indices, counts, _ = select(query, key, *options, backend=backend)
    return attend(
        query, key, value, indices, counts, block_size, block_size, causal, scale=scale,
        backend=backend,
    )  # fmt: skip


compose(op, select, _run)

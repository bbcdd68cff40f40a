"""HiP in one call: select, then attend."""

from __future__ import annotations

from ..registry import Op
from . import _checks as check
from . import _hip as hip
from ._select_attend import compose
from .block_sparse_attention import fake_result
from .block_sparse_attention import op as attend
from .hip_select import OPTIONS
from .hip_select import op as select

op = Op(
    "hip_attention",
    f"(Tensor query, Tensor key, Tensor value, {OPTIONS}, {hip.PAGES}) -> (Tensor out, Tensor lse)",
)


@op.fake
def _(query, key, value, budget=512, q_block=64, kv_block=2, q_stride=2, key_stride=1, sink=16,
      window=256, representative="centre", branch=4, share_kv_heads=False, causal=True,
      scale=None, block_table=None, kv_lengths=None):  # fmt: skip
    return fake_result(query, value)


@op.validate
def _(query, key, value, *options):
    check.cache(query, key, value, *options[-2:])
    select.check(query, key, *options)


def _run(backend, query, key, value, *options):
    _, q_block, kv_block, _, _, sink, window, *_, causal, scale, table, lengths = options
    indices, counts = select(query, key, *options, backend=backend)
    return attend(
        query, key, value, indices, counts, q_block, kv_block, causal, sink, window, scale,
        table, lengths, backend=backend,
    )  # fmt: skip


compose(op, select, _run, table_of=lambda options: options[-2])

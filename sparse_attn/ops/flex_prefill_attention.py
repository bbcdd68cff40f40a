"""FlexPrefill in one call: select, then attend."""

from __future__ import annotations

from ..registry import Op
from . import _checks as check
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


def _parts_serve(backend):
    def when(query, key, value, *options):
        refused = select.reasons((query, key, *options))[backend]
        return refused or attend.reasons((query, key, value))[backend] or True

    return when


for _backend, _device in (("triton", "cuda"), ("cuda", "cuda"), ("cpp", "cpu")):
    op.composite(_backend, _device, _run, of=(select, attend), when=_parts_serve(_backend))
op.composite("reference", "any", _run, of=(select, attend))
op.autocast(3)
op.no_grad("Call sparse_attn.attention, which has one, or detach the inputs.")

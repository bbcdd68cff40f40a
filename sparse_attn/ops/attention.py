"""The dispatch as an operator: a method by name, its options as JSON."""

from __future__ import annotations

import json

from ..registry import Op
from . import _checks as check
from .block_sparse_attention import fake_result
from .block_sparse_attention import op as attend

op = Op(
    "attention",
    '(Tensor query, Tensor key, Tensor value, str method, str options="{}", bool causal=True, '
    "float? scale=None, Tensor? block_table=None, Tensor? kv_lengths=None) "
    "-> (Tensor out, Tensor lse)",
)


@op.fake
def _(query, key, value, method, options="{}", causal=True, scale=None, block_table=None,
      kv_lengths=None):  # fmt: skip
    return fake_result(query, value)


def config_of(method, options):
    """The method's config from its name and a JSON object of its fields."""
    from ..methods import METHODS, resolve
    from ..settings import build

    resolve(method)
    try:
        fields = json.loads(options)
    except json.JSONDecodeError as error:
        raise ValueError(f"options: expected a JSON object, got {options!r} ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"options: expected a JSON object, got {options!r}")
    return build(METHODS[method], method, fields, "options")


@op.validate
def _(query, key, value, method, options, causal, scale, block_table, kv_lengths):
    check.cache(query, key, value, block_table, kv_lengths)
    check.finite_scale(scale)
    config_of(method, options)


def _run(backend, query, key, value, method, options, causal, scale, block_table, kv_lengths):
    from ..api import attention

    return attention(
        query, key, value, config_of(method, options), causal=causal, scale=scale,
        backend=backend, return_lse=True, block_table=block_table, kv_lengths=kv_lengths,
    )  # fmt: skip


op.composite("triton", "cuda", _run, of=(attend,))
op.composite("cuda", "cuda", _run, of=(attend,))
op.composite("cpp", "cpu", _run, of=(attend,))
op.composite("reference", "any", _run, of=(attend,))
op.autocast(3)
op.no_grad("Call sparse_attn.attention, which has one, or detach the inputs.")

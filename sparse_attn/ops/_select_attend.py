"""What the operators that select and attend in one call share: who serves them, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..registry import Op
from .block_sparse_attention import op as attend


def compose(
    op: Op, select: Op, run: Callable[..., Any], table_of: Callable[..., Any] | None = None
) -> None:
    """Adds to `op` an implementation per backend that serves where its two parts do.

    op takes query, key, value and the options of `select`; `run(backend, *args)` calls the parts;
    `table_of(options)` is the block table among them, where select takes one.
    """

    def parts_serve(backend: str) -> Callable[..., bool | str]:
        def when(query: Any, key: Any, value: Any, *options: Any) -> bool | str:
            call = (query, key, value)
            if table_of is not None:
                call = (*call, *[None] * 8, table_of(options))
            refused = select.refusal(backend, (query, key, *options))
            return refused or attend.refusal(backend, call) or True

        return when

    parts = (select, attend)
    for backend, device in (("triton", "cuda"), ("cuda", "cuda"), ("cpp", "cpu")):
        op.composite(backend, device, run, of=parts, when=parts_serve(backend))

    def unasked(query: Any, key: Any, value: Any, *options: Any) -> bool | str:
        return select.refusal("reference", (query, key, *options), asked=False) or True

    op.composite("reference", "any", run, of=parts, unasked=unasked)
    op.autocast(3)
    op.no_grad("Call sparse_attn.attention, which has one, or detach the inputs.")

"""Dense causal attention by others: whatever this machine has, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from sparse_attn import BlockIndex

from .cases import rows_error
from .context import Context

TOLERANCE = 2e-2  # of bfloat16 results; half of their digits would be 6e-2


def prefill(
    context: Context, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """Causal attention of equal lengths: PyTorch's top-left alignment is ours."""
    gqa = query.shape[1] != key.shape[1]
    found: dict[str, Callable[[], Any]] = {}
    if context.dry:
        found["sdpa"] = lambda: F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=gqa
        )
        return found
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend: Any) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=gqa
                )

        return run

    found["sdpa cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    found["sdpa flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
    found |= _external(query, key, value)
    return checked(context, found, query, key, value)


def _external(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """FlashAttention and FlashInfer, where they are installed; they want [B, T, H, D]."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    found: dict[str, Callable[[], Any]] = {}
    for module in ("flash_attn_interface", "flash_attn"):  # FlashAttention 3, then 2
        if find_spec(module) is not None:
            function = __import__(module).flash_attn_func

            def run(function: Any = function) -> Any:
                out = function(q, k, v, causal=True)
                return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

            found[module] = run
    if find_spec("flashinfer") is not None:
        import flashinfer

        found["flashinfer"] = lambda: flashinfer.single_prefill_with_kv_cache(
            q[0], k[0], v[0], causal=True
        ).transpose(0, 1)[None]
    return found


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: BlockIndex
) -> Callable[[], Any]:
    """Compiled FlexAttention over the same blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = index.to_flex(query.shape[2], key.shape[2])
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = query.shape[1] != key.shape[1]
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=gqa)


def checked(
    context: Context,
    alternatives: dict[str, Callable[[], Any]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex | None = None,
) -> dict[str, Callable[[], Any]]:
    """Those whose result is right; the others are reported."""
    good = {}
    for name, run in alternatives.items():
        try:
            out = run()
            error = rows_error(query, key, value, out, index)
        except Exception as problem:  # a library that is there but cannot serve this GPU or call
            context.failed(name, problem)
            continue
        if error <= TOLERANCE:
            good[name] = run
        else:
            context.failed(name, f"wrong result, relative error {error:.3g}")
    return good

"""Hugging Face transformers: `model.set_attn_implementation("sparse_attn")` after `register()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .. import api


class Span(NamedTuple):
    """The part of a padded sequence that is real: which queries, which keys."""

    queries: slice
    keys: slice


def register(method: Any = "flex_prefill", name: str = "sparse_attn", **options: Any) -> None:
    """Makes `name` an attention implementation that calls `sparse_attn.attention`.

    `method` and `options` (backend, fallback) go to `attention`. Decoding steps and prompts below
    the method's crossover take its dense path. Register several names for several methods.
    """
    register_function(
        lambda *args, **kwargs: api.attention(*args, method, **options, **kwargs), name
    )


def register_function(attend: Callable[..., torch.Tensor], name: str) -> None:
    """Registers `attend(query, key, value, causal=, scale=)` under a name."""

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if softcap is not None:
            raise NotImplementedError(f"softcap: got {softcap}; use 'eager' for such layers")
        if dropout:
            raise NotImplementedError(f"dropout: got {dropout}; sparse_attn is for inference")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None:
            out = attend(query, key, value, causal=causal, scale=scaling)
        else:
            out = query.new_zeros((*query.shape[:3], value.shape[3]))
            for b, (queries, keys) in enumerate(spans(attention_mask, query, key)):
                part = query[b : b + 1, :, queries]
                pair = (x[b : b + 1, :, keys] for x in (key, value))
                out[b : b + 1, :, queries] = attend(part, *pair, causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, forward)
    # without a mask function of the same name a padded batch would arrive without its mask
    AttentionMaskInterface.register(name, sdpa_mask)


def spans(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> list[Span]:
    """Finds the real part of each sequence of a causal mask [B, 1, Tq, Tk] with padding.

    Raises NotImplementedError for any other mask: a sliding window, packed sequences.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    seen = mask if mask.dtype == torch.bool else mask == 0
    seen = seen[..., :n_keys].expand(query.shape[0], -1, -1, -1)
    j = torch.arange(n_keys, device=mask.device)
    i = torch.arange(n_queries, device=mask.device)[:, None]
    found = []
    for b in range(query.shape[0]):
        valid = seen[b, 0].any(0).nonzero().flatten()
        if len(valid) == 0:
            raise NotImplementedError("attention_mask: a sequence has no visible key")
        start, end = int(valid[0]), int(valid[-1]) + 1
        # a padded cache ends at n_keys, a preallocated one at the last key written
        for first in (n_keys - n_queries, end - n_queries):
            expected = (j >= start) & (j < end) & (j <= first + i)
            if torch.equal(expected, seen[b, 0]):
                low, high = max(0, start - first), min(n_queries, end - first)
                found.append(Span(slice(low, high), slice(start, end)))
                break
        else:
            raise NotImplementedError(
                "attention_mask: sparse_attn serves causal attention with left or right padding; "
                "this mask is another (sliding window, packed sequences, ...): use 'sdpa'"
            )
    return found

"""Hugging Face transformers: `model.set_attn_implementation("sparse_attn")` after `register()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .. import api
from ..methods import resolve

ROWS = 128  # of a mask, read at once: a whole comparison would take several times its memory
KNOWN = WeakTensorKeyDictionary()  # masks in use and what was found in them: layers share a mask
REFUSED = {
    "softcap": "soft-capped scores; use 'eager'",
    "dropout": "dropout, it is for inference; call model.eval()",
    "position_bias": "a bias on the scores; use 'sdpa'",
    "s_aux": "learned sinks; use 'eager'",
    "cache": "attention over a paged cache; use 'sdpa'",
}


class Span(NamedTuple):
    """The part of a padded sequence that is real: which queries, which keys."""

    queries: slice
    keys: slice


def register(method: Any = "flex_prefill", name: str = "sparse_attn", **options: Any) -> None:
    """Makes `name` an attention implementation that calls `sparse_attn.attention`.

    `method` and `options` (backend, fallback) go to `attention`. Decoding steps and prompts below
    the method's crossover take its dense path. Register several names for several methods.

    Served is causal attention with left or right padding, whole or in chunks, with dynamic or
    static caches; any other mask, a soft cap, sinks, dropout and paged caches raise. Masks are read
    on the host, which torch.compile(fullgraph=True) refuses: compile without it or pass no padding.
    """
    config = resolve(method)
    unknown = sorted(set(options) - {"backend", "fallback"})
    if unknown:
        raise TypeError(
            f"register: got {unknown}, expected backend or fallback; a method's fields go into its "
            "config, for example register(FlexPrefill(gamma=0.9))"
        )
    register_function(
        lambda *args, **kwargs: api.attention(*args, config, **options, **kwargs), name
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
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        refuse(dropout=dropout or None, **kwargs)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        n_queries = query.shape[2]
        if attention_mask is None:
            # no mask for several queries and more keys: a preallocated cache, empty until now
            if causal and n_queries > 1:
                key, value = key[:, :, :n_queries], value[:, :, :n_queries]
            out = attend(query, key, value, causal=causal, scale=scaling)
        elif not causal:
            raise NotImplementedError("attention_mask: served for causal attention; use 'sdpa'")
        else:
            out = query.new_zeros((*query.shape[:3], value.shape[3]))
            for b, (queries, keys) in enumerate(spans(attention_mask, query, key)):
                if queries.start == queries.stop:
                    continue
                part = query[b : b + 1, :, queries]
                pair = (x[b : b + 1, :, keys] for x in (key, value))
                out[b : b + 1, :, queries] = attend(part, *pair, causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, forward)
    # without a mask function of the same name a padded batch would arrive without its mask
    AttentionMaskInterface.register(name, sdpa_mask)


def refuse(**options: Any) -> None:
    """Raises for what changes the result of attention and is not computed here."""
    for name, what in REFUSED.items():
        if options.get(name) is not None:
            raise NotImplementedError(f"{name}: sparse_attn does not compute {what}")


def spans(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> list[Span]:
    """Finds the real part of each sequence of a causal mask [B, 1, Tq, Tk] with padding.

    Raises NotImplementedError for any other mask: a sliding window, packed sequences, one per head.
    """
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise NotImplementedError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected [B, 1, Tq, Tk]: "
            "sparse_attn takes no mask per head; use 'sdpa'"
        )
    if mask.is_inference():  # has no version: a change in place would not be noticed
        return find_spans(mask, query, key)
    state = (mask._version, query.shape[0], query.shape[2], key.shape[2])
    known = KNOWN.get(mask)
    if known is None or known[0] != state:
        known = KNOWN[mask] = (state, find_spans(mask, query, key))
    return known[1]


def find_spans(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> list[Span]:
    """Reads the mask: `spans` without the check of its shape and without what is known of it."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    seen = seen[:, 0, :, : key.shape[2]].expand(query.shape[0], query.shape[2], -1)
    return [span(rows) for rows in seen]


def span(seen: torch.Tensor) -> Span:
    """Finds the real part of one sequence from what each query sees, bool [Tq, Tk]."""
    n_queries, n_keys = seen.shape
    start = end = first = 0
    valid = seen[-1].nonzero().flatten()
    if len(valid) > 0:  # otherwise a chunk of padding
        start, end = int(valid[0]), int(valid[-1]) + 1
        # the earliest position at which query 0 can stand, from the first query that sees a key
        row = int(seen[:, start].nonzero()[0])
        first = start + int(seen[row].sum()) - 1 - row
    j = torch.arange(n_keys, device=seen.device)
    real = (j >= start) & (j < end)
    # queries after the last key are padding only if there are masked keys at their places
    legal = first + n_queries <= n_keys
    for i, rows in enumerate(seen.split(ROWS)):
        stand = first + i * ROWS + torch.arange(len(rows), device=seen.device)
        legal = legal and torch.equal(rows, real & (j <= stand[:, None]))
    if not legal:
        raise NotImplementedError(
            "attention_mask: sparse_attn serves causal attention with left or right padding; "
            "this mask is another (sliding window, packed sequences, or holes: without an "
            "attention_mask transformers hides every pad token of a prompt): use 'sdpa'"
        )
    return Span(slice(max(0, start - first), min(n_queries, end - first)), slice(start, end))

"""Reads the masks that transformers hands over: which tokens of a batch are real."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

ROWS = 128  # of a mask, read at once: a whole comparison would take several times its memory
HIDDEN = -1e4  # what an additive mask has at most where nothing is seen
KNOWN = WeakTensorKeyDictionary()  # masks in use and what was found in them: layers share a mask


class Span(NamedTuple):
    """The part of a padded sequence that is real: which queries, which keys.

    The keys are int64 [n] where a single query has others between them that it does not see. Where
    the last query is padding behind them, `last` are those that it sees: `generate` goes on with
    its output.
    """

    queries: slice
    keys: slice | torch.Tensor
    last: slice | None = None


def spans(
    mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, window: int | None = None
) -> list[Span]:
    """Finds the real part of each sequence of a causal mask [B, 1, Tq, Tk] with padding.

    With `window` the mask must also hide all but the last `window` keys up to each query. A single
    query may see any keys. Raises NotImplementedError for any other mask: packed sequences, one per
    head, a bias.
    """
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise NotImplementedError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected [B, 1, Tq, Tk]: "
            "sparse_attn takes no mask per head; use 'sdpa'"
        )
    if mask.is_inference():  # has no version: a change in place would not be noticed
        return find_spans(mask, query, key, window)
    state = (mask._version, query.shape[0], query.shape[2], key.shape[2], window)
    known = KNOWN.get(mask)
    if known is None or known[0] != state:
        known = KNOWN[mask] = (state, find_spans(mask, query, key, window))
    return known[1]


def find_spans(
    mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, window: int | None
) -> list[Span]:
    """Reads the mask: `spans` without the check of its shape and without what is known of it."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not torch.equal(seen, mask > HIDDEN):
        raise NotImplementedError("attention_mask: a bias on the scores is not served; use 'sdpa'")
    seen = seen[:, 0, :, : key.shape[2]].expand(query.shape[0], query.shape[2], -1)
    return [span(rows, window) for rows in seen]


def span(seen: torch.Tensor, window: int | None = None) -> Span:
    """Finds the real part of one sequence from what each query sees, bool [Tq, Tk]."""
    n_queries, n_keys = seen.shape
    valid = (seen[-1] if window is None else seen.any(0)).nonzero().flatten()
    if len(valid) == 0:  # a chunk of padding
        real, starts = slice(0, 0), [0]
    else:
        real = slice(int(valid[0]), int(valid[-1]) + 1)
        # where query 0 can stand: the first query that sees a key sees itself last, unless all are
        # padding after the last key; then the window tells, by the last that sees the first key
        row = int(seen[:, real].any(1).nonzero()[0])
        starts = [int(seen[row].nonzero()[-1]) - row]
        if window is not None:
            starts.append(real.start + window - 1 - int(seen[:, real.start].nonzero()[-1]))
    for first in starts:
        if is_causal(seen, real, first, window):
            queries = slice(max(0, real.start - first), min(n_queries, real.stop - first))
            return Span(queries, real, behind(real, first + n_queries, window))
    if n_queries == 1:  # a prompt padded on the right goes on behind its padding
        return Span(slice(0, 1), valid)
    raise NotImplementedError(
        "attention_mask: sparse_attn serves causal attention with left or right padding and the "
        "sliding windows that a model names; this mask is another (packed sequences, chunks, or "
        "holes: without an attention_mask transformers hides every pad token of a prompt): "
        "use 'sdpa'"
    )


def behind(real: slice, n_stands: int, window: int | None) -> slice | None:
    """The keys that a last query sees which stands behind all of them at n_stands - 1."""
    start = real.start if window is None else max(real.start, n_stands - window)
    return slice(start, real.stop) if n_stands > real.stop > start else None


def is_causal(seen: torch.Tensor, real: slice, first: int, window: int | None) -> bool:
    """Whether query i, standing at key `first` + i, sees the real keys up to there."""
    n_queries, n_keys = seen.shape
    # queries after the last key are padding only if there are masked keys at their places
    if first + n_queries > n_keys:
        return False
    j = torch.arange(n_keys, device=seen.device)
    inside = (j >= real.start) & (j < real.stop)
    for i, rows in enumerate(seen.split(ROWS)):
        stand = (first + i * ROWS + torch.arange(len(rows), device=seen.device))[:, None]
        want = inside & (j <= stand)
        if window is not None:
            want &= j > stand - window
        if not torch.equal(rows, want):
            return False
    return True

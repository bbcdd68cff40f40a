"""Squeezed Attention: preparing, and decoding against own dense decoding.

Its K-means beside other libraries': bench/quality/squeezed_kmeans.py.
"""

from __future__ import annotations

import torch

from sparse_attn import attention
from sparse_attn.squeezed.pages import moved

from ..harness import Report, check, time_in_turn
from ..squeezed_inputs import HEADS, KEPT, Prepared, prepared, realised, with_share

CONTEXT = 131072
ROUNDS = 10


def run(report: Report) -> None:
    case = prepared(CONTEXT)
    report.add(
        f"preparing {CONTEXT} keys x {HEADS} heads x 128, segments of 8192, seconds",
        case.seconds, gib_beyond_input=case.gib, iterations=ROUNDS,
        clusters=case.layer.centroids.shape[2],
    )  # fmt: skip
    for share in (KEPT, 0.3):
        decode(report, case, share)


def decode(report: Report, case: Prepared, share: float) -> None:
    """One token behind a long context, the lookup included."""
    query = case.queries[:, :, -1:]
    layer = with_share(case.layer, query, share)
    tail = [torch.cat([x, x[:, :, -16:]], 2) for x in (layer.window_key, layer.window_value)]
    key, value = (  # in pages as large as the context's
        moved(torch.cat([x, y], 2)) for x, y in zip((layer.key, layer.value), tail, strict=True)
    )
    out, _, tokens = layer.attention(query, *tail)
    want, *_ = layer.attention(query, *tail, backend="reference")
    check("squeezed decode", out, want, 1e-2)
    kept, run = realised(layer, query)
    target = torch.empty_like(key)
    seconds = time_in_turn(
        {
            "copy": lambda: target.copy_(key),
            "dense": lambda: attention(query, key, value, "dense"),
            "squeezed": lambda: layer.attention(query, *tail),
        },
        15,
    )
    dense_bytes = 2 * key.numel() * key.element_size()
    floor = (
        layer.centroids.nbytes + 2 * int(tokens.sum()) * 128 * 2 + 2 * tail[0].nbytes
    )  # what must be read, docs/methods/squeezed.md
    report.add(
        f"squeezed decode vs own dense, bfloat16, {HEADS} x {CONTEXT} x 128, kept {kept:.3f}",
        seconds["dense"] / seconds["squeezed"],
        ">= 6" if share == KEPT else "",
        limit_by_bytes=dense_bytes / floor,
        ms=seconds["squeezed"] * 1e3,
        dense_ms=seconds["dense"] * 1e3,
        gb_per_s=floor / seconds["squeezed"] / 1e9,
        dense_gb_per_s=dense_bytes / seconds["dense"] / 1e9,
        tokens_per_run=run,
        least_kept=tokens.min().item() / CONTEXT,
        most_kept=tokens.max().item() / CONTEXT,
    )

"""SALE on structured inputs: selection and end to end against the fastest dense kernel."""

from __future__ import annotations

import torch

from sparse_attn import BlockIndex, Sale, attention
from sparse_attn.ops.sale_select import op as select

from . import baselines
from .context import Context
from .flex_prefill import recall
from .timing import time_in_turn

THRESHOLD = 0.004


def run(context: Context) -> None:
    from ..inputs import gen  # needs numpy

    heads, key_heads = context.size((8, 2), (2, 1))
    for n in context.size((65536, 131072), (300,)):
        if not context.enough(8, f"SALE {n}"):
            return
        arrays = gen(7, n, "sharp", Hq=heads, Hkv=key_heads, D=context.size(128, 48))
        query, key, value = (
            torch.from_numpy(x).to(context.device, context.dtype).transpose(1, 2) for x in arrays
        )
        others = baselines.prefill(context, query, key, value)
        for backend in context.backends("sale_estimate"):
            one(context, others, backend, query, key, value)


def one(
    context: Context,
    others: dict,
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """One length on one backend; the indices chosen must serve the attention they are for."""
    n = key.shape[2]
    bar = torch.full((query.shape[1],), THRESHOLD, device=query.device)
    index = BlockIndex(*select(query, key, bar, backend=backend), 64, 32)
    index.validate(n, n)
    method = Sale(threshold=THRESHOLD, min_length=1)
    whole = lambda: attention(query, key, value, method, backend=backend, fallback=False)  # noqa: E731
    ours = baselines.checked(context, {"sale": whole}, query, key, value, index)
    ours["select"] = lambda: select(query, key, bar, backend=backend)
    seconds = time_in_turn(context, others | ours)
    best = min((seconds[name] for name in others if name in seconds), default=float("nan"))
    details = {"density": index.density(n, n), "recall": recall(query, key, index)}
    if "sale" in seconds:
        context.add(f"SALE {n}, {backend} vs dense", best / seconds["sale"], "x",
                    ms=seconds["sale"] * 1e3, dense_ms=best * 1e3, **details)  # fmt: skip
    context.add(f"SALE {n}, {backend}: selection / dense", seconds["select"] / best, "", "<= 0.20",
                ms=seconds["select"] * 1e3)  # fmt: skip

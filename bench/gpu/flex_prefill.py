"""FlexPrefill end to end on structured inputs against the fastest dense kernel, and its parts."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from sparse_attn import BlockIndex, attention
from sparse_attn.ops.flex_prefill_select import op as select

from . import baselines
from .context import Context
from .timing import time_in_turn

GOALS = {8192: ">= 1.0", 32768: ">= 4", 131072: ">= 10"}


def run(context: Context) -> None:
    from ..inputs import gen  # needs numpy

    heads, key_heads = context.size((8, 2), (2, 1))
    for n in context.size((8192, 32768, 131072), (300,)):
        if not context.enough(12, f"FlexPrefill {n}"):
            return
        arrays = gen(7, n, "sharp", Hq=heads, Hkv=key_heads, D=context.size(128, 48))
        query, key, value = (
            torch.from_numpy(x).to(context.device, context.dtype).transpose(1, 2) for x in arrays
        )
        others = baselines.prefill(context, query, key, value)
        official(context, others, query, key, value)
        for backend in context.backends("flex_prefill_select"):
            one(context, others, backend, query, key, value)


def official(
    context: Context, others: dict, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """The published code at its defaults, where installed; what it keeps is its own affair."""
    if find_spec("flex_prefill") is None:
        return
    published = import_module("flex_prefill").flex_prefill_attention
    states = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    run = {"official": lambda: published(*states, gamma=0.95, tau=0.1, min_budget=1024)}
    seconds = time_in_turn(context, others | run, 1.0)
    best = min((seconds[name] for name in others if name in seconds), default=float("nan"))
    if "official" in seconds:
        context.add(f"FlexPrefill {key.shape[2]}, published code vs dense",
                    best / seconds["official"], "x", ms=seconds["official"] * 1e3)  # fmt: skip


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
    indices, counts, pattern = select(query, key, backend=backend)
    index = BlockIndex(indices, counts, 128, 128)
    index.validate(n, n)
    whole = lambda: attention(  # noqa: E731
        query, key, value, "flex_prefill", backend=backend, fallback=False
    )
    ours = baselines.checked(context, {"flex": whole}, query, key, value, index)
    ours["select"] = lambda: select(query, key, backend=backend)
    seconds = time_in_turn(context, others | ours)
    best = min((seconds[name] for name in others if name in seconds), default=float("nan"))
    details = {
        "density": index.density(n, n), "recall": recall(query, key, index),
        "query_aware_heads": int(pattern.sum()), "dense_ms": best * 1e3,
    }  # fmt: skip
    if "flex" in seconds:
        context.add(
            f"FlexPrefill {n}, {backend} vs dense", best / seconds["flex"], "x", GOALS.get(n, ""),
            ms=seconds["flex"] * 1e3, **details,
        )  # fmt: skip
    context.add(
        f"FlexPrefill {n}, {backend}: selection / dense", seconds["select"] / best, "",
        "<= 0.03" if n == 131072 else "", us=seconds["select"] * 1e6,
    )  # fmt: skip


def recall(query: torch.Tensor, key: torch.Tensor, index: BlockIndex, samples: int = 32) -> float:
    """Mean share of the attention mass inside the chosen blocks, over sampled rows."""
    n, q_block, kv_block = key.shape[2], index.q_block, index.kv_block
    rows = torch.linspace(0, n - 1, samples, device=query.device).long().unique()
    position = torch.arange(n, device=query.device)
    kept = 0.0
    for h in range(query.shape[1]):
        keys = key[0, h * key.shape[1] // query.shape[1]].float()
        scores = query[0, h, rows].float() @ keys.T / query.shape[3] ** 0.5
        mass = scores.masked_fill(position > rows[:, None], -torch.inf).softmax(-1)
        lists = index.indices[0, h, rows // q_block].long()
        listed = torch.arange(lists.shape[1], device=lists.device) < index.counts[
            0, h, rows // q_block
        ].unsqueeze(1)
        chosen = torch.zeros(len(rows), -(-n // kv_block), dtype=torch.bool, device=lists.device)
        chosen.scatter_(1, lists * listed, listed)
        chosen[:, 0] |= (listed & (lists == 0)).any(1)
        kept += (mass * chosen[:, position // kv_block]).sum(-1).mean().item()
    return kept / query.shape[1]

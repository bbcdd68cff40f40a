"""block_sparse_attention: dense and sparse prefill, the sweep over lengths, decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import sparse_attn
from sparse_attn import BlockIndex

from . import baselines
from .cases import causal_flops, random_index, tensors
from .context import Context
from .timing import time_in_turn

OPERATOR = "block_sparse_attention"


def own(
    context: Context,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex | None = None,
) -> dict[str, Callable[[], Any]]:
    """Ours on every backend, over an index or everything; only those with the right result."""
    method = None if index is not None else "dense"

    def call(backend: str) -> Callable[[], Any]:
        return lambda: sparse_attn.attention(
            query, key, value, method, index=index, backend=backend
        )

    found = {f"own {name}": call(name) for name in context.backends(OPERATOR)}
    return baselines.checked(context, found, query, key, value, index)


def dense(context: Context) -> None:
    """Own dense against the fastest dense kernel here."""
    heads = context.size(16, 2)
    for n in context.size((16384, 32768), (200,)):
        query, key, value = tensors(context, n, n, heads, heads)
        others = baselines.prefill(context, query, key, value)
        if context.enough(18, "FlexAttention, dense"):
            everything = BlockIndex.full(n, n, device=context.device)
            if not context.dry:
                run = {"flex compiled": baselines.flex(query, key, value, everything)}
                others |= baselines.checked(context, run, query, key, value)
        seconds = time_in_turn(context, others | own(context, query, key, value))
        best = min((seconds[name] for name in others if name in seconds), default=float("nan"))
        for name, t in seconds.items():
            rate = causal_flops(n, heads, query.shape[3]) / t / 1e12
            goal = ">= 600" if name.startswith("own") and n == 16384 else ""
            context.add(f"dense {n}, {name}", rate, "TFLOP/s", goal, ms=t * 1e3)
        for name in set(seconds) - set(others):
            context.add(f"dense {n}, {name} / fastest", seconds[name] / best, "x", "<= 1.05")


def sparse(context: Context) -> None:
    """How close to proportional the time is at 32k, blocks of 128 at random."""
    n, heads = context.size(32768, 300), context.size(16, 2)
    query, key, value = tensors(context, n, n, heads, heads)
    others = baselines.prefill(context, query, key, value)
    for density, goal in ((0.5, ">= 0.90"), (0.25, ">= 0.85"), (0.1, ">= 0.80")):
        index, share = random_index(n, heads, density, context.device)
        ours = own(context, query, key, value, index)
        if not context.dry and context.enough(12, f"FlexAttention, density {density}"):
            run = {"flex compiled": baselines.flex(query, key, value, index)}
            ours |= baselines.checked(context, run, query, key, value, index)
        seconds = time_in_turn(context, others | ours)
        best = min((seconds[name] for name in others if name in seconds), default=float("nan"))
        for name in set(seconds) - set(others):
            t = seconds[name]
            is_own = name.startswith("own")
            context.add(
                f"e({density}) at {n}, {name}", share * best / t, "", goal if is_own else "",
                ms=t * 1e3, dense_ms=best * 1e3, density=share,
            )  # fmt: skip
            rate = share * causal_flops(n, heads, query.shape[3]) / t / 1e12
            context.add(f"rate at {density}, {name}", rate, "TFLOP/s", "> 550" if is_own else "")


def sweep(context: Context) -> None:
    """Speed-up over the fastest dense kernel, by length and density."""
    heads = context.size(16, 2)
    for n in context.size((8192, 16384, 65536, 131072), (150,)):
        if not context.enough(3, f"sweep {n}"):
            return
        query, key, value = tensors(context, n, n, heads, heads)
        others = baselines.prefill(context, query, key, value)
        best = min(time_in_turn(context, others, 1.0).values(), default=float("nan"))
        for density in context.size((0.5, 0.25, 0.1, 0.05), (0.5,)):
            index, share = random_index(n, heads, density, context.device)
            seconds = time_in_turn(context, own(context, query, key, value, index), 0.5)
            for name, t in seconds.items():
                context.add(
                    f"{n} at {density}, {name} vs dense", best / t, "x",
                    density=share, e=share * best / t, ms=t * 1e3,
                )  # fmt: skip


def decode(context: Context) -> None:
    """One query against a long cache: bytes per second beside a copy's, dense and a tenth."""
    n, heads, key_heads = context.size((65536, 32, 8), (300, 4, 2))
    for batch in context.size((1, 8), (1,)):
        query, key, value = tensors(context, 1, n, heads, key_heads, batch)
        size = 2 * key.numel() * key.element_size()
        copy = torch.empty_like(key)
        alternatives: dict[str, Callable[[], Any]] = {"copy": lambda: copy.copy_(key)}  # noqa: B023
        sdpa = {"sdpa": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True)}  # noqa: B023
        alternatives |= baselines.checked(context, sdpa, query, key, value)
        alternatives |= own(context, query, key, value)
        blocks = -(-n // 64)
        mask = torch.rand(batch, key_heads, 1, blocks, device=context.device) < 0.1
        mask[..., 0] = True
        index = BlockIndex.from_mask(mask, 1, 64, blocks)
        listed = index.density(1, n)
        tenth = own(context, query, key, value, index)
        alternatives |= {"tenth" + name.removeprefix("own"): run for name, run in tenth.items()}
        seconds = time_in_turn(context, alternatives, 1.0)
        copied = size / seconds["copy"]  # half the tensors' bytes, read and written
        for name, t in seconds.items():
            if name == "copy":
                context.add(f"copy, batch {batch}", copied / 1e12, "TB/s")
            elif name.startswith("tenth"):
                context.add(
                    f"decode {n}, batch {batch}, a tenth, {name[6:]}: speed-up over own dense",
                    seconds.get(f"own {name[6:]}", float("nan")) / t, "x", us=t * 1e6,
                    density=listed,
                )  # fmt: skip
            else:
                context.add(f"decode {n}, batch {batch}, {name}: share of a copy's bandwidth",
                            size / t / copied, "", us=t * 1e6)  # fmt: skip

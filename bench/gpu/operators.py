"""Each operator on each GPU backend at a size of its own, CUDA beside Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparse_attn import BlockIndex
from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.block_sparse_attention_backward import op as gradient
from sparse_attn.ops.flex_prefill_select import op as select
from sparse_attn.ops.merge_attention_states import op as merge
from sparse_attn.ops.sale_estimate import op as estimate
from sparse_attn.ops.sale_quantize import op as quantize
from sparse_attn.ops.sale_threshold import op as bar
from sparse_attn.registry import Op

from .baselines import TOLERANCE
from .cases import random_index, rows_error, tensors
from .check import apart
from .context import Context
from .timing import time_in_turn


def run(context: Context) -> None:
    n, heads, key_heads = context.size((16384, 16, 4), (140, 2, 1))
    query, key, value = tensors(context, n, n, heads, key_heads)
    few = torch.randn(1, heads, n, device=context.device)
    states = (query, few, query * 2, few + 1)
    exact = merge(*(x.double() for x in states), backend="reference")
    compare(context, f"merge {heads} x {n}", merge, states, lambda out, _: apart(
        out, exact[0], 1e-2))  # fmt: skip
    compare(context, f"select {heads} x {n}", select, (query, key), lambda indices, counts, _:
            BlockIndex(indices, counts, 128, 128).validate(n, n))  # fmt: skip
    index, _ = random_index(n, heads, 0.25, context.device)
    attention(context, f"prefill {n}, a quarter", query, key, value, index)
    small, _ = random_index(n, key_heads, 0.02, context.device, context.size(16, 64))
    attention(context, f"prefill {n}, blocks of {small.q_block}", query, key, value, small)
    none = BlockIndex(index.indices[..., :0], index.counts * 0, 128, 128)
    attention(context, f"prefill {n}, window 4096", query, key, value, none, 4, 4096)
    last = [x[:, :key_heads, -1:].contiguous() for x in index[:2]]
    attention(context, f"decode {n}, a quarter", query[:, :, -1:], key, value,
              BlockIndex(*last, 128, 128))  # fmt: skip
    sale(context, n, query, key)
    half = n // 2
    query, key, value = tensors(context, half, half, heads, key_heads)
    index, _ = random_index(half, heads, 0.25, context.device)
    backward(context, f"backward {half}, a quarter", query, key, value, *index.blocks)
    backward(
        context, f"backward {half}, sink+window", query, key, value, *index.blocks, True, 4, 512
    )


def attention(
    context: Context,
    what: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: BlockIndex,
    sink: int = 0,
    window: int = 0,
) -> None:
    def wrong(out: torch.Tensor, lse: torch.Tensor) -> str | None:
        error = rows_error(query, key, value, out, index, sink, window)
        return None if error <= TOLERANCE else f"relative error {error:.3g}"

    compare(context, what, attend, (query, key, value, *index.blocks, True, sink, window), wrong)


def sale(context: Context, n: int, query: torch.Tensor, key: torch.Tensor) -> None:
    """The three steps of SALE's selection; what they give is compared between the backends."""
    right: dict[str, Any] = {}

    def same(what: str) -> Callable[..., str | None]:
        def wrong(*results: torch.Tensor) -> str | None:
            first = right.setdefault(what, results)
            if what == "bar":
                return apart(results[0], first[0].double(), 1e-4)
            same = all(torch.equal(x, y) for x, y in zip(results, first, strict=True))
            return None if same else "the backends differ"

        return wrong

    means = [x.float().mean(2) for x in (query, key)]
    compare(context, f"sale quantize {n}", quantize, (query, means[0]), same("codes"))
    codes, steps, _ = quantize(query, means[0])
    keys, key_steps, _ = quantize(key, means[1], "key")
    threshold = torch.full((query.shape[1],), 0.004, device=context.device)
    compare(context, f"sale threshold {n}", bar, (query, key, means[1], threshold), same("bar"))
    theta = bar(query, key, means[1], threshold)
    bias = torch.zeros_like(theta)
    compare(context, f"sale estimate {n}", estimate, (codes, steps, keys, key_steps, bias, theta),
            same("lists"))  # fmt: skip


def backward(context: Context, what: str, *args: Any) -> None:
    out, lse = attend(*args, backend="reference")
    args = (torch.randn_like(out), None, *args[:3], out, lse, *args[3:])
    exact = gradient(*args, backend="reference")  # in float32

    def wrong(*grads: torch.Tensor) -> str | None:
        found = (apart(x, y.double(), TOLERANCE) for x, y in zip(grads, exact, strict=True))
        return next(filter(None, found), None)

    compare(context, what, gradient, args, wrong)


def compare(
    context: Context, what: str, op: Op, args: tuple[Any, ...], wrong: Callable[..., str | None]
) -> None:
    """Microseconds per backend whose result is right; with two backends also their ratio."""
    ready = {}
    for name in context.backends(op.name):
        run = lambda name=name: op(*args, backend=name)  # noqa: E731
        try:
            results = run()
            problem = wrong(*((results,) if isinstance(results, torch.Tensor) else results))
        except Exception as error:
            context.failed(f"{what}, {name}", error)
            continue
        if problem is None:
            ready[name] = run
        else:
            context.failed(f"{what}, {name}", problem)
    seconds = time_in_turn(context, ready, 0.5)
    for name, t in seconds.items():
        context.add(f"{what}, {name}", t * 1e6, "us")
    if {"cuda", "triton"} <= seconds.keys():
        context.add(f"{what}: triton / cuda", seconds["triton"] / seconds["cuda"], "x")

"""Each operator on each GPU backend at a size of its own, CUDA beside Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sparse_attn.registry import Op

from .cases import tensors
from .context import Context
from .timing import time_in_turn


class Sizes(NamedTuple):
    """The inputs of most operators."""

    n: int
    heads: int
    key_heads: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def run(context: Context) -> None:
    from ..cases import all_of

    n, heads, key_heads = context.size((16384, 16, 4), (140, 2, 1))
    sizes = Sizes(n, heads, key_heads, *tensors(context, n, n, heads, key_heads))
    for timed in all_of("timed"):
        timed(context, sizes)


def alike() -> Callable[..., str | None]:
    """Judges results by those of the backend that ran first."""
    first: list[tuple[torch.Tensor, ...]] = []

    def wrong(*results: torch.Tensor) -> str | None:
        first.append(results)
        same = all(torch.equal(x, y) for x, y in zip(results, first[0], strict=True))
        return None if same else "the backends differ"

    return wrong


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

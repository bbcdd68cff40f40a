"""Times alternatives in turn on the GPU: events, a flushed L2 cache, the median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .context import Context

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU


def time_in_turn(
    context: Context, alternatives: dict[str, Callable[[], Any]], seconds: float = 3.0
) -> dict[str, float]:
    """Median seconds of each; those that fail are reported and left out.

    Each runs twice before (not in a dry run), so that compilation and clocks are behind all of
    them; then rounds of one run each, as many as fit into `seconds`, 3 to 30.
    """
    ready: dict[str, Callable[[], Any]] = {}
    once = 0.0
    for name, run in alternatives.items():
        if context.dry:
            ready[name] = run
            continue
        try:
            run()
            start = _now(context)
            run()
            once += _now(context) - start
            ready[name] = run
        except Exception as error:  # another alternative may still be measured
            context.failed(name, error)
    rounds = 1 if context.dry else max(3, min(30, int(seconds / max(once, 1e-6))))
    flush = None if context.dry else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    measured: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, run in ready.items():
            measured[name].append(_one(run, flush))
    return {name: statistics.median(values) for name, values in measured.items()}


def _now(context: Context) -> float:
    if not context.dry:
        torch.cuda.synchronize()
    return time.perf_counter()


def _one(run: Callable[[], Any], flush: torch.Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3

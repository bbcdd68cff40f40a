"""Attention functions of transformers that measure themselves: for the demo and `evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from . import api
from .integrations.transformers import register_function

BASELINE = "sdpa"


class Probe:
    """An attention function that times itself and, when asked, records densities and inputs.

    `config` is the method, `layers` the methods of single layers; None for the baseline.
    """

    def __init__(
        self, config: Any, layers: Mapping[int, Any] | None = None, fallback: bool = True
    ) -> None:
        self.config = config
        self.layers = layers or {}
        self.may_fall_back = fallback
        self.seconds = 0.0
        self.densities: list[float] = []
        self.fallback: str | None = None
        self.recorded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.record = False

    def __call__(self, query, key, value, layer: int | None, **kwargs: Any):
        config = self.layers.get(layer, self.config)
        options = {"fallback": self.may_fall_back, "return_stats": self.record, **kwargs}
        start = clock(query)
        result = api.attention(query, key, value, config, **options)
        self.seconds += clock(query) - start
        if not self.record:
            return result
        out, stats = result
        self.densities.append(stats.density)
        self.fallback = stats.fallback
        self.recorded.append((query, key))
        return out


def clock(x: torch.Tensor) -> float:
    """Seconds, after everything before has been computed."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def register_probe(probe: Probe, name: str) -> None:
    """Registers a probe, or the baseline timed in the same way where it has no method.

    A model that lacks one of the probe's layers raises ValueError in its first call.
    """
    if probe.config is not None:
        register_function(probe, name, max(probe.layers, default=-1))
        return
    AttentionInterface.register(name, timed_baseline(probe))
    AttentionMaskInterface.register(name, sdpa_mask)


def timed_baseline(probe: Probe) -> Callable[..., Any]:
    """Transformers' own `sdpa`, timed in the same way."""
    sdpa = AttentionInterface()[BASELINE]

    def forward(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = clock(query)
        result = sdpa(module, query, *args, **kwargs)
        probe.seconds += clock(query) - start
        return result

    return forward

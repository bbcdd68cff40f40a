"""Attention functions of transformers that measure themselves: for the demo and `evaluate`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from . import api
from .integrations.transformers import register_function
from .methods.dense import Dense

BASELINE = "sdpa"


class Probe:
    """An attention function that, when asked, records densities and inputs.

    `config` is the method, `layers` the methods of single layers; None for the baseline. `seconds`
    is the time of all attention of the model, sliding windows included, once it is registered.
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
        if query.shape[2] == 1 and not getattr(config, "takes_cache", False):
            config = Dense()  # it chooses for prompts; `register` decodes densely too
        options = {"fallback": self.may_fall_back, "return_stats": self.record, **kwargs}
        result = api.attention(query, key, value, config, **options)
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
    register_timed(probe, name, BASELINE if probe.config is None else name)


def register_timed(probe: Probe, name: str, implementation: str) -> None:
    """Registers an attention implementation of transformers once more, timed by the probe."""
    attend = AttentionInterface()[implementation]

    def forward(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = clock(query)
        result = attend(module, query, *args, **kwargs)
        probe.seconds += clock(query) - start
        return result

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[implementation])

"""Caches of all of a prompt but its tail, which the model is given over them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from ..integrations.squeezed import SqueezedCache, cache_argument, prepare
from ..probe import BASELINE
from ..squeezed import SqueezedContext
from ..squeezed.context import Parameters

NewCache = Callable[[], Any]  # makes the same cache anew, so that a run leaves nothing in it


def dense_cache(model: Any, ids: torch.Tensor) -> NewCache:
    """A cache of ids [1, T], as dense attention fills it. The model is left switched to that."""
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation(BASELINE)
    model(input_ids=ids, logits_to_keep=1, **{cache_argument(model): cache})
    return lambda: copy.deepcopy(cache)


def context(model: Any, ids: torch.Tensor, parameters: Parameters) -> SqueezedContext:
    """A prepared context of ids [1, T]; NotImplementedError where there can be none."""
    try:
        return prepare(model, ids, progress=False, **vars(parameters))
    except ValueError as error:  # too short, or too many clusters
        raise NotImplementedError(str(error)) from error


def context_cache(model: Any, ids: torch.Tensor, parameters: Parameters) -> NewCache:
    """A cache that begins with a prepared context of ids [1, T]; it switches the model to that."""
    cache = SqueezedCache(context(model, ids, parameters), model)
    return lambda: copy.deepcopy(cache)


def last_logits(model: Any, ids: torch.Tensor, keep: int, cache: Any = None) -> torch.Tensor:
    """Logits of the last `keep` of the tokens ids [1, T] behind a cache, [keep, vocabulary]."""
    given = {"use_cache": False} if cache is None else {cache_argument(model): cache}
    return model(input_ids=ids, logits_to_keep=keep, **given).logits[0]

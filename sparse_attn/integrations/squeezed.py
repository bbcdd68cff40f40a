"""Squeezed Attention for Hugging Face models: prepare a context, generate behind it.

context = prepare(model, ids)
cache = SqueezedCache(context, model)
model.generate(ids_and_question, past_key_values=cache)
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import api
from ..ops import _checks as check
from ..squeezed import SqueezedContext, SqueezedLayer
from ..squeezed.build import build_layers
from ..squeezed.context import Parameters
from .squeezed_model import (
    cache_argument,
    check_model,
    check_served,
    decoder,
    fingerprint,
    no_mask,
    switch,
    switched,
)
from .transformers import refuse

NAME = "sparse_attn_squeezed"  # the attention implementation that a SqueezedCache needs
PREPARE = "sparse_attn_prepare"
ROOM = 256  # tokens that a tail has room for beyond what is known to come


class Kept(NamedTuple):
    """Share of the clustered keys that one layer attended to, realised; None if not called so.

    Attributes:
        prefill: mean over heads, of calls with several tokens, weighted by tokens.
        decode: mean over heads and steps.
        per_head: the last call, mean over the batch.
    """

    prefill: float | None
    decode: float | None
    per_head: list[float]


class Tail(torch.Tensor):
    """The keys of a tail, as the model gets them: only `forward` may attend to them.

    Any other attention function would attend to the tail alone, as if there were no context: each
    of its operations raises, whatever it is called. What it may read is the shape and the like.
    """

    layer: TailLayer

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in READABLE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotImplementedError(
            f"a SqueezedCache holds a prepared context, to which only the attention implementation "
            f"{NAME!r} attends, but the model calls another: set it with "
            f"model.set_attn_implementation({NAME!r}), or go on without the cache"
        )


READABLE = {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")}


class TailLayer(CacheLayerMixin):
    """One layer of a `SqueezedCache`: the window, the input and what was generated.

    The tail lies in a buffer that doubles when it is full, so that a token costs no copy of it.
    """

    is_sliding = False
    is_compileable = False
    # assisted decoding, which asks, gives its first call the ids of the context too
    is_croppable = False

    def __init__(self, layer: SqueezedLayer) -> None:
        super().__init__()
        self.context = layer
        self.clear()

    def clear(self) -> None:
        self.length = self.context.window_key.shape[2]
        self.is_initialized = False
        self.keys = self.values = None
        self.tokens: torch.Tensor | None = None
        self.sums: dict[str, tuple[torch.Tensor, int] | None] = {"prefill": None, "decode": None}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        mine = self.context.window_key
        if (mine.dtype, mine.device) != (self.dtype, self.device):
            raise ValueError(
                f"the context is {mine.dtype} on {mine.device}, the model {self.dtype} on "
                f"{self.device}: prepare it with this model, or move it with context.to(device)"
            )
        self.is_initialized = True
        windows = (self.context.window_key, self.context.window_value)
        grown = [
            self._grow(x.expand(key_states.shape[0], -1, -1, -1), key_states.shape[2])
            for x in windows
        ]
        self.keys, self.values = grown

    def _grow(self, x: torch.Tensor, more: int) -> torch.Tensor:
        room = max(2 * self.length, self.length + more + ROOM)
        new = x.new_empty((*x.shape[:2], room, x.shape[3]))
        new[:, :, : self.length] = x[:, :, : self.length]
        return new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self.keys, self.values = (
                self._grow(x, key_states.shape[2]) for x in (self.keys, self.values)
            )
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        keys = self.keys[:, :, :end].as_subclass(Tail)
        keys.layer = self  # how the attention function, which sees no cache, finds the context
        return keys, self.values[:, :, :end]

    def record(self, tokens: torch.Tensor, n_queries: int) -> None:
        """Adds up on the device what was kept; nothing is read by the host."""
        self.tokens = tokens
        kind, weight = ("decode", 1) if n_queries == 1 else ("prefill", n_queries)
        before = self.sums[kind]
        total = tokens.double().mean() * weight
        self.sums[kind] = (total, weight) if before is None else (
            before[0] + total, before[1] + weight,
        )  # fmt: skip

    def kept(self) -> Kept:
        n = self.context.key.shape[2]
        means = {
            kind: None if x is None else (x[0] / (x[1] * n)).item() for kind, x in self.sums.items()
        }
        heads = [] if self.tokens is None else (self.tokens.double().mean(0) / n).tolist()
        return Kept(**means, per_head=heads)

    def get_seq_length(self) -> int:
        return self.context.key.shape[2] + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if query_length == 0:
            raise ValueError(
                f"input_ids: no token follows the {self.get_seq_length()} that the cache holds: "
                "generate wants the ids of the context too, in front of the question "
                "(torch.cat([context_ids, question_ids], 1)), and skips what the cache holds"
            )
        # the whole context is the offset: before anything is appended both lengths are equal
        window = self.context.window_key.shape[2]
        return self.length - window + query_length, self.context.key.shape[2] + window

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens; their number is given as a negative one, as transformers does.

        Raises ValueError for a positive number, or if it reaches into the prepared context.
        """
        new = self.length + tokens_to_remove
        if tokens_to_remove > 0 or new < self.context.window_key.shape[2]:
            raise ValueError(
                f"crop: got {tokens_to_remove}, expected 0 or minus up to "
                f"{self.length - self.context.window_key.shape[2]} tokens: a prepared context "
                "cannot be cropped, only what follows it"
            )
        self.length = new

    def reset(self) -> None:
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> TailLayer:
        """Copies the tail; the context, which nobody writes to, is shared."""
        new = copy.copy(self)
        for name in ("keys", "values", "sums"):
            setattr(new, name, copy.deepcopy(getattr(self, name), memo))
        return new

    def _pick(self, index: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys = self.keys.index_select(0, index.to(self.keys.device))
            self.values = self.values.index_select(0, index.to(self.values.device))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._pick(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, 0)
            self.values = self.values.repeat_interleave(repeats, 0)


class SqueezedCache(Cache):
    """A cache that begins with a prepared context, which every sequence of the batch shares.

    Positions go on behind the context. `generate` wants the ids of the context too, in front of
    the input, and skips them unread: `cache.check_ids(ids)` before it says whether they are the
    context's. Sequences of a batch must be equally long: padding is refused.

    No other attention implementation attends to the context, and none gets so far: with another
    one the model raises NotImplementedError. `copy.deepcopy` shares the context. Assisted decoding
    is refused by transformers.

    Args:
        context: prepared by the same model, on its device.
        model: is set to the attention implementation that this cache needs, and checked:
            `check_model`. Of a model with several parts only what reads text is set.

    Raises:
        ValueError: the context does not fit the model, or another model prepared it.
        NotImplementedError: the model is not served.
    """

    def __init__(self, context: SqueezedContext, model: torch.nn.Module) -> None:
        check_model(context, model)
        register()
        switch(model, NAME)
        self.context = context
        super().__init__(layers=[TailLayer(layer) for layer in context.layers])

    def __deepcopy__(self, memo: dict[int, Any]) -> SqueezedCache:
        """A cache of its own behind the same context: for several questions after one prefix."""
        new = copy.copy(self)
        new.layers = copy.deepcopy(self.layers, memo)
        return new

    def check_ids(self, ids: torch.Tensor) -> None:
        """Raises ValueError unless every row of ids [B, T] begins with the context's tokens."""
        tokens = self.context.tokens
        if tokens is None:
            raise ValueError("the context holds no tokens to compare with")
        n = len(tokens)
        if ids.shape[1] <= n or not bool((ids[:, :n] == tokens.to(ids.device)).all()):
            raise ValueError(f"ids do not begin with the {n} tokens of the prepared context")

    def kept(self) -> list[Kept]:
        """Per layer the share of the clustered keys attended to; reads the device."""
        return [layer.kept() for layer in self.layers]


def register() -> None:
    """Makes the attention implementation known that `SqueezedCache` needs."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, no_mask)


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of a model whose cache is a `SqueezedCache`."""
    refuse(dropout=dropout or None, **kwargs)
    if not isinstance(key, Tail):
        raise NotImplementedError(
            f"attention implementation {NAME!r} serves calls with a SqueezedCache; for others call "
            "model.set_attn_implementation with another name"
        )
    if attention_mask is not None:
        raise NotImplementedError(f"attention_mask: {NAME!r} takes no 4D mask")
    tail, length = key.layer, key.shape[2]
    layer = tail.context
    if not layer.has_scale(scaling):
        raise NotImplementedError(
            f"scaling: got {scaling}, the context was prepared with {layer.own_scale}"
        )
    out, _, tokens = layer.attention(query, tail.keys[:, :, :length], value)
    tail.record(tokens, query.shape[2])
    return out.transpose(1, 2).contiguous(), None


class Calibration:
    """The dense attention of `prepare`: keeps the last queries of each layer and their scale."""

    def __init__(self, n_layers: int, window: int, scale: float | None) -> None:
        self.window, self.scale = window, scale
        self.queries: list[torch.Tensor | None] = [None] * n_layers
        self.shapes: list[Any] = [None] * n_layers
        self.scales: list[float] = []

    def __call__(  # type: ignore[no-untyped-def]
        self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None,
        **kwargs,
    ):  # fmt: skip
        refuse(dropout=dropout or None, **kwargs)
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise NotImplementedError("is_causal: got False, a context serves causal attention")
        i = module.layer_idx
        before, last = self.queries[i], query[:, :, -self.window :]
        last = last if before is None else torch.cat([before, last], 2)[:, :, -self.window :]
        self.queries[i], self.shapes[i] = last.clone(), (key.shape, value.shape)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        for other in [x for x in (*self.scales[:1], self.scale) if x is not None]:
            if abs(scale - other) > 1e-6 * abs(other):
                raise NotImplementedError(
                    f"scale: layer {i} multiplies its scores by {scale}, "
                    f"{'an earlier layer' if self.scales else 'the argument'} by {other}: a "
                    "context has one scale"
                )
        self.scales.append(scale)
        out = api.attention(query, key, value, "dense", scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    def start(self, cache: DynamicCache) -> None:
        """After a trial over a few tokens: checks what the layers did, and forgets it.

        Raises NotImplementedError where a layer does not attend, or does not cache its keys.
        """
        for i, shapes in enumerate(self.shapes):
            layer = cache.layers[i] if i < len(cache.layers) else None
            cached = [getattr(getattr(layer, x, None), "shape", None) for x in ("keys", "values")]
            if shapes is None or cached != list(shapes):
                what = "does not cache the keys and values that it attends to"
                if shapes is None:
                    what = "calls no attention function"
                raise NotImplementedError(
                    f"layer {i} of the model {what}: Squeezed Attention serves models whose layers "
                    "all attend to the whole text, through transformers' AttentionInterface"
                )
        self.queries = [None] * len(self.queries)


@torch.no_grad()
def prepare(
    model: torch.nn.Module,
    ids: torch.Tensor,
    /,
    *,
    chunk: int = 4096,
    progress: bool = True,
    **parameters: Any,
) -> SqueezedContext:
    """Runs the model over a context with dense attention and clusters its keys.

    Keys and values of the whole context are held, then sorted layer by layer, each layer's
    originals let go as soon as it is done. The model's attention implementations are as before.

    Args:
        model: a causal language model with rotary or no positions, for example Llama.
        ids: int64 [S] or [1, S]: one context.
        chunk: tokens per forward call.
        progress: show a bar.
        parameters: fields of `sparse_attn.squeezed.context.Parameters`; `model` is the name of
            the model's folder where none is given.

    Raises:
        ValueError, TypeError: an argument is not legal, said before the model runs.
        NotImplementedError: the layers scale their scores differently, or not by `scale`, or the
            model is not served, said after two tokens at the latest.
    """
    chosen = Parameters(**{"model": Path(model.config.name_or_path).name, **parameters})
    check.integer("chunk", chunk)
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected 1 or more")
    if ids.dim() not in (1, 2) or ids.dim() == 2 and ids.shape[0] != 1:
        raise ValueError(
            f"ids: got shape {list(ids.shape)}, expected [S] or [1, S]: a context is one text, "
            "which every sequence of a batch then shares"
        )
    ids = ids.reshape(1, -1).to(model.device)
    if ids.shape[1] <= chosen.window:
        raise ValueError(
            f"ids: {ids.shape[1]} tokens, expected more than window, {chosen.window}: a context so "
            "short needs no clusters"
        )
    check_served(model)
    config = model.config.get_text_config()
    calibration = Calibration(config.num_hidden_layers, chosen.window, chosen.scale)
    AttentionInterface.register(PREPARE, calibration)
    AttentionMaskInterface.register(PREPARE, no_mask)
    try:
        with switched(model, PREPARE):
            calibration.start(run(model, ids[:, :2], chunk))
            cache = run(model, ids, chunk)
    finally:
        AttentionInterface.register(PREPARE, forward)  # lets go of the queries
    scale, usual = calibration.scales[0], cache.layers[0].keys.shape[3] ** -0.5
    if abs(scale - usual) > 1e-6 * usual:
        chosen = replace(chosen, scale=scale)
    keys, values = [x.keys for x in cache.layers], [x.values for x in cache.layers]
    del cache  # so that the lists alone hold a layer
    layers = build_layers(keys, values, calibration.queries, chosen, progress, release=True)
    return SqueezedContext(layers, chosen, ids[0].cpu(), fingerprint(model)).calibrated()


def run(model: torch.nn.Module, ids: torch.Tensor, chunk: int) -> DynamicCache:
    """The cache of ids [1, T] after the model has read them, in chunks."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(chunk, dim=1):
        decoder(model)(input_ids=part, use_cache=True, **{cache_argument(model): cache})
    return cache

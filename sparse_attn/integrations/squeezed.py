"""Squeezed Attention for Hugging Face models: prepare a context, generate behind it.

context = prepare(model, ids)
cache = SqueezedCache(context, model)
model.generate(ids_and_question, past_key_values=cache)
"""

from __future__ import annotations

import inspect
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import api
from ..ops import _checks as check
from ..squeezed import SqueezedContext, SqueezedLayer
from ..squeezed.context import Parameters
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


class TailLayer(CacheLayerMixin):
    """One layer of a `SqueezedCache`: the window, the input and what was generated.

    The tail lies in a buffer that doubles when it is full, so that a token costs no copy of it.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

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
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        keys.squeezed = self  # how the attention function, which sees no cache, finds the context
        return keys, values

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

    Args:
        context: prepared by the same model, on its device.
        model: is set to the attention implementation that this cache needs, and checked:
            `check_model`.

    Raises:
        ValueError: the context does not fit the model, or another model prepared it.
    """

    def __init__(self, context: SqueezedContext, model: torch.nn.Module | None = None) -> None:
        if model is not None:
            check_model(context, model)
            register()
            model.set_attn_implementation(NAME)
        self.context = context
        super().__init__(layers=[TailLayer(layer) for layer in context.layers])

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


def check_model(context: SqueezedContext, model: torch.nn.Module) -> None:
    """Raises ValueError unless the context fits the model, and this model has prepared it.

    Compared are layers, heads and sizes, then the `fingerprint` where the context holds one.
    """
    config, layer = model.config.get_text_config(), context.layers[0]
    heads = config.num_attention_heads
    wanted = {
        "layers": (config.num_hidden_layers, len(context.layers)),
        "KV heads": (getattr(config, "num_key_value_heads", None) or heads, layer.key.shape[1]),
        "head_dim": (getattr(config, "head_dim", None) or config.hidden_size // heads,
                     layer.key.shape[3]),
    }  # fmt: skip
    if not layer.shared:
        wanted["query heads"] = (heads, layer.scores.shape[0])
    for name, (model_has, context_has) in wanted.items():
        if model_has != context_has:
            raise ValueError(
                f"the context has {context_has} {name}, the model {model_has}: prepare the context "
                "with this model"
            )
    if context.fingerprint not in (None, fingerprint(model)):
        raise ValueError(
            f"the context was prepared by another model (named {context.parameters.model!r}): its "
            "configuration or its weights differ from this one's; prepare the context with this "
            "model"
        )


def fingerprint(model: torch.nn.Module) -> str:
    """Of what keys depend on: the shape and rotation in its config, rows of its last matrix.

    The same in float32 and bfloat16, on any device, and after saving and loading.
    """
    config = model.config.get_text_config()
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rope_parameters")  # fmt: skip
    told = json.dumps({n: getattr(config, n, None) for n in names}, sort_keys=True, default=str)
    parts = [zlib.crc32(told.encode())]
    matrices = [p for p in decoder(model).parameters() if p.dim() == 2 and not p.is_meta]
    if matrices:
        rows = matrices[-1][:256].detach().to(torch.bfloat16).cpu().contiguous()
        parts.append(zlib.crc32(memoryview(rows.view(torch.uint8).flatten().numpy())))
    return "-".join(f"{x:08x}" for x in parts)


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
    tail: TailLayer | None = getattr(key, "squeezed", None)
    if tail is None:
        raise NotImplementedError(
            f"attention implementation {NAME!r} serves calls with a SqueezedCache; for others call "
            "model.set_attn_implementation with another name"
        )
    if attention_mask is not None:
        raise NotImplementedError(f"attention_mask: {NAME!r} takes no 4D mask")
    layer = tail.context
    if not layer.has_scale(scaling):
        raise NotImplementedError(
            f"scaling: got {scaling}, the context was prepared with {layer.own_scale}"
        )
    out, _, tokens = layer.attention(query, key, value)
    tail.record(tokens, query.shape[2])
    return out.transpose(1, 2).contiguous(), None


def no_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any,
    attention_mask: torch.Tensor | None = None, local_size: int | None = None, **kwargs: Any,
) -> None:  # fmt: skip
    """No mask is needed: the input is causal behind the context. Refuses what would need one."""
    if local_size is not None:
        raise NotImplementedError("a sliding window: Squeezed Attention attends to the whole text")
    # padding comes with the input, be it one token; a step of one token behind it is not read
    is_input = q_length > 1 or kv_length == q_length
    if attention_mask is not None and is_input and not bool(attention_mask.all()):
        raise NotImplementedError(
            "attention_mask: padding behind a prepared context is not served; give sequences of "
            "equal length, or one at a time"
        )


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

    Args:
        model: a causal language model with rotary or no positions, for example Llama.
        ids: int64 [S] or [1, S].
        chunk: tokens per forward call.
        progress: show a bar.
        parameters: fields of `sparse_attn.squeezed.context.Parameters`; `model` is the name of
            the model's folder where none is given.

    Raises:
        ValueError, TypeError: an argument is not legal, said before the model runs.
        NotImplementedError: the layers scale their scores differently, or not by `scale`.
    """
    chosen = Parameters(**{"model": Path(model.config.name_or_path).name, **parameters})
    check.integer("chunk", chunk)
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected 1 or more")
    window, ids = chosen.window, ids.reshape(1, -1).to(model.device)
    if ids.shape[1] <= window:
        raise ValueError(
            f"ids: {ids.shape[1]} tokens, expected more than window, {window}: a context so short "
            "needs no clusters"
        )
    n_layers = model.config.get_text_config().num_hidden_layers
    queries: list[torch.Tensor | None] = [None] * n_layers
    scales: list[float] = []

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):  # type: ignore[no-untyped-def]
        refuse(dropout=dropout or None, **kwargs)
        before, last = queries[module.layer_idx], query[:, :, -window:]
        last = last if before is None else torch.cat([before, last], 2)[:, :, -window:]
        queries[module.layer_idx] = last.clone()
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        for other in [x for x in (*scales[:1], chosen.scale) if x is not None]:
            if abs(scale - other) > 1e-6 * abs(other):
                raise NotImplementedError(
                    f"scale: layer {module.layer_idx} multiplies its scores by {scale}, "
                    f"{'an earlier layer' if scales else 'the argument'} by {other}: a context "
                    "has one scale"
                )
        scales.append(scale)
        out = api.attention(query, key, value, "dense", scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(PREPARE, attend)
    AttentionMaskInterface.register(PREPARE, no_mask)
    before, cache = model.config._attn_implementation, DynamicCache(config=model.config)
    model.set_attn_implementation(PREPARE)
    try:
        for part in ids.split(chunk, dim=1):
            decoder(model)(input_ids=part, use_cache=True, **{cache_argument(model): cache})
    finally:
        model.set_attn_implementation(before)
        AttentionInterface.register(PREPARE, forward)  # lets go of the queries
    dim = cache.layers[0].keys.shape[3]
    if abs(scales[0] - dim**-0.5) > 1e-6 * dim**-0.5:
        chosen = replace(chosen, scale=scales[0])
    return SqueezedContext.build(
        [x.keys for x in cache.layers], [x.values for x in cache.layers], queries,
        tokens=ids[0].cpu(), progress=progress, fingerprint=fingerprint(model), **vars(chosen),
    )  # fmt: skip


def decoder(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its head, whose logits nobody needs here."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def cache_argument(model: torch.nn.Module) -> str:
    """What the model calls its cache: renamed within transformers 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

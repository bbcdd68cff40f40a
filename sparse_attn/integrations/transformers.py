"""Hugging Face transformers: `model.set_attn_implementation("sparse_attn")` after `register()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .. import api, settings
from ..methods import resolve
from ..methods.dense import Dense
from ..ops.block_sparse_attention import op as block_sparse_attention
from .masks import Span, spans

REFUSED = {
    "softcap": "soft-capped scores; use 'eager'",
    "dropout": "dropout, it is for inference; call model.eval()",
    "position_bias": "a bias on the scores; use 'sdpa'",
    "s_aux": "learned sinks; use 'eager'",
    "cache": "attention over a paged cache; use 'sdpa'",
}


def register(
    method: Any = "flex_prefill",
    name: str = "sparse_attn",
    *,
    decode: Any = "dense",
    layers: Mapping[int, Any] | None = None,
    decode_layers: Mapping[int, Any] | None = None,
    **options: Any,
) -> None:
    """Makes `name` an attention implementation of transformers that chooses blocks by a method.

    Args:
        method: a name or a config, for calls with several queries: prefill, whole or in chunks.
            Prompts below the method's crossover take its dense path. Or a file of methods by
            layer, "NAME.json", that `calibrate` wrote.
        name: what `model.set_attn_implementation` takes; a name for each model that shall have
            options of its own.
        decode: the method for calls with one query; a name, a config or a file, as `method`.
        layers: methods of single layers in prefill, by number from 0: {0: "dense", 5: "sale"}.
        decode_layers: the same in calls with one query.
        options: backend and fallback, as in `attention`.

    Served is causal attention with left or right padding, whole or in chunks, with dynamic or
    static caches; single queries also with padding between their keys, where a prompt was padded on
    the right: they attend to the others as if these were the whole cache. Layers with a sliding
    window attend exactly to their window, by no method, as soon as there are more keys than that.
    Any other mask, a soft cap, sinks, dropout and paged caches raise NotImplementedError; a layer
    that the model lacks raises ValueError in its first call. Masks are read on the host, which
    torch.compile(fullgraph=True) refuses: compile without fullgraph.
    """
    unknown = sorted(set(options) - {"backend", "fallback"})
    if unknown:
        raise TypeError(
            f"register: got {unknown}, expected decode, layers, decode_layers, backend or "
            "fallback; a method's fields go into its config, for example "
            "register(FlexPrefill(gamma=0.9))"
        )
    prefill = methods_of(method, layers, "layers")
    decoding = methods_of(decode, decode_layers, "decode_layers")

    def attend(query: torch.Tensor, *args: Any, layer: int | None, **kwargs: Any) -> torch.Tensor:
        config = (decoding if query.shape[2] == 1 else prefill).of(layer)
        return api.attention(query, *args, config, **options, **kwargs)

    last = max([*prefill.layers, *decoding.layers], default=-1)
    register_function(attend, name, last, options.get("backend"))


def methods_of(method: Any, layers: Mapping[int, Any] | None, argument: str) -> settings.Settings:
    """The methods of a phase, by layer: of a name, a config or a file, and those of `argument`."""
    if isinstance(method, (str, Path)) and str(method).endswith(".json"):
        method, of_layer = settings.read(method)
    else:
        of_layer = {}
    for layer, given in (layers or {}).items():
        if not isinstance(layer, int) or layer < 0:
            raise ValueError(f"{argument}: got layer {layer!r}, expected whole numbers from 0")
        of_layer[layer] = resolve(given)
    return settings.Settings(resolve(method), of_layer)


def register_function(
    attend: Callable[..., torch.Tensor],
    name: str,
    last_layer: int = -1,
    backend: str | None = None,
) -> None:
    """Registers `attend(query, key, value, layer=, causal=, scale=)` under a name.

    `layer` is the number of the layer, None where the model does not tell. Sliding windows are
    attended to without it, by `backend`. A model that has no layer `last_layer` is refused.
    """

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        refuse(dropout=dropout or None, **kwargs)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        layer = layer_of(module, last_layer)
        window = sliding_window if sliding_window and key.shape[2] > sliding_window else None

        def part(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if window is not None:
                nothing = Dense().select(query, key)
                args = (query, key, value, *nothing.blocks, True, 0, window, scaling)
                return block_sparse_attention(*args, backend=backend)[0]
            return attend(query, key, value, layer=layer, causal=causal, scale=scaling)

        n_queries = query.shape[2]
        if window is not None and not causal:
            raise NotImplementedError("sliding_window: served for causal attention; use 'sdpa'")
        if attention_mask is None:
            # no mask for several queries and more keys: a preallocated cache, empty until now
            if causal and n_queries > 1:
                key, value = key[:, :, :n_queries], value[:, :, :n_queries]
            out = part(query, key, value)
        elif not causal:
            raise NotImplementedError("attention_mask: served for causal attention; use 'sdpa'")
        else:
            out = by_sequence(part, query, key, value, spans(attention_mask, query, key, window))
        return out.transpose(1, 2).contiguous(), None

    if name == "eager" or not _is_ours(AttentionInterface().get(name)):
        raise ValueError(
            f"name: {name!r} belongs to transformers or to another library, expected another name"
        )
    AttentionInterface.register(name, forward)
    # without a mask function of the same name a padded batch would arrive without its mask
    AttentionMaskInterface.register(name, sdpa_mask)


def _is_ours(registered: Any) -> bool:
    """Whether a name is free, or was given to a function of this package."""
    return registered is None or registered.__module__.startswith("sparse_attn.")


def by_sequence(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    found: list[Span],
) -> torch.Tensor:
    """Attends with the real part of each sequence; in one call where all have the same."""
    plain = all(isinstance(span.keys, slice) for span in found)
    if plain and all(span == found[0] for span in found):
        queries, keys, _ = found[0]
        if queries == slice(0, query.shape[2]):
            return attend(query, key[:, :, keys], value[:, :, keys])

    def part_of(b: int, queries: slice, keys: slice | torch.Tensor) -> torch.Tensor:
        at = ((query, queries), (key, keys), (value, keys))
        return attend(*(x[b : b + 1, :, where] for x, where in at))

    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    last = slice(query.shape[2] - 1, query.shape[2])
    for b, (queries, keys, seen) in enumerate(found):
        if queries.start < queries.stop:
            out[b : b + 1, :, queries] = part_of(b, queries, keys)
        if seen is not None:
            out[b : b + 1, :, last] = part_of(b, last, seen)
    return out


def layer_of(module: torch.nn.Module, last: int) -> int | None:
    """The layer's number; ValueError if methods are given for layers the model does not have."""
    layer = getattr(module, "layer_idx", None)
    if last >= 0:
        n_layers = getattr(getattr(module, "config", None), "num_hidden_layers", None)
        if layer is None or (n_layers is not None and last >= n_layers):
            raise ValueError(
                f"layers: a method is given for layer {last}, but the model has "
                f"{'unnumbered layers' if layer is None else f'the layers 0 to {n_layers - 1}'}"
            )
    return layer


def refuse(**options: Any) -> None:
    """Raises for what changes the result of attention and is not computed here."""
    for name, what in REFUSED.items():
        if options.get(name) is not None:
            raise NotImplementedError(f"{name}: sparse_attn does not compute {what}")

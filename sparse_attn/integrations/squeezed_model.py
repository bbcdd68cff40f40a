"""What Squeezed Attention asks of a model: which ones it serves, and whether one is the same."""

from __future__ import annotations

import inspect
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..squeezed import SqueezedContext

SERVED = ("full_attention", "sliding_attention")  # layers; the mask function tells of the second
ROWS = 4  # of each matrix that the fingerprint reads
# of a configuration, what keys do not depend on
ASIDE = {"dtype", "torch_dtype", "architectures", "transformers_version", "name_or_path",
         "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "return_dict"}  # fmt: skip


def decoder(model: torch.nn.Module) -> torch.nn.Module:
    """The part that reads text, without the head: its configuration names the implementation."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def cache_argument(model: torch.nn.Module) -> str:
    """What the model calls its cache: renamed within transformers 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def switch(model: torch.nn.Module, name: str) -> None:
    """Sets the attention implementation of what reads text; a vision tower keeps its own.

    Raises NotImplementedError for a model whose attention cannot be chosen.
    """
    part = decoder(model)
    part.set_attn_implementation(name)
    if part.config._attn_implementation != name:
        raise NotImplementedError(
            f"{type(model).__name__} computes its attention itself: Squeezed Attention serves "
            "models that use transformers' AttentionInterface"
        )


@contextmanager
def switched(model: torch.nn.Module, name: str) -> Iterator[None]:
    """`switch` for a while; then every part of the model has its own implementation again."""
    config = decoder(model).config
    before = implementations(config)
    try:
        switch(model, name)
        yield
    finally:
        decoder(model).set_attn_implementation(before)


def implementations(config: Any) -> dict[str, Any]:
    """The attention implementations of a configuration and of those in it, as transformers
    takes them back."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: implementations(part) for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **inner}


def check_served(model: torch.nn.Module) -> None:
    """Raises NotImplementedError where the configuration tells that the model is not served."""
    config, name = model.config.get_text_config(), type(model).__name__
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} has an encoder: Squeezed Attention serves decoders")
    if not getattr(config, "is_causal", True):
        raise NotImplementedError(
            f"{name} attends in both directions (is_causal=False): a context serves causal models"
        )
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(SERVED))
    if other:
        raise NotImplementedError(
            f"{name} has layers of type {', '.join(other)}: Squeezed Attention serves models whose "
            "layers all attend to the whole text"
        )


def check_model(context: SqueezedContext, model: torch.nn.Module) -> None:
    """Raises ValueError unless the context fits the model, and this model has prepared it.

    Compared are layers, heads and sizes, then the `fingerprint` where the context holds one.
    NotImplementedError: the model is not served.
    """
    check_served(model)
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


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """Of what keys depend on: the configuration, and a few rows of every weight.

    The same in float32 and bfloat16, on any device, and after saving and loading. Of the
    configuration counts what differs from the defaults of its class, so that a newer transformers
    with more fields tells the same.
    """
    config = model.config.get_text_config()
    try:
        usual = type(config)().to_dict()
    except (TypeError, ValueError):  # a configuration of one's own that wants arguments
        usual = {}
    told = {
        name: x
        for name, x in config.to_dict().items()
        if name not in ASIDE and not name.startswith(("_", "output_"))
        and (name == "model_type" or name not in usual or x != usual[name])
    }  # fmt: skip
    of_config = zlib.crc32(json.dumps(told, sort_keys=True, default=str).encode())
    of_weights = 0
    for weight in decoder(model).parameters():
        if weight.is_meta or weight.numel() == 0:
            continue
        rows = weight.detach().reshape(-1, weight.shape[-1]) if weight.dim() else weight[None]
        rows = rows[:: -(-len(rows) // ROWS)].to(torch.bfloat16).cpu().contiguous()
        of_weights = zlib.crc32(memoryview(rows.view(torch.uint8).flatten().numpy()), of_weights)
    return f"{of_config:08x}-{of_weights:08x}"


def no_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any,
    attention_mask: torch.Tensor | None = None, local_size: int | None = None, **kwargs: Any,
) -> None:  # fmt: skip
    """No mask is needed: the input is causal behind the context. Refuses what would need one."""
    if local_size is not None:
        raise NotImplementedError("a sliding window: Squeezed Attention attends to the whole text")
    # the host reads once per step here, as generate does to see whether it has ended
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError(
            "attention_mask: padding behind a prepared context is not served; give sequences of "
            "equal length, or one at a time"
        )

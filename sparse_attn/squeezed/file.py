"""The file of a prepared context: safetensors, with a JSON header that people can read.

The header is the entry "sparse_attn" of the safetensors metadata: `head -c 4000 FILE` shows it, as
does `python -m sparse_attn squeeze info FILE`.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .pages import moved

if TYPE_CHECKING:
    from .context import SqueezedContext

FORMAT = "sparse_attn squeezed context"
VERSION = 3


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a context file needs safetensors: pip install 'sparse_attn[squeezed]'"
        ) from error
    return safetensors


def _checksum(x: torch.Tensor) -> int:
    flat = (
        x.contiguous().view(torch.uint8).flatten()
        if x.numel()
        else x.new_empty(0, dtype=torch.uint8)
    )
    return zlib.crc32(memoryview(flat.numpy()))


def _header_sum(header: dict[str, Any]) -> int:
    """Of all of it but this sum itself."""
    rest = {name: x for name, x in header.items() if name != "header_crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def save(context: SqueezedContext, path: Path) -> None:
    """Writes next to the target and renames, so that no reader ever sees half a file."""
    from .. import __version__
    from .context import TENSORS

    library = _safetensors()
    tensors = {}
    for i, layer in enumerate(context.layers):
        for name in TENSORS:
            x = getattr(layer, name)
            if x is not None:
                tensors[f"layers.{i}.{name}"] = x.detach().cpu().contiguous()
    if context.tokens is not None:
        tensors["tokens"] = context.tokens.cpu().contiguous()
    header = {
        "format": FORMAT,
        "version": VERSION,
        "sparse_attn": __version__,
        "torch": str(torch.__version__),
        **context.summary(),
        "crc32": {name: _checksum(x) for name, x in tensors.items()},
    }
    header["header_crc32"] = _header_sum(header)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        library.torch.save_file(tensors, name, {"sparse_attn": json.dumps(header)})
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's files are for their owner alone
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_header(path: Path) -> dict[str, Any]:
    """The header, checked; no tensor is read."""
    library = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with library.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["sparse_attn"])
            kind, version = header["format"], header["version"]
    except (library.SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a file of SqueezedContext.save, or damaged ({type(error).__name__}: "
            f"{error})"
        ) from None
    if kind != FORMAT or version != VERSION:
        raise ValueError(
            f"{path}: format {kind!r} version {version}, this sparse_attn reads {FORMAT!r} version "
            f"{VERSION}: build the context again"
        )
    if header.get("header_crc32") != _header_sum(header):
        raise ValueError(f"{path}: damaged, the checksum of its header is another")
    return header


def load(path: Path) -> SqueezedContext:
    """Reads and checks a file: its checksums, then that its tensors fit together."""
    library, header = _safetensors(), read_header(path)
    try:
        tensors = library.torch.load_file(path)
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    try:
        return _assemble(path, header, tensors)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: damaged, or its header is not of this format ({what})") from None


def _assemble(
    path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> SqueezedContext:
    from .context import PARAMETERS, TENSORS, Parameters, SqueezedContext, SqueezedLayer

    sums = header["crc32"]
    if set(sums) != set(tensors):
        raise ValueError(f"{path}: damaged, it lacks {sorted(set(sums) ^ set(tensors))[:3]}")
    for name, x in tensors.items():
        if _checksum(x) != sums[name]:
            raise ValueError(f"{path}: damaged, the checksum of {name} is another")
    given = header["parameters"]
    if set(given) != set(PARAMETERS):
        raise ValueError(f"{path}: its parameters {sorted(given)} are not {sorted(PARAMETERS)}")
    try:
        parameters = Parameters(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged, its parameters are not legal: {error}") from None
    for name in ("threshold", "coarse_threshold"):
        x = header[name]
        if not (x is None and name == "coarse_threshold" or math.isfinite(x)):
            raise ValueError(f"{path}: damaged, {name} is {x}, expected a finite number")
    layers = []
    for i in range(header["layers"]):
        found = {name: tensors.get(f"layers.{i}.{name}") for name in TENSORS}
        for name in ("key", "value"):
            found[name] = moved(tensors.pop(f"layers.{i}.{name}"))
        coarse = header["coarse_threshold"]
        layer = SqueezedLayer(
            **found,
            threshold=torch.tensor(header["threshold"], dtype=torch.float32),
            coarse_threshold=None if coarse is None else torch.tensor(coarse, dtype=torch.float32),
            shared=parameters.shared,
            scale=parameters.scale,
        )
        check_layer(path, i, layer, header)
        layers.append(layer)
    return SqueezedContext(tuple(layers), parameters, tensors.get("tokens"), header["fingerprint"])


def check_layer(path: Path, i: int, layer: Any, header: dict[str, Any]) -> None:
    """Raises unless a layer's tensors have the shapes that the header tells."""
    heads, dim = header["kv_heads"], header["head_dim"]
    n, k = header["length"] - header["parameters"]["window"], header["clusters_per_layer"][i]
    window = header["parameters"]["window"]
    wanted = {
        "key": (1, heads, n, dim), "value": (1, heads, n, header["value_dim"]),
        "order": (1, heads, n), "window_key": (1, heads, window, dim),
        "window_value": (1, heads, window, header["value_dim"]),
        "centroids": (1, heads, k, dim), "log_counts": (1, heads, k), "offsets": (1, heads, k + 1),
    }  # fmt: skip
    parents = header["coarse_clusters"]
    if parents is not None:
        wanted |= {
            "coarse_centroids": (1, heads, parents, dim), "coarse_log_counts": (1, heads, parents),
            "children": (1, heads, parents + 1),
        }  # fmt: skip
    whole = {"order": "int32", "offsets": "int32", "children": "int32", "log_counts": "float32",
             "coarse_log_counts": "float32"}  # fmt: skip
    for name, shape in wanted.items():
        x = getattr(layer, name)
        dtype = whole.get(name, header["dtype"])
        if x is not None and x.dtype != getattr(torch, dtype):
            raise ValueError(f"{path}: layer {i}: {name} is {x.dtype}, expected torch.{dtype}")
        got = None if x is None else tuple(x.shape)
        if got != shape:
            raise ValueError(f"{path}: layer {i}: {name} has shape {got}, its header says {shape}")
    for name, x, total in (("offsets", layer.offsets, n), ("children", layer.children, k)):
        if x is not None and not (
            bool((x.diff(dim=-1) >= 0).all())
            and bool((x[..., 0] == 0).all())
            and bool((x[..., -1] == total).all())
        ):
            raise ValueError(f"{path}: layer {i}: {name} do not ascend from 0 to {total}")

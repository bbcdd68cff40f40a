"""Argument checks that the operators share. Each error names the argument and what it accepts."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch

from .. import _ext
from ..brief import dtype_name

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_TOKENS = 2**31 - 256  # of queries and keys together
MAX_INT64 = 2**63 - 1  # what a schema's int holds
MAX_FLOAT32 = torch.finfo(torch.float32).max
SWAPPED = "heads come before tokens, [B, H, T, D]: transpose(1, 2) what is [B, T, H, D]"
READABLE = {MAX_TOKENS: "2**31 - 256", MAX_INT64: "2**63 - 1", MAX_FLOAT32: "3.4e38"}


def tensor(name: str, x: Any, shape: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks type, rank, dtype and that no dimension is empty (one named K may be)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor [{', '.join(shape)}], got {type(x).__name__}")
    if x.dim() != len(shape):
        raise ValueError(
            f"{name}: expected {len(shape)} dimensions [{', '.join(shape)}], "
            f"got shape {tuple(x.shape)}"
        )
    if x.dtype not in dtypes:
        accepted = ", ".join(dtype_name(d) for d in dtypes)
        raise TypeError(f"{name}: expected dtype {accepted}, got {x.dtype}")
    if 0 in x.shape:
        for dim, label in enumerate(shape):
            if label != "K" and x.shape[dim] == 0:
                raise ValueError(f"{name}: dimension {label} is empty in shape {tuple(x.shape)}")


def same(name: str, what: str, got: Any, expected: Any, of: str) -> None:
    if got != expected:
        raise ValueError(f"{name}: {what} is {got}, expected {expected} as in {of}")


def like(name: str, x: torch.Tensor, other: torch.Tensor, of: str) -> None:
    """Checks that two tensors agree in dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: dtype is {x.dtype}, expected {other.dtype} as {of}")
    if x.device != other.device:
        raise ValueError(f"{name}: device is {x.device}, expected {other.device} as {of}")


def on_device(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    if x.device != query.device:
        raise ValueError(f"{name}: device is {x.device}, expected {query.device} as query")


def shared_batch(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    """Checks that x is for every sequence of the batch or one for all."""
    if x.shape[0] not in (1, query.shape[0]):
        raise ValueError(
            f"{name}: batch size is {x.shape[0]}, expected {query.shape[0]} as in query, "
            "or 1, shared by all"
        )


def heads(query: torch.Tensor, key: torch.Tensor, of: str = "key") -> None:
    if query.shape[1] % key.shape[1] != 0:
        hint = f"; {SWAPPED}" if query.shape[1] > query.shape[2] else ""
        raise ValueError(
            f"query: {query.shape[1]} heads, expected a multiple of {of}'s {key.shape[1]}{hint}"
        )


def layout(query: torch.Tensor, key: torch.Tensor) -> None:
    """Refuses causal calls of [B, T, H, D]: queries before the first key, more heads than tokens.

    Where the model has GQA; otherwise such a call cannot be told from a legal one.
    """
    if torch.compiler.is_compiling():  # as in `lengths`
        return
    if query.shape[2] > key.shape[2] and query.shape[1] > query.shape[2]:
        raise ValueError(
            f"query: {query.shape[2]} queries of {query.shape[1]} heads, but {key.shape[2]} keys, "
            f"so the first queries would see none; {SWAPPED}"
        )


def boolean(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: got {x!r}, expected True or False")


def lengths(n_queries: Any, n_keys: Any) -> None:
    """Kernels hold positions in 32 bits."""
    if torch.compiler.is_compiling():  # it would become a bound of an exported program's lengths
        return
    if n_queries + n_keys >= MAX_TOKENS:
        longer = "key" if n_keys >= n_queries else "query"
        raise ValueError(
            f"{longer}: {n_queries} queries and {n_keys} keys, "
            f"expected less than {READABLE[MAX_TOKENS]} tokens together"
        )


def query_key(query: Any, key: Any) -> None:
    """query [B, Hq, Tq, D] and key [B, Hkv, Tk, D]."""
    tensor("query", query, ("B", "Hq", "Tq", "D"), DTYPES)
    tensor("key", key, ("B", "Hkv", "Tk", "D"), DTYPES)
    like("key", key, query, "query")
    same("key", "batch size", key.shape[0], query.shape[0], "query")
    same("key", "head_dim", key.shape[3], query.shape[3], "query")
    heads(query, key)
    lengths(query.shape[2], key.shape[2])


def query_key_value(query: Any, key: Any, value: Any) -> None:
    """query_key and value [B, Hkv, Tk, Dv]."""
    query_key(query, key)
    tensor("value", value, ("B", "Hkv", "Tk", "Dv"), DTYPES)
    like("value", value, query, "query")
    same("value", "batch size", value.shape[0], query.shape[0], "query")
    same("value", "number of heads", value.shape[1], key.shape[1], "key")
    same("value", "length", value.shape[2], key.shape[2], "key")


PAGE_SIZES = (16, 32, 64, 128)


def cache(query: Any, key: Any, value: Any, block_table: Any = None, kv_lengths: Any = None) -> int:
    """query and a cache of keys and values; returns how many keys a sequence has room for.

    Without a block table key is [B, Hkv, Tk, D], with one [pages, Hkv, page_size, D]; value alike,
    or None for a selector, which sees no values.
    """
    if block_table is None:
        query_key(query, key) if value is None else query_key_value(query, key, value)
        capacity = key.shape[2]
    else:
        capacity = pages(query, key, value, block_table)
    if kv_lengths is not None:
        tensor("kv_lengths", kv_lengths, ("B",), (torch.int32,))
        same("kv_lengths", "batch size", kv_lengths.shape[0], query.shape[0], "query")
        on_device("kv_lengths", kv_lengths, query)
    return capacity


def pages(query: Any, key: Any, value: Any, block_table: Any) -> int:
    """query [B, Hq, Tq, D], pages of keys and values, block_table [B, pages of a sequence]."""
    tensor("query", query, ("B", "Hq", "Tq", "D"), DTYPES)
    for name, x, dim in (("key", key, "D"), ("value", value, "Dv")):
        if x is None:
            continue
        tensor(name, x, ("pages", "Hkv", "page_size", dim), DTYPES)
        like(name, x, query, "query")
        if x.shape[2] not in PAGE_SIZES:
            raise ValueError(f"{name}: page_size is {x.shape[2]}, expected one of {PAGE_SIZES}")
        if x.stride(3) != 1 and x.shape[3] > 1:  # a copy of a whole cache is never wanted
            raise ValueError(
                f"{name}: strides {tuple(x.stride())}, pages need a contiguous last dimension"
            )
    same("key", "head_dim", key.shape[3], query.shape[3], "query")
    if value is not None:
        same("value", "number of pages", value.shape[0], key.shape[0], "key")
        same("value", "number of heads", value.shape[1], key.shape[1], "key")
        same("value", "page_size", value.shape[2], key.shape[2], "key")
    heads(query, key)
    tensor("block_table", block_table, ("B", "pages"), (torch.int32,))
    same("block_table", "batch size", block_table.shape[0], query.shape[0], "query")
    on_device("block_table", block_table, query)
    capacity = block_table.shape[1] * key.shape[2]
    lengths(query.shape[2], capacity)
    return capacity


def integer(name: str, x: Any) -> None:
    if not isinstance(x, (Integral, torch.SymInt)) or isinstance(x, bool):
        raise TypeError(f"{name}: got {x!r}, expected an integer")


def number(name: str, x: Any) -> None:
    if not isinstance(x, (Real, torch.SymInt, torch.SymFloat)) or isinstance(x, bool):
        raise TypeError(f"{name}: got {x!r}, expected a number")


def block_size(name: str, x: Any) -> None:
    integer(name, x)
    between(name, x, 1, 128)


def between(name: str, x: Any, low: float, high: float) -> None:
    if not low <= x <= high:
        at_most = READABLE.get(high, high)
        expected = f"{low} or more" if x < low and high in READABLE else f"{low} to {at_most}"
        raise ValueError(f"{name}: got {x}, expected {expected}")


def not_negative(name: str, x: Any) -> None:
    integer(name, x)
    if x < 0:
        raise ValueError(f"{name}: got {x}, expected 0 or more")


def finite_scale(scale: Any) -> None:
    if scale is None:
        return
    number("scale", scale)
    if not abs(scale) <= MAX_FLOAT32:
        raise ValueError(
            f"scale: got {scale}, expected a number, finite in float32, or None for 1/sqrt(D)"
        )


def not_float64(first: torch.Tensor, *args: Any) -> bool | str:
    """The `when` of kernels that have no float64."""
    return first.dtype != torch.float64 or "float64 is served by the reference only"


def cuda_kernels_serve(first: torch.Tensor, *args: Any) -> bool | str:
    """What the `when` of every CUDA kernel begins with."""
    if first.dtype not in (torch.float16, torch.bfloat16):
        return f"{first.dtype}, served in float16 and bfloat16; triton and reference take others"
    return cuda_kernels_run(first)


def cuda_kernels_run(first: torch.Tensor) -> bool | str:
    """The same for kernels whose tensors have other dtypes."""
    if not first.is_cuda:
        return True
    gpu = torch.cuda.get_device_properties(first.device)
    if gpu.major < 8:
        return "needs compute capability 8.0 or more"
    return _ext.why_no_cuda_code(gpu.major, gpu.minor) or True

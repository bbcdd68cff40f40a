"""`warmup`: the first calls of a process, made before they are needed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from .api import attention
from .methods import resolve

CPU_LENGTH = 256  # tokens; nothing is compiled for the CPU, whatever the length


class Warmed(NamedTuple):
    """One call that was made: the method, its lengths and dtype, and how long it took."""

    method: str
    n_queries: int
    n_keys: int
    dtype: torch.dtype
    seconds: float


def warmup(
    n_heads: int,
    n_key_heads: int,
    head_dim: int,
    *,
    lengths: Iterable[tuple[int, int]] = ((32768, 32768), (8192, 8192), (4096, 4096), (1, 8192)),
    methods: Iterable[Any] = ("flex_prefill",),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    device: torch.device | str | None = None,
    value_dim: int | None = None,
    batch: int = 1,
    causal: bool = True,
    backend: str | None = None,
) -> list[Warmed]:
    """Compiles and loads the kernels that calls like these will use, by making one call of each.

    A kernel is compiled for the dtype, head dimensions, query heads per KV head and block sizes; of
    the lengths it matters only on which side of a few steps they lie: shorter than a block
    (decode), too few tiles to fill the GPU (a short chunk), below the method's crossover (dense),
    more than 128 blocks. The default lengths are one of each but the short chunk: add yours.
    Triton keeps what it compiled on disk: a second process loads it. Call this before a CUDA graph
    is captured.

    Args:
        n_heads, n_key_heads, head_dim: of the model's attention layers.
        lengths: (queries, keys) per call; tensors of that size are allocated for its duration.
        methods: names or configs.
        dtypes: of query, key and value.
        device: None for the GPU if there is one. On the CPU lengths are cut to 256 tokens: the
            extension is loaded and its threads are started, within milliseconds.
        value_dim: None for head_dim.
        batch, causal, backend: as in `attention`.

    Returns:
        A `Warmed` per call, in order; the first one that uses a kernel bears its compilation.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lengths, methods, dtypes = list(lengths), [resolve(m) for m in methods], list(dtypes)
    for pair in lengths:
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"lengths: got {pair!r}, expected (queries, keys), each at least 1")
    warmed = []
    for method in methods:
        for dtype in dtypes:
            for n_queries, n_keys in lengths:
                if device.type == "cpu":
                    n_queries, n_keys = min(n_queries, CPU_LENGTH), min(n_keys, CPU_LENGTH)
                # zeros, so that the state of the random generators stays as it was
                query, key, value = (
                    torch.zeros(batch, heads, length, dim, dtype=dtype, device=device)
                    for heads, length, dim in (
                        (n_heads, n_queries, head_dim),
                        (n_key_heads, n_keys, head_dim),
                        (n_key_heads, n_keys, value_dim or head_dim),
                    )
                )
                start = time.perf_counter()
                attention(query, key, value, method, causal=causal, backend=backend)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - start
                warmed.append(Warmed(method.name, n_queries, n_keys, dtype, seconds))
    return warmed

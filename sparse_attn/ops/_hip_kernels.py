"""What the Triton and CUDA kernels of HiP's selections serve."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks as check

MOST_KEPT = 1024  # nodes of a tree, chunks of a stage: they stay in shared memory or registers


def n_tokens(key: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """Keys of a sequence, with pages the most that it may have."""
    return key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]


def keeps(name: str, budget: int, block: int, tokens: int) -> bool | str:
    kept = min(-(-budget // block), -(-tokens // block))
    if kept > MOST_KEPT:
        return f"{name}: {kept} blocks of {block} tokens are kept, served up to {MOST_KEPT}"
    return True


def tree_fits(key: Any, budget: int, kv_block: int, block_table: Any) -> bool | str:
    """Whether the nodes of hip_select have room; none are needed where every block is kept."""
    tokens = n_tokens(key, block_table)
    return budget >= tokens or keeps("budget", budget, kv_block, tokens)


def stages_fit(key: Any, chunks: Any, kept: Any, block_table: Any) -> bool | str:
    """Whether the candidates of hip_prune_select have room."""
    tokens = n_tokens(key, block_table)
    for i, (chunk, budget) in enumerate(zip(chunks, kept, strict=True)):
        fits = keeps(f"keeps[{i}]", budget, chunk, tokens)
        if fits is not True:
            return fits
    return True


def triton(query: Any, fits: bool | str) -> bool | str:
    if query.shape[3] > 256:
        return f"head_dim {query.shape[3]}, served up to 256"
    served = check.not_float64(query)
    return fits if served is True else served


def cuda(query: Any, key: Any, fits: bool | str, block_table: Any) -> bool | str:
    if query.shape[3] > 256 or query.shape[3] % 8 != 0:
        return f"head_dim {query.shape[3]}, served are multiples of 8 up to 256"
    aligned = not any(n % 8 for n in (*key.stride()[:3], key.storage_offset()))
    if block_table is not None and not aligned:
        return "key: pages whose rows begin at no multiple of 16 bytes would be copied"
    served = check.cuda_kernels_serve(query)
    return fits if served is True else served

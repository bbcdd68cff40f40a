"""What the Triton and CUDA kernels of HiP's selections serve."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks as check

MOST_KEPT = 1024  # nodes of a tree, chunks of a stage: they stay in shared memory or registers


def n_tokens(key: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """Keys of a sequence, with pages the most that it may have."""
    return key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]


def keeps(
    name: str, budget: int, block_name: str, block: int, largest: int, tokens: int
) -> bool | str:
    wanted = min(budget, tokens)
    kept, enough = -(-wanted // block), -(-wanted // MOST_KEPT)
    if kept <= MOST_KEPT:
        return True
    or_larger = f", {block_name} {enough} or more" if enough <= largest else ""
    return (
        f"{name}: {kept} blocks of {block} tokens are kept, served up to {MOST_KEPT}; would serve: "
        f"{name} {MOST_KEPT * block} or less{or_larger}"
    )


def tree_fits(key: Any, budget: int, kv_block: int, block_table: Any) -> bool | str:
    """Whether the nodes of hip_select have room; none are needed where every block is kept."""
    tokens = n_tokens(key, block_table)
    return budget >= tokens or keeps("budget", budget, "kv_block", kv_block, 128, tokens)


def stages_fit(key: Any, chunks: Any, kept: Any, block_table: Any) -> bool | str:
    """Whether the candidates of hip_prune_select have room."""
    tokens = n_tokens(key, block_table)
    for i, (chunk, budget) in enumerate(zip(chunks, kept, strict=True)):
        largest = 128 if i == len(chunks) - 1 else 4096
        fits = keeps(f"keeps[{i}]", budget, f"chunks[{i}]", chunk, largest, tokens)
        if fits is not True:
            return fits
    return True


def reference_unasked(query: Any, fits: bool | str) -> bool | str:
    """On a GPU not where a call is too large for its kernels: that would be slow in silence."""
    small = query.shape[3] <= 256 and fits is True
    return query.device.type != "cuda" or small or (
        'serves CUDA tensors of this size with backend="reference" only: it loops over the blocks '
        "in Python and reads the device"
    )  # fmt: skip


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

"""What the operators of HiP share: names of options, and the checks of each."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks as check

REPRESENTATIVES = ("centre", "first")
MERGES = ("none", "group", "all")
PAGES = "Tensor? block_table=None, Tensor? kv_lengths=None"


def one_of(name: str, x: Any, accepted: tuple[Any, ...]) -> None:
    if x not in accepted or isinstance(x, bool):
        raise ValueError(f"{name}: got {x!r}, expected one of {accepted}")


def budget(name: str, x: Any) -> None:
    check.integer(name, x)
    check.between(name, x, 1, check.MAX_INT64)


def fake_index(query, key, heads, q_block, kv_block, budget, block_table):
    """Empty (indices, counts) with room for what a budget allows."""
    tokens = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    places = torch.sym_min(-(-budget // kv_block), (tokens + kv_block - 1) // kv_block)
    shape = (query.shape[0], heads, (query.shape[2] + q_block - 1) // q_block)
    return (
        query.new_empty((*shape, places), dtype=torch.int32),
        query.new_empty(shape, dtype=torch.int32),
    )

"""What the operators of HiP share: names of options, and the checks of each."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks as check

REPRESENTATIVES = ("centre", "first")
MERGES = ("none", "group", "all")
PAGE_SIZES = (16, 32, 64, 128)
PAGES = "Tensor? block_table=None, Tensor? kv_lengths=None"


def one_of(name: str, x: Any, accepted: tuple[Any, ...]) -> None:
    if x not in accepted or isinstance(x, bool):
        raise ValueError(f"{name}: got {x!r}, expected one of {accepted}")


def budget(name: str, x: Any) -> None:
    check.integer(name, x)
    check.between(name, x, 1, check.MAX_INT64)


def query_key(query: Any, key: Any, block_table: Any, kv_lengths: Any) -> None:
    """query [B, Hq, Tq, D]; key [B, Hkv, Tk, D], or [pages, Hkv, page_size, D] with a table."""
    if block_table is None:
        check.query_key(query, key)
    else:
        paged_keys(query, key, block_table)
    if kv_lengths is not None:
        check.tensor("kv_lengths", kv_lengths, ("B",), (torch.int32,))
        beside_query("kv_lengths", kv_lengths, query)


def paged_keys(query: Any, key: Any, block_table: Any) -> None:
    check.tensor("query", query, ("B", "Hq", "Tq", "D"), check.DTYPES)
    check.tensor("key", key, ("pages", "Hkv", "page_size", "D"), check.DTYPES)
    check.like("key", key, query, "query")
    check.same("key", "head_dim", key.shape[3], query.shape[3], "query")
    check.heads(query, key)
    if key.shape[2] not in PAGE_SIZES:
        raise ValueError(f"key: page_size is {key.shape[2]}, expected one of {PAGE_SIZES}")
    if key.stride(3) != 1 and key.shape[3] > 1:  # a copy of a whole cache is never wanted
        raise ValueError(f"key: strides {tuple(key.stride())}, expected 1 in the last dimension")
    check.tensor("block_table", block_table, ("B", "max_pages"), (torch.int32,))
    beside_query("block_table", block_table, query)
    tokens = block_table.shape[1] * key.shape[2]
    if not torch.compiler.is_compiling() and query.shape[2] + tokens >= check.MAX_TOKENS:
        raise ValueError(
            f"block_table: room for {tokens} keys and {query.shape[2]} queries, "
            f"expected less than {check.MAX_TOKENS} tokens together"
        )


def beside_query(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    check.same(name, "batch size", x.shape[0], query.shape[0], "query")
    if x.device != query.device:
        raise ValueError(f"{name}: device is {x.device}, expected {query.device} as query")


def fake_index(query, key, heads, q_block, kv_block, budget, block_table):
    """Empty (indices, counts) with room for what a budget allows."""
    tokens = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
    places = torch.sym_min(-(-budget // kv_block), (tokens + kv_block - 1) // kv_block)
    shape = (query.shape[0], heads, (query.shape[2] + q_block - 1) // q_block)
    return (
        query.new_empty((*shape, places), dtype=torch.int32),
        query.new_empty(shape, dtype=torch.int32),
    )

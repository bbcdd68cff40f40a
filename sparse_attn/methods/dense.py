"""Exact attention over everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..block_index import BlockIndex
from ..registry import Op


@dataclass(frozen=True)
class Dense:
    """Every (causally visible) key, by the same kernel as the sparse methods."""

    name: ClassVar[str] = "dense"

    def why_not(self, query: torch.Tensor, key: torch.Tensor, causal: bool) -> str | None:
        return None

    def selector(
        self, query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float | None
    ) -> tuple[Op, tuple[Any, ...]] | None:
        return None

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        backend: str | None = None,
    ) -> BlockIndex:
        # no block is listed: a sink as long as the keys says the same without a list
        blocks = (query.shape[2] + 127) // 128
        indices = query.new_empty((query.shape[0], 1, blocks, 0), dtype=torch.int32)
        counts = query.new_zeros((query.shape[0], 1, blocks), dtype=torch.int32)
        return BlockIndex(indices, counts, 128, 128, sink=key.shape[2])


METHOD = Dense

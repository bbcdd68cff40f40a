"""FlexPrefill: block selection by cumulative attention score (arXiv 2502.20766)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..block_index import BlockIndex
from ..ops import flex_prefill_select as ops
from ..registry import Op
from . import _by_head as by_head


@dataclass(frozen=True)
class FlexPrefill:
    """Chooses blocks by what the last queries of the prompt attend to.

    Attributes:
        gamma: share of the attention mass to keep (paper: gamma); above 0, default 0.95. 1 or
            more keeps every block. One number, or one per query head.
        tau: a head whose pooled estimate is closer than this to its true block map, as the square
            root of the Jensen-Shannon divergence, chooses per query block (paper: tau, sec. 3.2);
            0 or more, default 0.1.
        min_budget: least tokens kept in each direction, vertical and slash; default 1024.
        max_budget: most tokens kept in each direction, None for no bound. It wins over gamma.
        block_size: tokens per block; 1 to 128 (`official`: 16, 32, 64, 128), default 128.
        variant: "exact" (ours) or "official" (the published code's choices, for comparison).
    """

    gamma: float | tuple[float, ...] = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int = 128
    variant: str = "exact"

    name: ClassVar[str] = "flex_prefill"
    by_head: ClassVar[str] = "gamma"

    def __post_init__(self) -> None:
        by_head.freeze(self)
        for gamma in by_head.each(self):
            ops.check_options(
                gamma, self.tau, self.min_budget, self.max_budget, self.block_size, self.variant
            )

    def why_not(self, query: torch.Tensor, key: torch.Tensor, causal: bool) -> str | None:
        by_head.check_heads(self, query)
        return ops.why_not(causal)

    def selector(
        self, query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float | None
    ) -> tuple[Op, tuple[Any, ...]]:
        gamma = max(by_head.each(self))  # of the choice as a whole: what keeps most
        return ops.op, (
            query, key, gamma, self.tau, self.min_budget, self.max_budget, self.block_size,
            self.variant, causal, scale,
        )  # fmt: skip

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        backend: str | None = None,
    ) -> BlockIndex:
        if by_head.values(self):
            return by_head.select(self, query, key, causal=causal, scale=scale, backend=backend)
        op, args = self.selector(query, key, causal, scale)
        indices, counts, _ = op(*args, backend=backend)
        return BlockIndex(indices, counts, self.block_size, self.block_size)


METHOD = FlexPrefill

"""FlexPrefill: block selection by cumulative attention score (arXiv 2502.20766)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..block_index import BlockIndex
from ..ops import flex_prefill_select as ops
from ..registry import Op


@dataclass(frozen=True)
class FlexPrefill:
    """Chooses blocks by what the last queries of the prompt attend to.

    Attributes:
        gamma: share of the attention mass to keep (paper: gamma); above 0, default 0.95. 1 or
            more keeps every block.
        tau: a head whose pooled estimate is closer than this to its true block map, as the square
            root of the Jensen-Shannon divergence, chooses per query block (paper: tau, sec. 3.2);
            0 or more, default 0.1.
        min_budget: least tokens kept in each direction, vertical and slash; default 1024.
        max_budget: most tokens kept in each direction, None for no bound. It wins over gamma.
        block_size: tokens per block; 1 to 128 (`official`: 16, 32, 64, 128), default 128.
        variant: "exact" (ours) or "official" (the published code's choices, for comparison).
    """

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int = 128
    variant: str = "exact"

    name: ClassVar[str] = "flex_prefill"

    def __post_init__(self) -> None:
        ops.check_options(
            self.gamma, self.tau, self.min_budget, self.max_budget, self.block_size, self.variant
        )

    def why_not(self, query: torch.Tensor, key: torch.Tensor, causal: bool) -> str | None:
        return ops.why_not(causal)

    def selector(
        self, query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float | None
    ) -> tuple[Op, tuple[Any, ...]]:
        return ops.op, (
            query, key, self.gamma, self.tau, self.min_budget, self.max_budget, self.block_size,
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
        op, args = self.selector(query, key, causal, scale)
        indices, counts, _ = op(*args, backend=backend)
        return BlockIndex(indices, counts, self.block_size, self.block_size)


METHOD = FlexPrefill

"""InfiniteHiP: stages that prune chunks of keys (arXiv 2502.08910)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ops import hip_prune_select as ops
from ..registry import Op
from . import _by_head as by_head
from .hip import Search


@dataclass(frozen=True)
class InfiniteHiP(Search):
    """Prunes all keys to the budget of the last stage, beside a sink and a window.

    Attributes:
        chunks: tokens per chunk of each stage (paper: l_c); each divides the one before, the last,
            1 to 128, is the block size of the choice. Default (256, 32, 8), as in the paper.
        keeps: tokens that each stage keeps; the last is the budget. Default (32768, 8192, 2048).
            Or a tuple of them, one per query head, with `merge_heads="none"`.
        q_strides: in each stage every so many queries votes (b_sq); default (4, 4, 1).
        q_block: queries that share a choice (b_q); 1 to 128, default 64.
        sink: first tokens that every query attends to (n_sink); default 256.
        window: last tokens that every query attends to (n_stream); default 1024.
        representative: the key that half a chunk is judged by, its "centre" (published code) or its
            "first" (paper).
        merge_heads: "none": each query head chooses for itself; "group": the heads of a KV head
            together; "all": one choice for all heads (published code).
    """

    chunks: tuple[int, ...] = (256, 32, 8)
    keeps: tuple[int, ...] | tuple[tuple[int, ...], ...] = (32768, 8192, 2048)
    q_strides: tuple[int, ...] = (4, 4, 1)
    q_block: int = 64
    sink: int = 256
    window: int = 1024
    representative: str = "centre"
    merge_heads: str = "none"

    name: ClassVar[str] = "infinite_hip"
    by_head: ClassVar[str] = "keeps"

    def __post_init__(self) -> None:
        by_head.freeze(self)
        for keeps in by_head.each(self):
            ops.check_options(
                self.chunks, keeps, self.q_strides, self.q_block, self.sink, self.window,
                self.representative, self.merge_heads,
            )  # fmt: skip
        by_head.refuse_shared(self, "merge_heads", "none")
        for name in ("chunks", "q_strides"):  # a list has no hash
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def kv_block(self) -> int:
        return self.chunks[-1]

    def selector(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        causal: bool,
        scale: float | None,
        block_table: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
    ) -> tuple[Op, tuple[Any, ...]]:
        # by stage the most that a head keeps
        keeps = [max(stage) for stage in zip(*by_head.each(self), strict=True)]
        return ops.op, (
            query, key, list(self.chunks), keeps, list(self.q_strides), self.q_block,
            self.sink, self.window, self.representative, self.merge_heads, causal, scale,
            block_table, kv_lengths,
        )  # fmt: skip


METHOD = InfiniteHiP

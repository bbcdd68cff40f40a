"""Squeezed Attention over a prepared context (arXiv 2411.09688)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..block_index import BlockIndex
from ..ops.squeezed_lookup import op as lookup
from ..reference.squeezed_attend import token_mask
from ..registry import Op

if TYPE_CHECKING:
    from ..squeezed import SqueezedLayer

Q_BLOCK = 128  # one choice serves all queries of a call, whatever the block


@dataclass(frozen=True)
class Squeezed:
    """Keeps the clusters of a fixed context that the queries of the call score highest.

    `key` and `value` are the whole sequence in its order: the context that was prepared, then the
    input and what was generated. This shows and checks the choice on any cache; to save the time
    and the second copy of the context, decode over the sorted one: `SqueezedLayer.attention`, or
    `SqueezedCache` for Hugging Face models.

    Attributes:
        context: the layer's part of a prepared context, `SqueezedContext.load(path).layers[i]`. Its
            threshold (paper: T) comes from the sparsity that it was calibrated for.
    """

    context: SqueezedLayer | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "squeezed"
    needs_context: ClassVar[bool] = True  # cannot be used by its name alone

    def __post_init__(self) -> None:
        from ..squeezed import SqueezedLayer

        if self.context is not None and not isinstance(self.context, SqueezedLayer):
            raise TypeError(
                f"context: got {type(self.context).__name__}, expected a SqueezedLayer such as "
                "SqueezedContext.load(path).layers[i]"
            )

    def why_not(self, query: torch.Tensor, key: torch.Tensor, causal: bool) -> str | None:
        if self.context is None:
            return (
                "it needs a prepared context: Squeezed(context=SqueezedContext.load(path)"
                ".layers[i]); python -m sparse_attn squeeze build prepares one"
            )
        if not causal:
            return "the input behind the context is attended to causally; use causal=True"
        n_keys, n_queries, context = key.shape[2], query.shape[2], self._length()
        if n_keys - n_queries < context:
            return (
                f"its context has {context} tokens, all before the queries; these {n_queries} "
                f"queries stand behind {n_keys - n_queries} keys. Attend to the context itself "
                "with method='dense'"
            )
        for what, mine, theirs in (
            ("KV heads", self.context.key.shape[1], key.shape[1]),
            ("head_dim", self.context.key.shape[3], key.shape[3]),
            ("dtype", self.context.key.dtype, key.dtype),
            ("device", self.context.key.device, key.device),
        ):
            if mine != theirs:
                return f"its context has {what} {mine}, the keys have {theirs}"
        return None

    def _length(self) -> int:
        return self.context.key.shape[2] + self.context.window_key.shape[2]

    def selector(
        self, query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float | None
    ) -> tuple[Op, tuple[Any, ...]]:
        return lookup, (query, *self.context.lookup)

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        backend: str | None = None,
    ) -> BlockIndex:
        if not self.context.has_scale(scale):
            own = self.context.own_scale
            given = "1 / sqrt(D)" if scale is None else scale
            raise NotImplementedError(
                f"method 'squeezed': the call's scale is {given}, its context was prepared with "
                f"{own}, which its threshold belongs to: call it with scale={own}"
            )
        op, args = self.selector(query, key, causal, scale)
        starts, sums, counts, _ = op(*args, backend=backend)
        layer = self.context
        kept = token_mask(starts, sums, counts, layer.key.shape[2])
        order = layer.order.long().repeat_interleave(kept.shape[1] // layer.order.shape[1], 1)
        by_position = torch.zeros_like(kept).scatter_(-1, order.expand(kept.shape), kept)
        near = kept.new_ones((*kept.shape[:2], key.shape[2] - kept.shape[2]))
        mask = torch.cat([by_position, near], -1)[:, :, None]
        index = BlockIndex.from_mask(mask, Q_BLOCK, 1)
        rows = -(-query.shape[2] // Q_BLOCK)
        return BlockIndex(
            index.indices.expand(-1, -1, rows, -1), index.counts.expand(-1, -1, rows), Q_BLOCK, 1
        )


METHOD = Squeezed

"""`BlockIndex`: the one value that travels from a selector to the attention operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .brief import brief
from .ops import _checks as check
from .reference.block_sparse_attention import block_mask, check_index

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class BlockIndex(NamedTuple):
    """Which keys each block of queries attends to; fixed capacity, device only.

    Those of the blocks listed, the first `sink` tokens and the last `window` tokens up to each
    query, a key in several of these once.

    Attributes:
        indices: int32 [B, H', Mq, K], KV block ids, ascending and unique in their first `counts`
            places; the rest is never read. H' is 1, Hkv or Hq.
        counts: int32 [B, H', Mq], how many blocks are listed.
        q_block: queries per block, 1 to 128. Query i of the call is in block i // q_block.
        kv_block: keys per block, 1 to 128.
        sink: first tokens that every query attends to, 0 or more.
        window: last tokens, up to and with its own, that every query attends to, 0 or more.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    q_block: int
    kv_block: int
    sink: int = 0
    window: int = 0

    __repr__ = brief

    @property
    def blocks(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """What operators take of an index in one piece: indices, counts, q_block, kv_block."""
        return self[:4]

    @classmethod
    def from_mask(
        cls, mask: torch.Tensor, q_block: int, kv_block: int, max_blocks: int | None = None
    ) -> BlockIndex:
        """From a bool mask [B, H', Mq, Nk].

        `max_blocks` bounds the capacity K; ValueError if a row has more blocks than that, which is
        found by reading the device. Without `max_blocks` nothing is read.
        """
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise ValueError(
                f"mask: expected bool [B, H, Mq, Nk], got {mask.dtype} {tuple(mask.shape)}"
            )
        check.block_size("q_block", q_block)
        check.block_size("kv_block", kv_block)
        if max_blocks is not None:
            check.not_negative("max_blocks", max_blocks)
        counts = mask.sum(-1, dtype=torch.int32)
        indices = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        if max_blocks is not None and max_blocks < mask.shape[-1]:
            most = int(counts.max()) if counts.numel() else 0
            if most > max_blocks:
                raise ValueError(f"max_blocks: got {max_blocks}, but a row has {most} blocks")
            indices = indices[..., :max_blocks]
        return cls(indices.to(torch.int32).contiguous(), counts, q_block, kv_block)

    @classmethod
    def full(
        cls, n_queries: int, n_keys: int, q_block: int = 128, kv_block: int = 128, **factory: Any
    ) -> BlockIndex:
        """Lists every causally visible block, [1, 1, Mq, Nk]; `factory` goes to torch.arange."""
        check.block_size("q_block", q_block)
        check.block_size("kv_block", kv_block)
        n_blocks = -(-n_keys // kv_block)
        last = torch.arange(-(-n_queries // q_block), **factory) * q_block + q_block - 1
        last = last.clamp(max=n_queries - 1) + n_keys - n_queries
        block = torch.arange(n_blocks, **factory)
        return cls.from_mask((block * kv_block <= last[:, None])[None, None], q_block, kv_block)

    def expand(self, batch: int) -> BlockIndex:
        """The same index for each of `batch` sequences, without a copy, if it is for one."""
        if self.indices.shape[:1] != (1,) or batch == 1:
            return self
        indices = self.indices.expand(batch, *self.indices.shape[1:])
        counts = self.counts.expand(batch, *self.counts.shape[1:])
        return self._replace(indices=indices, counts=counts)

    def to_mask(self, n_keys: int) -> torch.Tensor:
        """The listed blocks as bool [B, H', Mq, ceil(n_keys / kv_block)].

        ValueError if a listed block lies beyond the keys; this check reads the device.
        NotImplementedError with a sink or a window: they are no whole blocks.
        """
        self._blocks_only("to_mask", "computed() gives the blocks that hold a key of either")
        return self._listed(n_keys)

    def _listed(self, n_keys: int) -> torch.Tensor:
        self._in_lists(n_keys)
        return block_mask(self.indices, self.counts, -(-n_keys // self.kv_block))

    def _in_lists(self, n_keys: int) -> torch.Tensor:
        """Which places of the lists are in use, bool as `indices`; raises if a block is beyond."""
        n_blocks = -(-n_keys // self.kv_block)
        listed = torch.arange(self.indices.shape[-1], device=self.indices.device)
        listed = listed < self.counts[..., None]
        beyond = listed & (self.indices >= n_blocks)
        if beyond.any():
            raise ValueError(
                f"n_keys: got {n_keys}, {n_blocks} blocks of {self.kv_block}, but block "
                f"{int(self.indices[beyond].max())} is listed"
            )
        return listed

    def _blocks_only(self, name: str, instead: str) -> None:
        if self.sink or self.window:
            raise NotImplementedError(
                f"{name}: the index has a sink of {self.sink} and a window of {self.window} "
                f"tokens, which blocks cannot express; {instead}, and "
                "index._replace(sink=0, window=0) has the listed blocks alone"
            )

    def computed(self, n_queries: int, n_keys: int, causal: bool = True) -> torch.Tensor:
        """The blocks in which a pair is computed, bool [B, H', Mq, ceil(n_keys / kv_block)].

        Those that are listed or hold a key of the sink or of the window of one of their queries;
        with `causal` none above the diagonal. Reads the device, as `to_mask`.
        """
        mask = self._listed(n_keys)
        key = torch.arange(mask.shape[3], device=mask.device) * self.kv_block  # first of a block
        first = torch.arange(mask.shape[2], device=mask.device)[:, None] * self.q_block
        last = (first + self.q_block).clamp(max=n_queries) - 1 + n_keys - n_queries
        first = first + n_keys - n_queries
        near = (key + self.kv_block > first - self.window + 1) & (key <= last)
        mask = mask | (key < self.sink) | (near & (self.window > 0))
        return mask & (key <= last) if causal else mask

    def transpose(self, n_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The index from the side of the keys, (offsets, rows); nothing is read on the host.

        rows int32 [B, H', Mq * K] holds, from offsets[..., j] up to offsets[..., j + 1], the query
        blocks that list KV block j, ascending; offsets is int32 [B, H', Nk + 1].
        NotImplementedError with a sink or a window.
        """
        self._blocks_only("transpose", "give both to the operator beside the blocks")
        n_blocks, capacity = -(-n_keys // self.kv_block), self.indices.shape[-1]
        place = torch.arange(capacity, device=self.indices.device)
        # what a wrong list holds beside ids of blocks is left out
        listed = (place < self.counts[..., None]) & (self.indices >= 0)
        listed = listed & (self.indices < n_blocks)
        blocks = torch.where(listed, self.indices, n_blocks).flatten(2)
        blocks, order = blocks.sort(dim=-1, stable=True)  # in the order of the rows
        bounds = torch.arange(n_blocks + 1, dtype=torch.int32, device=blocks.device)
        bounds = bounds.expand(*blocks.shape[:2], -1).contiguous()
        offsets = torch.searchsorted(blocks, bounds, out_int32=True)
        return offsets, (order // max(capacity, 1)).to(torch.int32)

    def validate(self, n_queries: int, n_keys: int) -> None:
        """Raises ValueError or RuntimeError unless the index is legal for these lengths."""
        for name, x, rank in (("indices", self.indices, 4), ("counts", self.counts, 3)):
            if x.dtype != torch.int32 or x.dim() != rank:
                raise ValueError(
                    f"{name}: expected int32 with {rank} dimensions, got {x.dtype} {tuple(x.shape)}"
                )
        check.block_size("q_block", self.q_block)
        check.block_size("kv_block", self.kv_block)
        if self.counts.shape != self.indices.shape[:3]:
            raise ValueError(
                f"counts: shape {tuple(self.counts.shape)}, expected "
                f"{tuple(self.indices.shape[:3])} as in indices"
            )
        expected = -(-n_queries // self.q_block)
        if self.indices.shape[2] != expected:
            raise ValueError(
                f"indices: {self.indices.shape[2]} query blocks, expected {expected} for "
                f"{n_queries} queries in blocks of {self.q_block}"
            )
        check.not_negative("sink", self.sink)
        check.not_negative("window", self.window)
        check_index(self.indices, self.counts, -(-n_keys // self.kv_block))

    def density(self, n_queries: int, n_keys: int, causal: bool = True) -> float:
        """Share of the (causally visible) blocks in which a pair is computed; read on the host.

        Listed blocks above the causal diagonal do not count, since they are never computed. As
        many as `computed` marks, counted from the lists: that takes no more memory than they do.
        """
        listed, n_blocks = self._in_lists(n_keys), -(-n_keys // self.kv_block)
        first = torch.arange(self.indices.shape[2], device=self.indices.device) * self.q_block
        last = (first + self.q_block).clamp(max=n_queries) - 1 + n_keys - n_queries
        first = first + n_keys - n_queries
        # ends of ranges of blocks [Mq]: visible, of the sink, and where the window's begins
        seen = (last // self.kv_block + 1).clamp(0, n_blocks)
        end = seen if causal else torch.full_like(seen, n_blocks)
        sink = end.clamp(max=-(-self.sink // self.kv_block))
        near = ((first - self.window + 1) // self.kv_block).clamp(min=0) if self.window else seen
        alone = listed & (self.indices >= sink[:, None]) & (self.indices < end[:, None])
        alone &= (self.indices < near[:, None]) | (self.indices >= seen[:, None])
        always = sink + (seen - torch.maximum(near, sink)).clamp(min=0)
        batch, heads = self.indices.shape[:2]
        computed = int(alone.sum()) + batch * heads * int(always.sum())
        return computed / max(batch * heads * int(end.sum()), 1)

    def to_flex(self, n_queries: int, n_keys: int, causal: bool = True) -> BlockMask:
        """The same pattern for FlexAttention.

        With `causal` the mask function keeps keys up to the query's bottom-right aligned position;
        with a sink or a window it looks up the listed blocks, too. Compile `flex_attention`: run
        eagerly it ignores the listed blocks.
        """
        from torch.nn.attention.flex_attention import BlockMask

        index = BlockIndex.from_mask(
            self.computed(n_queries, n_keys, causal), self.q_block, self.kv_block
        )
        offset, (_, _, q_block, kv_block, sink, window) = n_keys - n_queries, self

        def up_to_query(b: Any, h: Any, q: Any, k: Any) -> Any:
            return k <= q + offset

        mask_mod = up_to_query if causal else None
        if sink or window:
            listed = self._listed(n_keys)
            batch, heads = listed.shape[:2]

            def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
                of = listed[b if batch > 1 else 0, h if heads > 1 else 0]
                near = (k <= q + offset) & (k > q + offset - window)
                seen = of[q // q_block, k // kv_block] | (k < sink) | near
                return seen & (k <= q + offset) if causal else seen

        return BlockMask.from_kv_blocks(
            index.counts,
            index.indices,
            BLOCK_SIZE=(self.q_block, self.kv_block),
            mask_mod=mask_mod,
            seq_lengths=(n_queries, n_keys),
        )

    @classmethod
    def from_flex(cls, mask: BlockMask) -> BlockIndex:
        """The block lists of a FlexAttention BlockMask, partial and full blocks together.

        Its mask function is not carried over: give `causal` to the attention operator.
        """
        q_block, kv_block = mask.BLOCK_SIZE
        n_blocks = -(-mask.seq_lengths[1] // kv_block)
        listed = block_mask(mask.kv_indices, mask.kv_num_blocks, n_blocks)
        if mask.full_kv_indices is not None:
            listed = listed | block_mask(mask.full_kv_indices, mask.full_kv_num_blocks, n_blocks)
        return cls.from_mask(listed, q_block, kv_block)

    def plot(self, n_queries: int, n_keys: int, *, causal: bool = True, batch: int = 0) -> Any:
        """A matplotlib figure, one panel per head: computed blocks over the visible ones.

        Raises ImportError without matplotlib (`pip install sparse_attn[plot]`).
        """
        from .plot import plot_index

        return plot_index(self, n_queries, n_keys, causal=causal, batch=batch)

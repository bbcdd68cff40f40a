"""HiP: a tree search for the keys of a query block (arXiv 2406.09827), reused in decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..block_index import BlockIndex
from ..ops import _checks as check
from ..ops import hip_select as ops
from ..ops._hip_kernels import n_tokens
from ..ops.block_sparse_attention import op as attend
from ..registry import Op
from . import _by_head as by_head


class Search:
    """What `HiP` and `InfiniteHiP` share: an operator that takes caches, a sink and a window."""

    takes_cache: ClassVar[bool] = True

    def why_not(self, query: torch.Tensor, key: torch.Tensor, causal: bool) -> str | None:
        by_head.check_heads(self, query)
        return None

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        backend: str | None = None,
        block_table: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
    ) -> BlockIndex:
        if by_head.values(self):
            return by_head.select(
                self, query, key, causal=causal, scale=scale, backend=backend,
                block_table=block_table, kv_lengths=kv_lengths,
            )  # fmt: skip
        op, args = self.selector(query, key, causal, scale, block_table, kv_lengths)
        indices, counts = op(*args, backend=backend)
        return BlockIndex(indices, counts, self.q_block, self.kv_block, self.sink, self.window)


@dataclass(frozen=True)
class HiP(Search):
    """Keeps about `budget` tokens per query block, beside a sink and a window.

    Attributes:
        budget: tokens that the search keeps (paper: k); 1 or more, default 512. One number, or
            one per query head, without `share_kv_heads`.
        q_block: queries that share a choice (b_q); 1 to 128, default 64 (paper: 32, 64).
        kv_block: tokens per block of keys (b_k); 1 to 128, default 2.
        q_stride: every so many queries votes (b_sq); 1 to 128, default 2; q_block
            or more: only its last.
        key_stride: every so many keys of a block is scored (b_sk); 1 to 128, default 1.
        sink: first tokens that every query attends to (n_sink); default 16.
        window: last tokens that every query attends to (sw); default 256.
        representative: what a chunk of blocks is judged by, its "centre" (paper) or its "first".
        branch: parts that a chunk splits into, 2 (paper) or 4 (default): half the rounds, as many
            keys read, more found.
        share_kv_heads: one choice for the query heads of a KV head, by the best score of any of
            them, instead of one per query head (paper).
    """

    budget: int | tuple[int, ...] = 512
    q_block: int = 64
    kv_block: int = 2
    q_stride: int = 2
    key_stride: int = 1
    sink: int = 16
    window: int = 256
    representative: str = "centre"
    branch: int = 4
    share_kv_heads: bool = False

    name: ClassVar[str] = "hip"
    by_head: ClassVar[str] = "budget"

    def __post_init__(self) -> None:
        by_head.freeze(self)
        for budget in by_head.each(self):
            ops.check_options(
                budget, self.q_block, self.kv_block, self.q_stride, self.key_stride, self.sink,
                self.window, self.representative, self.branch,
            )  # fmt: skip
        check.boolean("share_kv_heads", self.share_kv_heads)
        by_head.refuse_shared(self, "share_kv_heads", False)

    def selector(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        causal: bool,
        scale: float | None,
        block_table: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
    ) -> tuple[Op, tuple[Any, ...]]:
        budget = max(by_head.each(self))
        return ops.op, (
            query, key, budget, self.q_block, self.kv_block, self.q_stride, self.key_stride,
            self.sink, self.window, self.representative, self.branch, self.share_kv_heads, causal,
            scale, block_table, kv_lengths,
        )  # fmt: skip


class HiPState:
    """One layer's choice while decoding: searched for every `refresh` tokens, reused in between.

    Between two searches tokens leave the window of the first; nobody searched them. So the window
    attended to is always wider than that of the search, by refresh - 1 tokens: no key is ever
    invisible, and the shapes and numbers of a step do not depend on the age of the choice, which a
    CUDA graph needs. Nothing is read from the device.

        state = HiPState(HiP(budget=512, share_kv_heads=True), refresh=8)
        out, lse = state.attention(query, key, value)  # once per step, key with the new token

    In parts, which can be captured as graphs: `search` and `attend` only compute, `advance` only
    keeps the books and is called once per step, graphs or not.

        if state.advance(query, key):  # on the host
            state.search(query, key)
        out, lse = state.attend(query, key, value)

    Attributes:
        config: what is searched for, and with which budget.
        refresh: tokens from one search to the next (paper: r_m); 1 searches every time.
        index: the choice in use, None before the first.
        age: tokens since the search that made it, as `advance` counts them.
    """

    def __init__(self, config: HiP | None = None, refresh: int = 8) -> None:
        check.integer("refresh", refresh)
        if refresh < 1:
            raise ValueError(f"refresh: got {refresh}, expected 1 or more")
        if config is not None and not isinstance(config, HiP):
            raise TypeError(f"config: got {config!r}, expected a HiP, such as HiP(budget=512)")
        self.config = HiP(share_kv_heads=True) if config is None else config
        self.refresh = refresh
        self.reset()

    def reset(self) -> None:
        """Forgets the choice: for a new sequence, or one that was cut or reordered."""
        self.index: BlockIndex | None = None
        self.age = 0
        self._searched: tuple[int, int, int, bool] | None = None

    @property
    def window(self) -> int:
        """Tokens that a step attends to besides the blocks and the sink."""
        return self.config.window + self.refresh - 1

    def advance(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        block_table: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
    ) -> bool:
        """Counts one step, and says whether it has to search; once per step, before its `search`.

        A host decision from shapes and the age, which it moves. A step searches when there is no
        choice, when the choice would be `refresh` tokens old, and when the shapes are not those of
        a next step: another batch, other numbers of queries (where either has several blocks of
        them), keys skipped or gone. With `kv_lengths`, whose values the host does not know, shapes
        do not tell how many keys there are: then the age decides, unless the cache has less room
        than before.
        """
        batch, steps = query.shape[0], query.shape[2]
        now = (batch, steps, n_tokens(key, block_table), kv_lengths is not None)
        due = self.index is None or not self._follows(now)
        if due:
            self.age, self._searched = 0, now
        else:
            self.age += steps
        return due

    def _follows(self, now: tuple[int, int, int, bool]) -> bool:
        """Whether a step may use the choice that was searched for."""
        if self._searched is None:
            return False
        batch, steps, keys, has_lengths = now
        was_batch, was_steps, was_keys, had_lengths = self._searched
        # a block's search ends at the window of its last query, so blocks may not change places
        # among the last tokens; the last block, if it is the only one, ends where the keys do
        same = steps == was_steps or max(steps, was_steps) <= self.config.q_block
        grown = keys >= was_keys if has_lengths else keys - was_keys == self.age + steps
        alike = batch == was_batch and has_lengths == had_lengths
        return alike and same and grown and self.age + steps < self.refresh

    def search(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        scale: float | None = None,
        backend: str | None = None,
        block_table: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
    ) -> None:
        """Makes a new choice, in the memory of the old one where it has the same shape."""
        old, self.index = self.index, None  # none, if this fails
        new = self.config.select(
            query.detach(), key.detach(), scale=scale, backend=backend, block_table=block_table,
            kv_lengths=kv_lengths,
        )  # fmt: skip
        if old is not None and old.indices.shape == new.indices.shape:
            old.indices.copy_(new.indices)
            old.counts.copy_(new.counts)
            self.index = old
        else:
            self.index = new._replace(window=self.window)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None = None,
        backend: str | None = None,
        block_table: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) over the choice in use, the sink and the widened window."""
        if self.index is None:
            raise RuntimeError("nothing has been chosen yet: call search() or attention() first")
        return attend(
            query, key, value, *self.index.blocks, True, self.index.sink, self.index.window, scale,
            block_table, kv_lengths, backend=backend,
        )  # fmt: skip

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None = None,
        backend: str | None = None,
        block_table: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step: (out, lse) of the last queries [B, Hq, Tq, D] on key and value [B, Hkv, Tk, D].

        Causal; searches where `advance` says so. A cache of fixed size needs `kv_lengths` [B], how
        many keys each sequence has, the new ones counted; with `block_table` it is one of pages, as
        in `sparse_attn.attention`. Then the caller resets where a step does not follow the last.
        """
        cache = {"block_table": block_table, "kv_lengths": kv_lengths}
        if self.advance(query, key, **cache):
            self.search(query, key, scale=scale, backend=backend, **cache)
        return self.attend(query, key, value, scale=scale, backend=backend, **cache)


METHOD = HiP

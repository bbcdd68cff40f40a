"""What the plans of block_sparse_attention and squeezed_attend share: tiles of rows, scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import launch

DIMS = (64, 96, 128, 256)
STAGES, WORK_BYTES = 3, 256


class Rows(NamedTuple):
    """Queries and heads of a tile, and the AttentionTile that a kernel is compiled for."""

    dim: int
    rows: int
    queries: int
    heads: int
    query_tiles: int
    head_tiles: int

    @property
    def keys(self) -> int:
        return 64 if self.dim <= 128 else 32

    @property
    def threads(self) -> int:
        return 32 * (self.keys // 16 if self.rows == 16 else 4)

    def shared_bytes(self, paged: bool = False) -> int:
        tokens = 2 * self.keys * 4 * (2 if paged else 1)
        return self.rows * self.dim * 2 + STAGES * self.keys * self.dim * 2 + tokens + WORK_BYTES


def rows_of(widest: int, n_queries: int, n_heads: int, share: bool = True) -> Rows:
    """`n_queries` of `n_heads` heads, which a tile can `share`, cut into tiles."""
    dim = next(d for d in DIMS if d >= widest)
    most = 128 if dim <= 128 else 64
    queries = min(n_queries, most)
    heads = min(n_heads, most // queries) if share else 1
    used = queries * heads
    rows = 16 if used <= 16 else 64 if used <= 64 else 128
    return Rows(dim, rows, queries, heads, -(-n_queries // queries), -(-n_heads // heads))


def place(p: Any, found: Any, memory: int) -> int:
    """Fills what the plan decides; returns the bytes that `memory` must have."""
    for name, _ in p._fields_:
        if name in found._fields:
            setattr(p, name, getattr(found, name))
    p.done = memory
    p.part_values = memory + found.done_bytes
    p.part_stats = memory + found.done_bytes + found.values_bytes
    return found.done_bytes + found.values_bytes + found.stats_bytes


def run(op: str, p: Any, place: Callable[..., int], found: Any, device: torch.device) -> None:
    """Launches an operator's kernel as planned; `place` is the operator's."""
    workspace = torch.empty(place(p, found, 0), dtype=torch.uint8, device=device)
    place(p, found, workspace.data_ptr())
    workspace[: found.done_bytes].zero_()
    name = f"{op}_kernel<{launch.NAMES[p.dtype]}, {found.dim}, {found.rows}>"
    launch.run(op, name, found.launch, p, device)

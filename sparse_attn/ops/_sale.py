"""What SALE's operators share: groups of steps, the geometry of a query block, argument checks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..reference.block_sparse_attention import block_mask
from . import _checks as check

GROUPS = ("query", "key")
Q_BLOCKS, KV_BLOCKS = (16, 32, 64, 128), (16, 32, 64)
PIECE = 1 << 26  # bytes of products at a time: a GPU wants few launches
PIECE_CPU = 1 << 21  # and a CPU what its cache holds
GRID = "int q_block=64, int kv_block=32, SymInt local=128, SymInt sink=32"


def n_groups(length, group, block):
    """How many steps `length` tokens have; "token", one each, is for the reference alone."""
    if group == "query":
        return 8 * ((length + 15) // 16)
    if group == "key":
        return 4 * ((length + block - 1) // block)
    return length


def group_of(token: torch.Tensor, group: str, block: int) -> torch.Tensor:
    """The place of each token's step."""
    if group == "query":
        return token // 16 * 8 + token % 8
    if group == "key":
        return token // block * 4 + token % 8 // 2
    return token


class Grid(NamedTuple):
    """Blocks of keys by query block, int64 [Mq]: all in [0, seen) are visible to some row.

    The reference region is [0, sink) and [local, seen); the middle [sink, local), which every row
    sees whole, is chosen from. 0 <= sink <= local <= seen.
    """

    sink: torch.Tensor
    local: torch.Tensor
    seen: torch.Tensor


def grid(n_queries, n_keys, q_block, kv_block, local, sink, device, official=False) -> Grid:
    """The geometry of every query block; `local` and `sink` in tokens.

    `official`, for the reference alone: the published code's last four to seven blocks, so many
    that the middle of a sink of one block is a multiple of four, in place of `local`.
    """
    local, sink = (min(tokens, n_keys + 128) for tokens in (local, sink))  # nothing overflows
    first = n_keys - n_queries + torch.arange(0, n_queries, q_block, device=device)
    last = (first + q_block - 1).clamp(max=n_keys - 1)
    seen = torch.where(last >= 0, last // kv_block + 1, 0)
    own = first.clamp(min=0) // kv_block
    begin = own - ((local + kv_block - 1) // kv_block - 1)
    if official:
        begin = (seen - 4 - (seen - 1) % 4).minimum(own)
    begin = begin.clamp(min=0).minimum(seen)
    return Grid(begin.clamp(max=(sink + kv_block - 1) // kv_block), begin, seen)


def reference_lists(n_queries, n_keys, q_block, kv_block, local, sink, device, official=False):
    """The reference region as (indices, counts) of one head, [1, 1, Mq, K] and [1, 1, Mq]."""
    g = grid(n_queries, n_keys, q_block, kv_block, local, sink, device, official)
    local = max(local, 7 * kv_block) if official else local
    blocks = [(n + kv_block - 1) // kv_block for n in (n_keys, sink, local, q_block + kv_block - 2)]
    place = torch.arange(min(blocks[0], sum(blocks[1:])), device=device)
    sinks = g.sink[:, None]
    indices = torch.where(place < sinks, place, g.local[:, None] + place - sinks)
    counts = g.sink + g.seen - g.local
    return indices[None, None].to(torch.int32), counts[None, None].to(torch.int32)


def list_blocks(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, H, Mq, Nk] as int32 ascending ids, zeros behind them, and counts."""
    counts = mask.sum(-1, dtype=torch.int32)
    blocks = mask.shape[-1]
    place = torch.where(mask, mask.cumsum(-1) - 1, blocks)
    ids = torch.arange(blocks, dtype=torch.int32, device=mask.device).expand_as(mask)
    indices = ids.new_zeros((*mask.shape[:-1], blocks + 1))
    return indices.scatter_(-1, place, ids)[..., :blocks].contiguous(), counts


def union(indices, counts, groups):
    """One list per KV head: what any of its `groups` query heads keeps."""
    mask = block_mask(indices, counts, indices.shape[-1])
    return list_blocks(mask.unflatten(1, (-1, groups)).any(2))


def dots(x, center, vectors):
    """(x [B, H, T, D] - center [B, H, D]) times vectors [B, H, N, D]: float32 [B, H * N, T].

    In pieces of tokens, whose temporaries take at most about three times PIECE, however long x is.
    Products are summed element by element, not by a matrix product, which may round to fewer bits.
    """
    out = vectors.new_empty((*vectors.shape[:3], x.shape[2]))
    of_token = vectors.element_size() * max(1, vectors.numel())  # bytes of its products
    piece = max(1, (PIECE_CPU if x.device.type == "cpu" else PIECE) // of_token)
    for start in range(0, x.shape[2], piece):
        part = x[:, :, start : start + piece].to(vectors.dtype)
        part = part if center is None else part - center[:, :, None]
        out[..., start : start + piece] = (part[:, :, None] * vectors[:, :, :, None]).sum(-1)
    return out.flatten(1, 2)


def check_grid(q_block, kv_block, local, sink):
    """The checks of the blocks and the reference region."""
    for name, x, accepted in (("q_block", q_block, Q_BLOCKS), ("kv_block", kv_block, KV_BLOCKS)):
        check.integer(name, x)
        if x not in accepted:
            raise ValueError(f"{name}: got {x}, expected one of {accepted}")
    check.integer("local", local)
    check.between("local", local, 1, check.MAX_INT64)
    check.not_negative("sink", sink)


def check_share(share_kv_heads):
    if not isinstance(share_kv_heads, bool):
        raise TypeError(f"share_kv_heads: got {share_kv_heads!r}, expected True or False")


def check_causal(causal):
    reason = why_not(causal)
    if reason is not None:
        raise ValueError(f"causal: {reason}")


def check_vector(name, x, shape, of):
    """Checks a float32 tensor that goes with another; `shape` is the list of its dimensions."""
    check.tensor(name, x, tuple("BHTD"[: len(shape)]), (torch.float32,))
    check.same(name, "shape", tuple(x.shape), tuple(shape), of)


def check_device(name, x, other, of):
    if x.device != other.device:
        raise ValueError(f"{name}: device is {x.device}, expected {other.device} as {of}")


def check_threshold(query, threshold):
    """A threshold per query head; what it holds is not read."""
    check.tensor("threshold", threshold, ("Hq",), (torch.float32,))
    check.same("threshold", "number of heads", threshold.shape[0], query.shape[1], "query")
    check_device("threshold", threshold, query, "query")


def why_not(causal):
    """Why SALE is not defined for a call, or None."""
    if not causal:
        return "SALE is defined for causal prefill; use method='dense' or causal=True"
    return None

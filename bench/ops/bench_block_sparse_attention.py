"""Block-sparse attention against PyTorch's dense attention and FlexAttention on this CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from sparse_attn import BlockIndex, attention
from sparse_attn.brief import dtype_name
from sparse_attn.ops.block_sparse_attention import op

from ..harness import Report, check, time_in_turn

HEADS, TOKENS, DIM = 8, 8192, 128


def random_index(share: float, block: int, n: int = TOKENS) -> BlockIndex:
    """Random causal blocks with the sink and the diagonal, the same density on every run."""
    blocks = -(-n // block)
    mask = torch.rand(1, HEADS, blocks, blocks, generator=torch.Generator().manual_seed(0)) < share
    mask |= torch.eye(blocks, dtype=torch.bool)
    mask[..., 0] = True
    return BlockIndex.from_mask(mask.tril(), block, block)


def run(report: Report) -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        prefill(report, dtype)
    flex(report)
    decode(report)
    paged_decode(report)


def prefill(report: Report, dtype: torch.dtype) -> None:
    name = dtype_name(dtype)
    query, key, value = (torch.randn(1, HEADS, TOKENS, DIM).to(dtype) for _ in range(3))
    full = BlockIndex.full(TOKENS, TOKENS, 64, 64)
    sparse = {share: random_index(share, 64) for share in (0.1, 0.25, 0.5)}
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    check(f"dense {name}", op(query, key, value, *full.blocks)[0], want, 1e-2)
    alternatives = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        "dense": lambda: op(query, key, value, *full.blocks),
    }
    for share, index in sparse.items():
        alternatives[f"{share}"] = lambda index=index: op(query, key, value, *index.blocks)
    seconds = time_in_turn(alternatives, 5)
    flops = 2 * HEADS * TOKENS**2 * DIM
    report.add(
        f"own dense vs sdpa, {name}, {HEADS} x {TOKENS} x {DIM}",
        seconds["sdpa"] / seconds["dense"],
        ">= 4" if dtype == torch.bfloat16 else ">= 1.2",
        gflops=flops / seconds["dense"] / 1e9,
        sdpa_gflops=flops / seconds["sdpa"] / 1e9,
    )
    for share, index in sparse.items():
        density = index.density(TOKENS, TOKENS)
        ratio = seconds[f"{share}"] / seconds["dense"]
        report.add(
            f"sparse time / own dense time, {name}, 64x64 blocks, density {density:.3f}",
            ratio,
            f"<= {1.15 * density + 0.01:.3f}",
            efficiency=density / ratio,
        )


def flex(report: Report) -> None:
    query, key, value = (torch.randn(1, HEADS, TOKENS, DIM).bfloat16() for _ in range(3))
    index = random_index(0.1, 128)
    mask = index.to_flex(TOKENS, TOKENS)
    compiled = torch.compile(flex_attention)
    check(
        "flex",
        compiled(query, key, value, block_mask=mask),
        op(query, key, value, *index.blocks)[0],
        2e-2,
    )
    seconds = time_in_turn(
        {
            "flex": lambda: compiled(query, key, value, block_mask=mask),
            "ours": lambda: op(query, key, value, *index.blocks),
        },
        5,
    )
    density = index.density(TOKENS, TOKENS)
    report.add(
        f"vs compiled FlexAttention, bfloat16, 128x128 blocks, density {density:.3f}",
        seconds["flex"] / seconds["ours"],
        ">= 5",
        ours_ms=seconds["ours"] * 1e3,
    )


def decode(report: Report) -> None:
    keys = 65536
    query = torch.randn(1, HEADS, 1, DIM).bfloat16()
    key, value = (torch.randn(1, HEADS, keys, DIM).bfloat16() for _ in range(2))
    target = torch.empty_like(key)
    want = F.scaled_dot_product_attention(query, key, value)
    check("decode", attention(query, key, value, "dense"), want, 1e-2)
    seconds = time_in_turn(
        {
            "copy": lambda: target.copy_(key),
            "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
            "ours": lambda: attention(query, key, value, "dense"),
        },
        15,
    )
    size = 2 * key.numel() * key.element_size()  # read k and v; the copy reads and writes one
    report.add(
        "decode, 1 query x 64k keys, bfloat16: bytes/s vs a memory copy",
        seconds["copy"] / seconds["ours"],
        ">= 0.8",
        gb_per_s=size / seconds["ours"] / 1e9,
        sdpa=seconds["copy"] / seconds["sdpa"],
    )


def paged_decode(report: Report) -> None:
    """Four sequences of unequal lengths; the keys in one piece, then in shuffled pages."""
    room = 16384
    lengths = torch.tensor([room, room // 2, 5000, 9001], dtype=torch.int32)
    query = torch.randn(4, HEADS, 1, DIM).bfloat16()
    key, value = (torch.randn(4, 2, room, DIM).bfloat16() for _ in range(2))
    whole = lambda: attention(query, key, value, "dense", kv_lengths=lengths)  # noqa: E731
    alternatives, want = {"one piece": whole}, whole()
    for page_size in (16, 64, 128):
        order = torch.randperm(4 * room // page_size)
        pages = [torch.empty(len(order), page_size, 2, DIM).bfloat16() for _ in range(2)]
        for cache, x in zip(pages, (key, value), strict=True):
            cache[order] = x.transpose(1, 2).reshape(cache.shape)
        pages, table = [x.transpose(1, 2) for x in pages], order.int().view(4, -1)

        def paged(pages=pages, table=table):
            return attention(query, *pages, "dense", block_table=table, kv_lengths=lengths)

        check(f"pages of {page_size}", paged(), want, 0)
        alternatives[f"{page_size}"] = paged
    seconds = time_in_turn(alternatives, 25)
    for page_size in (16, 64, 128):
        report.add(
            f"paged decode / in one piece, 4 sequences, pages of {page_size}, bfloat16",
            seconds[f"{page_size}"] / seconds["one piece"],
            "<= 1.1",
            ms=seconds[f"{page_size}"] * 1e3,
        )

"""FlexPrefill end to end on the structured inputs, beside what any block choice could reach."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_attn import FlexPrefill, attention, select
from sparse_attn.ops.flex_prefill_select import op as choose

from ..harness import DTYPE, DTYPE_NAME, Report, check, time_in_turn
from ..inputs import gen

RECALL = 0.95


def block_mass(query: torch.Tensor, key: torch.Tensor, block: int = 128) -> torch.Tensor:
    """True attention mass per block, [Hq, Mq, Nk], mean over the rows of each query block."""
    heads, n, dim = query.shape[1:]
    blocks = -(-n // block)
    mass = torch.zeros(heads, blocks, blocks)
    for h in range(heads):
        keys = key[0, h // (heads // key.shape[1])].float()
        for m in range(blocks):
            rows = slice(m * block, min(n, (m + 1) * block))
            end = rows.stop
            scores = query[0, h, rows].float() @ keys[:end].T / dim**0.5
            above = torch.ones(len(scores), end).triu(rows.start + 1).bool()
            p = scores.masked_fill_(above, -torch.inf).softmax(-1).mean(0)
            mass[h, m, : m + 1] = F.pad(p, (0, -end % block)).view(-1, block).sum(-1)
    return mass


def best_density(mass: torch.Tensor, recall: float) -> float:
    """Smallest share of causal blocks that any choice needs for the mean recall."""
    values = mass[mass > 0].sort(descending=True).values
    needed = int((values.cumsum(0) < recall * mass.sum()).sum()) + 1
    blocks = mass.shape[1]
    return needed / (mass.shape[0] * blocks * (blocks + 1) / 2)


def run(report: Report) -> None:
    for kind, n in (("sharp", 8192), ("sharp", 32768), ("mixed", 32768)):
        q, k, v = gen(7, n, kind, Hq=8, Hkv=2, D=64)
        query, key, value = (torch.from_numpy(x).transpose(1, 2).to(DTYPE) for x in (q, k, v))
        end_to_end(report, kind, query, key, value)


def end_to_end(
    report: Report, kind: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    n = key.shape[2]
    mass = block_mass(query, key)
    # the fastest of these that keeps enough; the row says which
    configs = [
        FlexPrefill(gamma=g, min_budget=m)
        for g in (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
        for m in (128, 1024)
    ]
    found = []
    for config in configs:
        index = select(query, key, config)
        recall = (mass * index.to_mask(n)[0]).sum().item() / mass.sum().item()
        found.append((config, recall, index.density(n, n)))
    reaching = [x for x in found if x[1] >= RECALL] or [max(found, key=lambda x: x[1])]
    config, recall, density = min(reaching, key=lambda x: x[2])
    wide_key, wide_value = (x.repeat_interleave(4, 1) for x in (key, value))
    sdpa = lambda: F.scaled_dot_product_attention(  # noqa: E731
        query, wide_key, wide_value, is_causal=True
    )
    check("own dense", attention(query, key, value, "dense"), sdpa(), 1e-2)
    index = select(query, key, config)
    part = index._replace(indices=index.indices[:, :, -4:], counts=index.counts[:, :, -4:])
    last = query[:, :, -4 * config.block_size :]
    check(
        "the last rows over the blocks chosen",
        attention(query, key, value, config, fallback=False)[:, :, -last.shape[2] :],
        attention(last, key, value, index=part, backend="reference"),
        1e-2,
    )
    options = (config.gamma, config.tau, config.min_budget)
    seconds = time_in_turn(
        {
            "sdpa": sdpa,
            "dense": lambda: attention(query, key, value, "dense"),
            "flex": lambda: attention(query, key, value, config, fallback=False),
            "select": lambda: choose(query, key, *options),
        },
        5 if n <= 8192 else 3,
    )
    report.add(
        f"FlexPrefill vs sdpa, {DTYPE_NAME}, {kind}, 8 x {n} x 64, recall {recall:.3f}",
        seconds["sdpa"] / seconds["flex"],
        ">= 12" if n == 32768 and kind == "mixed" else "",
        gamma=config.gamma,
        min_budget=config.min_budget,
        density=density,
        best_density=best_density(mass, RECALL),
        vs_own_dense=seconds["dense"] / seconds["flex"],
        select_share=seconds["select"] / seconds["flex"],
        ms=seconds["flex"] * 1e3,
    )

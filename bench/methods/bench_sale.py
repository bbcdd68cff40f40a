"""SALE end to end on the structured inputs, beside what any block choice could reach."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_attn import Sale, attention, select
from sparse_attn.ops.block_sparse_attention import op as attend

from ..harness import DTYPE, DTYPE_NAME, Report, check, time_in_turn
from ..inputs import gen

RECALL = 0.95
THRESHOLDS = (3.0, 1.0, 0.3, 0.1, 0.05, 0.02, 0.008, 0.004, 0.002, 0.001, 0.0005)


def best_density(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, q_block: int, kv_block: int
) -> float:
    """Smallest share of causal blocks that any choice needs for the mean recall.

    The true mass of every block is sorted, all heads and rows together.
    """
    heads, n, dim = query.shape[1:]
    masses = []
    for h in range(heads):
        keys = key[0, h // (heads // key.shape[1])].float()
        for start in range(0, n, q_block):
            end = min(n, start + q_block)
            rows = query[0, h, start:end].float()
            scores = rows @ keys[:end].T / dim**0.5 - lse[0, h, start:end, None]
            scores.masked_fill_(torch.ones_like(scores).triu_(start + 1).bool(), -torch.inf)
            mass = scores.exp_().sum(0)
            masses.append(F.pad(mass, (0, -end % kv_block)).view(-1, kv_block).sum(-1))
    values = torch.cat(masses).sort(descending=True).values
    needed = int((values.double().cumsum(0) < RECALL * heads * n).sum()) + 1
    return needed / len(values)


def sparsest(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lse: torch.Tensor
) -> Sale:
    """A threshold for each head, together of least density, with enough recall on the mean."""
    recalls, densities = [], []
    for threshold in THRESHOLDS:
        index = select(query, key, Sale(threshold=threshold))
        _, got = attend(query, key, value, *index.blocks)
        recalls.append((got - lse).exp()[0].mean(-1))
        densities.append(index.counts[0].float().mean(-1))
    recall, density = torch.stack(recalls), torch.stack(densities)
    density /= density.max()
    found = (float("inf"), (THRESHOLDS[-1],))
    for price in torch.logspace(-3, 4, 200):  # of recall, in density
        choice = (density - price * recall).argmin(0, keepdim=True)
        if recall.gather(0, choice).mean() >= RECALL:
            cost = density.gather(0, choice).mean().item()
            found = min(found, (cost, tuple(THRESHOLDS[i] for i in choice[0].tolist())))
    return Sale(threshold=found[1])


def run(report: Report) -> None:
    for kind, n in (("sharp", 8192), ("sharp", 32768), ("mixed", 32768)):
        q, k, v = gen(7, n, kind, Hq=8, Hkv=2, D=64)
        query, key, value = (torch.from_numpy(x).transpose(1, 2).to(DTYPE) for x in (q, k, v))
        end_to_end(report, kind, query, key, value)


def end_to_end(
    report: Report, kind: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    n = key.shape[2]
    dense, lse = attention(query, key, value, "dense", return_lse=True)
    config = sparsest(query, key, value, lse)
    index = select(query, key, config)
    out, got = attend(query, key, value, *index.blocks)
    recall = (got - lse).exp().mean().item()  # the share of the softmax sum that was kept
    wide_key, wide_value = (x.repeat_interleave(4, 1) for x in (key, value))
    sdpa = lambda: F.scaled_dot_product_attention(  # noqa: E731
        query, wide_key, wide_value, is_causal=True
    )
    check("own dense", dense, sdpa(), 1e-2)
    part = index._replace(indices=index.indices[:, :, -4:], counts=index.counts[:, :, -4:])
    rows = slice(n - 4 * config.q_block, None)
    check(
        "the last rows over the blocks chosen",
        attention(query, key, value, config, fallback=False)[:, :, rows],
        attention(query[:, :, rows], key, value, index=part, backend="reference"),
        1e-2,
    )
    seconds = time_in_turn(
        {
            "sdpa": sdpa,
            "dense": lambda: attention(query, key, value, "dense"),
            "sale": lambda: attention(query, key, value, config, fallback=False),
            "select": lambda: select(query, key, config),
        },
        5 if n <= 8192 else 3,
    )
    report.add(
        f"SALE vs sdpa, {DTYPE_NAME}, {kind}, 8 x {n} x 64, recall {recall:.3f}",
        seconds["sdpa"] / seconds["sale"],
        ">= 8" if n == 32768 and kind == "mixed" else "",
        thresholds=list(config.threshold),
        density=index.density(n, n),
        best_density=best_density(query, key, lse, 64, 32),
        vs_own_dense=seconds["dense"] / seconds["sale"],
        select_share_of_dense=seconds["select"] / seconds["dense"],
        error=((out.float() - dense.float()).norm() / dense.float().norm()).item(),
        ms=seconds["sale"] * 1e3,
    )

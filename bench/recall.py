"""How much attention mass a selection keeps, measured on some blocks of queries."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_attn import BlockIndex


class Mass(NamedTuple):
    """Attention of the rows of one query block, of each head: float32 [Hq, rows, keys seen]."""

    block: int
    weights: torch.Tensor
    position: torch.Tensor  # of each row


def attention_mass(query: torch.Tensor, key: torch.Tensor, q_block: int, blocks: int) -> list[Mass]:
    """The true attention of `blocks` query blocks, spread over the last 15/16 of a prompt."""
    heads, n, dim = query.shape[1:]
    n_keys = key.shape[2]
    keys = key[0].float().repeat_interleave(heads // key.shape[1], 0)
    every = torch.linspace(-(-n // q_block) / 16, -(-n // q_block) - 1, blocks).long().unique()
    found = []
    for m in every.tolist():
        rows = query[0, :, m * q_block : (m + 1) * q_block].float()
        position = n_keys - n + m * q_block + torch.arange(rows.shape[1])
        seen = int(position[-1]) + 1
        scores = rows @ keys[:, :seen].mT / dim**0.5
        later = torch.arange(seen) > position[:, None]
        found.append(Mass(m, scores.masked_fill_(later, -torch.inf).softmax(-1), position))
    return found


def near(mass: Mass, sink: int, window: int) -> torch.Tensor:
    """[rows, keys] bool: what sink and window hold."""
    token = torch.arange(mass.weights.shape[-1])
    return (token < sink) | (token > mass.position[:, None] - window)


def recall(masses: list[Mass], index: BlockIndex) -> float:
    """Mean share of a row's attention that a selection attends to."""
    total = 0.0
    for mass in masses:
        heads, _, n = mass.weights.shape
        group = heads // index.indices.shape[1]
        seen = near(mass, index.sink, index.window).expand(heads, -1, -1).clone()
        for h in range(heads):
            count = int(index.counts[0, h // group, mass.block])
            ids = index.indices[0, h // group, mass.block, :count].long()
            tokens = (ids[:, None] * index.kv_block + torch.arange(index.kv_block)).flatten()
            seen[h, :, tokens[tokens < n]] = True
        total += (mass.weights * seen).sum(-1).mean().item()
    return total / len(masses)


def best_recall(masses: list[Mass], budget: int, kv_block: int, sink: int, window: int) -> float:
    """`recall` of the best budget / kv_block blocks of each query block and head."""
    total = 0.0
    for mass in masses:
        inside = near(mass, sink, window)
        held = (mass.weights * inside).sum(-1).mean(-1)
        rest = (mass.weights * ~inside).mean(1)
        rest = torch.nn.functional.pad(rest, (0, -rest.shape[-1] % kv_block))
        rest = rest.unflatten(-1, (-1, kv_block)).sum(-1)
        top = rest.topk(min(budget // kv_block, rest.shape[-1])).values.sum(-1)
        total += (held + top).mean().item()
    return total / len(masses)

"""How often an exact bound would spare SALE an estimate: python -m bench.quality.sale_prefilter

A block of keys with centre c and radius r (the largest distance of a centred key from c) has no
score above q . c + |q| r, so where that is at most theta for every query of a block, nothing in
it can be kept. Writes bench/results/sale_prefilter.json.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.harness import Report
from bench.quality.flex_prefill import cases
from sparse_attn.ops import _sale as sale
from sparse_attn.ops.sale_select import op as select
from sparse_attn.ops.sale_threshold import op as bar

Q_BLOCK, KV_BLOCK, LENGTH = 64, 32, 8192


def measure(query: torch.Tensor, key: torch.Tensor, threshold: float, blocks: int) -> tuple:
    """Shares of the middle that the bound rules out, `blocks` at a time, and that is dropped."""
    heads, n = query.shape[1], key.shape[2]
    thresholds, mean = torch.full((heads,), threshold), key.float().mean(2)
    theta = bar(query, key, mean, thresholds)[0]
    indices, counts = select(query, key, thresholds)
    g = sale.grid(n, n, Q_BLOCK, KV_BLOCK, 128, 32, query.device)
    tokens, parts = blocks * KV_BLOCK, n // (blocks * KV_BLOCK)
    first = torch.arange(parts) * blocks
    middle = (first >= g.sink[:, None]) & (first + blocks <= g.local[:, None])
    centred = key[0].float() - mean[0][:, None]
    centred = centred[:, : parts * tokens].unflatten(1, (parts, tokens))
    centre = centred.mean(2)
    radius = (centred - centre[:, :, None]).norm(dim=-1).amax(-1)
    ruled_out = 0
    for h in range(heads):
        kv, q = h // (heads // key.shape[1]), query[0, h].float()
        bound = q @ centre[kv].T + q.norm(dim=-1, keepdim=True) * radius[kv]
        under = F.pad(bound <= theta[h][:, None], (0, 0, 0, -n % Q_BLOCK), value=True)
        ruled_out += (under.unflatten(0, (-1, Q_BLOCK)).all(1) & middle).sum().item()
    kept = (counts[0] - g.sink - (g.seen - g.local)).sum().item()
    in_question = (g.local - g.sink).sum().item() * heads
    return ruled_out / (middle.sum().item() * heads), 1 - kept / in_question


def main() -> None:
    report = Report("sale_prefilter")
    for kind, layers in cases(LENGTH):
        for threshold in (0.004, 0.05):
            for blocks in (1, 4):
                found = torch.tensor([measure(*x, threshold, blocks) for x in layers]).mean(0)
                report.add(
                    f"ruled out in {blocks * KV_BLOCK} keys at once, {kind}, threshold {threshold}",
                    found[0].item(),
                    dropped=found[1].item(),
                )
    report.write()


if __name__ == "__main__":
    main()

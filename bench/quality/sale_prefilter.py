"""How often an exact bound would spare SALE an estimate, and what it costs on the CPU.

    python -m bench.quality.sale_prefilter

A block of keys with centre c and radius r (the largest distance of a centred key from c) has no
score above q . c + |q| r, so where that is at most theta for every query of a block, nothing in
it can be kept. Writes bench/results/sale_prefilter.json.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.harness import Report, time_in_turn
from bench.inputs import gen
from bench.quality.flex_prefill import cases
from sparse_attn import BlockIndex
from sparse_attn.ops import _sale as sale
from sparse_attn.ops.sale_estimate import op as estimate
from sparse_attn.ops.sale_quantize import op as quantize
from sparse_attn.ops.sale_select import op as select
from sparse_attn.ops.sale_threshold import op as bar

Q_BLOCK, KV_BLOCK, LENGTH = 64, 32, 8192


def balls(key: torch.Tensor, mean: torch.Tensor, tokens: int) -> torch.Tensor:
    """[Hkv, parts, D + 2]: centre, radius and a 1 for each `tokens` keys in one piece."""
    parts = key.shape[2] // tokens
    centred = key[0].float() - mean[0][:, None]
    centred = centred[:, : parts * tokens].unflatten(1, (parts, tokens))
    centre = centred.mean(2)
    radius = (centred - centre[:, :, None]).norm(dim=-1).amax(-1)
    return torch.cat([centre, radius[..., None], torch.ones_like(radius)[..., None]], -1)


def rows_of(query: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """[Hq, Tq, D + 2]: a query, its norm and -theta, so that the bound is a product with a ball."""
    q = query[0].float()
    return torch.cat([q, q.norm(dim=-1, keepdim=True), -theta[0][..., None]], -1)


def ruled_out(rows: torch.Tensor, of_head: torch.Tensor) -> torch.Tensor:
    """bool [Mq, parts]: no score of a part exceeds theta in any row of the block."""
    above, ragged = rows @ of_head.T, -len(rows) % Q_BLOCK
    if ragged:
        above = F.pad(above, (0, 0, 0, ragged), value=-torch.inf)
    return above.unflatten(0, (-1, Q_BLOCK)).amax(1) <= 0


def measure(query: torch.Tensor, key: torch.Tensor, threshold: float, blocks: int) -> tuple:
    """Shares of the middle that the bound rules out, `blocks` at a time, and that is dropped."""
    heads, n = query.shape[1], key.shape[2]
    thresholds, mean = torch.full((heads,), threshold), key.float().mean(2)
    theta = bar(query, key, mean, thresholds)[0][None]
    indices, counts = select(query, key, thresholds)
    kept = BlockIndex(indices, counts, Q_BLOCK, KV_BLOCK).to_mask(n)[0]
    g = sale.grid(n, n, Q_BLOCK, KV_BLOCK, 128, 32, query.device)
    first = torch.arange(n // (blocks * KV_BLOCK)) * blocks
    middle = (first >= g.sink[:, None]) & (first + blocks <= g.local[:, None])
    of_keys, rows = balls(key, mean, blocks * KV_BLOCK), rows_of(query, theta)
    total = 0
    for h in range(heads):
        out = ruled_out(rows[h], of_keys[h // (heads // key.shape[1])]) & middle
        total += out.sum().item()
        at_once = kept[h, :, : len(first) * blocks].unflatten(1, (-1, blocks)).any(2)
        if (out & at_once).sum() > 1e-3 * at_once.sum():  # an estimate above its bar is an error
            raise AssertionError("blocks are ruled out that are kept")
    chosen = (counts[0] - g.sink - (g.seen - g.local)).sum().item()
    in_question = (g.local - g.sink).sum().item() * heads
    return total / (middle.sum().item() * heads), 1 - chosen / in_question


def cost(report: Report, n: int, dim: int, threshold: float) -> None:
    """The bound of 32 keys at once as matrix products and a maximum, beside the estimate.

    What a kernel written for it could save at most: all but the products with the centres, here
    PyTorch's in bfloat16.
    """
    heads, piece = 8, 1024
    q, k, _ = gen(7, n, "mixed", Hq=heads, Hkv=2, D=dim)
    query, key = (torch.from_numpy(x).transpose(1, 2).bfloat16() for x in (q, k))
    packed, step, mean = quantize(query, None, "query")
    key_packed, key_step, key_mean = quantize(key, None, "key")
    theta = bar(query, key, key_mean, torch.full((heads,), threshold))
    bias = sale.dots(key, key_mean, mean.unflatten(1, (-1, heads // 2)))

    whole = balls(key, key_mean, KV_BLOCK), rows_of(query, theta)  # linear in n: not timed
    narrow = [x[..., :dim].bfloat16().contiguous() for x in whole]

    def visible(of_keys: torch.Tensor, rows: torch.Tensor, do: Callable) -> None:
        for h in range(heads):
            for start in range(0, n, piece):  # but for half a piece
                of_head = of_keys[h // (heads // 2), : (start + piece) // KV_BLOCK]
                do(rows[h, start : start + piece], of_head)

    seconds = time_in_turn(
        {
            "bound": lambda: visible(*whole, ruled_out),
            "products": lambda: visible(*narrow, lambda rows, of: rows @ of.T),
            "estimate": lambda: estimate(packed, step, key_packed, key_step, bias, theta),
        },
        5,
    )
    report.add(
        f"the bound's time, share of the estimate's, {heads} x {n} x {dim}, threshold {threshold}",
        seconds["bound"] / seconds["estimate"],
        products_in_bfloat16_only=seconds["products"] / seconds["estimate"],
        **{f"{name}_ms": x * 1e3 for name, x in seconds.items()},
    )


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
    for dim in (64, 128):
        for threshold in (0.004, 0.05):
            cost(report, LENGTH, dim, threshold)
    report.write()


if __name__ == "__main__":
    main()

"""How much attention mass FlexPrefill keeps at which density: python -m bench.quality.flex_prefill

Both variants over a range of gamma, beside the best choice of as many blocks that a map of the
true attention allows. Writes bench/results/flex_prefill_quality.json and .png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench.inputs import gen
from bench.quality.model import model_inputs
from sparse_attn.block_index import BlockIndex
from sparse_attn.ops.flex_prefill_select import VARIANTS
from sparse_attn.ops.flex_prefill_select import op as select

RESULTS = Path(__file__).parents[1] / "results"
GAMMAS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
BLOCK = 128
TARGETS = (0.1, 0.2, 0.3, 0.5)  # densities at which the table compares


def block_map(query, key, causal_rows=1024):
    """[B * Hq, Mq, Nk] share of each query block's attention mass per key block, float32."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(groups, 1)
    rows = []
    for begin in range(0, length, causal_rows):
        q = query[:, :, begin : begin + causal_rows].float()
        scores = q @ keys.mT / query.shape[3] ** 0.5
        later = torch.arange(length) > begin + torch.arange(q.shape[2])[:, None]
        mass = scores.masked_fill_(later, -torch.inf).softmax(-1)
        mass = torch.nn.functional.pad(mass, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK))
        mass = mass.sum(-1)
        for at in range(0, mass.shape[2], BLOCK):
            rows.append(mass[:, :, at : at + BLOCK].mean(2))
    return torch.stack(rows, 2).flatten(0, 1)


def measure(query, key, budget):
    """For each variant and gamma the density, the mass kept and the most that could be kept."""
    true = block_map(query, key)
    heads, rows, _ = true.shape  # "late" below: the last quarter of the rows
    visible = torch.ones(rows, rows).tril().bool()
    best = true.masked_fill(~visible, 0).flatten(1).sort(descending=True).values.cumsum(-1) / rows
    points = []
    for variant in VARIANTS:
        for gamma in GAMMAS:
            indices, counts, _ = select(
                query, key, gamma=gamma, min_budget=budget, block_size=BLOCK, variant=variant
            )
            mask = BlockIndex(indices, counts, BLOCK, BLOCK).to_mask(key.shape[2]).flatten(0, 1)
            blocks = mask.sum((-1, -2))
            by_row = (true * mask).sum(-1)
            kept, late = by_row.mean(-1), by_row[:, -(-rows * 3 // 4) :].mean(-1)
            points.append({
                "variant": variant, "gamma": gamma,
                "density": blocks.float().mean().item() / visible.sum().item(),
                "kept": kept.mean().item(), "worst_head": kept.min().item(),
                "late": late.mean().item(),
                "best": best[torch.arange(heads), blocks - 1].mean().item(),
            })  # fmt: skip
    return points


def cases(length):
    for kind in ("mixed", "sharp", "peaky", "flat"):
        query, key, _ = gen(1, length, kind)
        yield kind, [tuple(torch.from_numpy(x).transpose(1, 2).bfloat16() for x in (query, key))]
    layers = model_inputs(length)
    if layers:
        yield "model", layers


def average(runs):
    """Mean over layers of the points of the same variant and gamma; the worst of worst_head."""
    return [
        p[0] | {k: sum(x[k] for x in p) / len(p) for k in ("density", "kept", "late", "best")}
        | {"worst_head": min(x["worst_head"] for x in p)}
        for p in zip(*runs, strict=True)
    ]  # fmt: skip


def kept_at(points, variant, density, which="kept"):
    """Mass kept at a density, straight lines between the points; None outside their range."""
    line = sorted((p["density"], p[which]) for p in points if p["variant"] == variant)
    for (d0, k0), (d1, k1) in zip(line, line[1:], strict=False):
        if d0 <= density <= d1 and d1 > d0:
            return k0 + (k1 - k0) * (density - d0) / (d1 - d0)
    return None


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(3 * len(results), 3.2), sharey=True)
    for ax, (name, points) in zip(axes, results.items(), strict=True):
        for variant in VARIANTS:
            line = sorted((p["density"], p["kept"]) for p in points if p["variant"] == variant)
            ax.plot(*zip(*line, strict=True), "o-", ms=3, label=variant)
        line = sorted((p["density"], p["best"]) for p in points)
        ax.plot(*zip(*line, strict=True), ":", color="gray", label="best of that size")
        ax.set_title(name)
        ax.set_xlabel("density")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("attention mass kept")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def table(results, which):
    """`which` is "kept" (all rows) or "late" (the last quarter of the rows)."""
    lines = ["| inputs | " + " | ".join(f"density {d:g}: official, exact" for d in TARGETS) + " |"]
    lines.append("|---" * (len(TARGETS) + 1) + "|")
    for name, points in results.items():
        cells = []
        for d in TARGETS:
            pair = [kept_at(points, v, d, which) for v in ("official", "exact")]
            cells.append(", ".join("-" if x is None else f"{x:.3f}" for x in pair))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=256, help="min_budget in tokens")
    options = parser.parse_args()
    results = {
        name: average([measure(q, k, options.budget) for q, k in layers])
        for name, layers in cases(options.length)
    }
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / "flex_prefill_quality"
    stem.with_suffix(".json").write_text(json.dumps(vars(options) | {"results": results}, indent=1))
    plot(results, stem.with_suffix(".png"))
    for which in ("kept", "late"):
        print(which, table(results, which), sep="\n")


if __name__ == "__main__":
    main()

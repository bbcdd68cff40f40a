"""Attention mass kept against density, all methods: python -m bench.quality.kept_mass

On every layer and head of the demonstration model. Density and mass count single query-key pairs,
so methods with blocks of different sizes, sinks and windows stand on one scale; the dotted lines
are the most that blocks of 64 x 32 tokens and single pairs could keep, chosen from the true
attention of all layers at once. Writes bench/results/kept_mass.json and .png.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from bench.harness import hardware
from bench.quality.model import model_inputs
from sparse_attn import METHODS
from sparse_attn.mass import allowed

RESULTS = Path(__file__).parents[1] / "results"
SWEEPS = {
    "flex_prefill": ("gamma", (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98), {"min_budget": 128}),
    "sale": ("threshold", (0.1, 0.03, 0.01, 0.004, 0.001, 0.0003), {"min_length": 0}),
    "hip": ("budget", (64, 128, 256, 512, 1024, 2048), {}),
}
BEST = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)  # densities of the exact best choices
BLOCK = (64, 32)


def to_blocks(x):
    """Sums over blocks of 64 x 32 of the last two dimensions."""
    return x.unflatten(-1, (-1, BLOCK[1])).sum(-1).unflatten(-2, (-1, BLOCK[0])).sum(-2)


class Best:
    """The most mass that a share of the pairs can keep, shared out freely over layers, heads, rows.

    Units (blocks or pairs) are taken by mass per pair, highest first; a histogram over the
    logarithm stands for the sort.
    """

    def __init__(self, bins=4096, lowest=1e-12):
        self.bins, self.lowest = bins, math.log(lowest)
        self.pairs = torch.zeros(bins, dtype=torch.float64)
        self.mass = torch.zeros(bins, dtype=torch.float64)

    def add(self, mass, pairs):
        pairs = pairs.expand_as(mass)
        mass, pairs = mass[pairs > 0], pairs[pairs > 0]
        share = (mass / pairs).log().div_(self.lowest).clamp_(0, 1)  # 0: all of a row's mass
        at = (share * (self.bins - 1)).long()
        self.pairs += torch.bincount(at, pairs, self.bins)
        self.mass += torch.bincount(at, mass, self.bins)

    def kept(self, density):
        """Share of the mass, straight lines within a bin."""
        used, kept = (x.cumsum(0) / x.sum() for x in (self.pairs, self.mass))
        return float(numpy.interp(density, [0, *used.tolist()], [0, *kept.tolist()]))


def measure(query, key, best_blocks, best_pairs, chunk=512):
    """For one layer: {line: [(parameter, density, mass kept)]}, means over heads and rows."""
    n_keys, groups = key.shape[2], query.shape[1] // key.shape[1]
    heads = query.shape[1]
    indices = {
        (name, value): METHODS[name](**{field: value}, **fixed).select(query, key)
        for name, (field, values, fixed) in SWEEPS.items()
        if name in METHODS
        for value in values
    }
    pairs, mass_kept = dict.fromkeys(indices, 0.0), dict.fromkeys(indices, 0.0)
    keys = key[0].float().repeat_interleave(groups, 0)
    for begin in range(0, n_keys, chunk):
        rows = torch.arange(begin, begin + chunk)
        scores = query[0, :, begin : begin + chunk].float() @ keys.mT / query.shape[3] ** 0.5
        later = torch.arange(n_keys) > rows[:, None]
        mass = scores.masked_fill_(later, -torch.inf).softmax(-1)
        for which, index in indices.items():
            mask = allowed(index, rows, n_keys, n_keys)[0]
            mask = mask.repeat_interleave(heads // mask.shape[0], 0)
            pairs[which] += mask.sum().item()
            mass_kept[which] += mass.masked_fill(~mask, 0).sum().item()
        visible = (~later).float()
        best_pairs.add(mass, visible)
        best_blocks.add(to_blocks(mass), to_blocks(visible))
    total = heads * n_keys * (n_keys + 1) / 2
    lines = {}
    for (name, value), n in pairs.items():
        point = (value, n / total, mass_kept[name, value] / (heads * n_keys))
        lines.setdefault(name, []).append(point)
    return lines


def average(layers):
    """Mean over layers of the points with the same parameter."""
    return {
        name: [
            dict(zip(("parameter", "density", "kept"),
                     torch.tensor(points, dtype=torch.float64).mean(0).tolist(), strict=True))
            for points in zip(*(layer[name] for layer in layers), strict=True)
        ]
        for name in layers[0]
    }  # fmt: skip


def plot(lines, length, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        at = sorted((p["density"], p["kept"]) for p in points)
        style = {"best blocks of 64 x 32": ":", "best pairs": "--"}.get(name)
        if style:
            axis.plot(*zip(*at, strict=True), style, color="#777777", label=name)
        else:
            axis.plot(*zip(*at, strict=True), "o-", ms=4, label=name)
    axis.set(
        xscale="log",
        xlabel="density: share of causal query-key pairs computed",
        ylabel="attention mass kept, mean over queries",
        ylim=(None, 1.005),
        title=f"Demonstration model, {length:,} bytes of text, all layers and heads",
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=8192, help="a multiple of 512")
    length = parser.parse_args().length
    layers = model_inputs(length)
    if not layers:
        raise SystemExit("needs transformers and the weights of demo/model")
    best_blocks, best_pairs = Best(), Best()
    bar = tqdm(layers, unit="layer", leave=False)
    lines = average([measure(*layer, best_blocks, best_pairs) for layer in bar])
    for name, best in (("best blocks of 64 x 32", best_blocks), ("best pairs", best_pairs)):
        lines[name] = [{"parameter": d, "density": d, "kept": best.kept(d)} for d in BEST]
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / "kept_mass"
    found = {"hardware": hardware(), "length": length, "lines": lines}
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    plot(lines, length, stem.with_suffix(".png"))
    for name, points in lines.items():
        for p in points:
            print(f"{name:<24} {p['parameter']:<8g} density {p['density']:.3f}"
                  f"  kept {p['kept']:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()

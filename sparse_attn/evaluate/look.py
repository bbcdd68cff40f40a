"""What a method does in each layer, on what the model attends to when it is dense."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from .. import api, mass
from ..crossover import dense_is_faster
from ..methods.dense import Dense
from ..plot import plot_mass
from ..settings import Settings

PANELS = 16  # heads or layers drawn at most


class Look:
    """An attention function that is dense, and measures what a method would do instead.

    `drawn` is the layer whose heads are drawn, None for no pictures; `tail` how many of the last
    queries the method serves, None for all of them.
    """

    def __init__(
        self, label: str, settings: Settings, drawn: int | None, tail: int | None = None
    ) -> None:
        self.label, self.settings, self.drawn, self.tail = label, settings, drawn, tail
        self.layers: dict[int, dict[str, Any]] = {}
        self.fallback: str | None = None
        self.heads: Any = None  # cells of the heads of the layer that is drawn
        self.means: dict[int, Any] = {}  # by layer, cells that are means over heads

    def __call__(self, query, key, value, layer: int | None, causal: bool, scale: float | None):
        config = self.settings.of(layer)
        options = {"causal": causal, "scale": scale}
        dense = api.attention(query, key, value, Dense(), **options)
        if self.tail is not None:
            query = query[:, :, -self.tail :]
        out, stats = api.attention(
            query, key, value, config, fallback=False, return_stats=True, **options
        )
        self.fallback = dense_is_faster(config.name, stats.backend, query, key.shape[2])
        layer = len(self.layers) if layer is None else layer
        exact = dense[:, :, -query.shape[2] :].float()
        error = (out.float() - exact).norm() / exact.norm()
        found = {"density": stats.density, "error": error.item(), "recall": None, "pairs": None}
        self.layers[layer] = found
        if not hasattr(config, "select"):  # a method without lists
            return dense
        try:
            selection = config.select(query, key, **options)
        except NotImplementedError:
            return dense
        recall, pairs = mass.kept(query, key, selection, scale)
        found["recall"], found["pairs"] = recall.tolist(), pairs.tolist()
        if self.drawn is None:
            return dense
        self.shape = (query.shape[2], key.shape[2])
        cells = torch.stack(mass.cells(query, key, selection, scale)).cpu()
        self.means[layer] = cells.mean(1)
        if layer == self.drawn or self.heads is None:
            self.heads = (layer, cells[:, :: -(-cells.shape[1] // PANELS)], cells.shape[1])
        return dense

    def draw(self, length: int, folder: Path, base: Path) -> list[str]:
        """Writes the maps, of the heads of one layer and of all layers; their paths in `base`."""
        if self.heads is None:
            return []
        folder.mkdir(exist_ok=True)
        stem = "".join(c if c.isalnum() else "_" for c in self.label)
        layer, cells, n_heads = self.heads
        step = -(-n_heads // PANELS)
        recall = self.layers[layer]["recall"]
        names = [f"head {h}: {recall[h]:.1%} kept" for h in range(0, n_heads, step)]
        title = f"{self.label}: heads of layer {layer}, prompt of {length:,} tokens"
        drawn = [(f"{stem}_{length}_heads.png", cells, names, title)]
        layers = sorted(self.means)[:: -(-len(self.means) // PANELS)]
        means = torch.stack([self.means[i] for i in layers], 1)
        names = [f"layer {i}: {statistics.mean(self.layers[i]['recall']):.1%} kept" for i in layers]
        title = f"{self.label}: layers, mean over heads, prompt of {length:,} tokens"
        drawn.append((f"{stem}_{length}_layers.png", means, names, title))
        for name, (whole, part), names, title in drawn:
            figure = plot_mass(whole, part, names, *self.shape, title)
            figure.savefig(folder / name, dpi=100)
        return [str((folder / name).relative_to(base)) for name, *_ in drawn]

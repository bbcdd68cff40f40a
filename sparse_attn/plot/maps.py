"""Maps: chosen blocks over the true attention, recall of heads, needles found by depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .style import figure, panels

KEPT, LOST = (0.05, 0.32, 0.60), (0.84, 0.20, 0.05)  # blue, vermilion
FAINTEST = 1e-4  # of a row's mass in one cell: white from here down


def plot_mass(
    mass: Any, kept: Any, names: Sequence[str], n_queries: int, n_keys: int, title: str
) -> Any:
    """Where the attention is and which of it was computed: blue is kept, red is lost.

    Args:
        mass: [P, n, m] share of a query's attention in each cell, one panel each; see
            `sparse_attn.mass.cells`.
        kept: [P, n, m] the part of it on computed keys.
        names: titles of the panels.
        n_queries: tokens along the vertical axis.
        n_keys: tokens along the horizontal axis.
        title: above the picture.
    """
    import numpy
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    mass, kept = numpy.asarray(mass), numpy.asarray(kept)
    made, axes = panels(len(mass), 4, 3.0, 3.0, extra=1.5)
    offset = n_keys - n_queries
    for axis, whole, part, name in zip(axes, mass, kept, names, strict=True):
        depth = 1 - numpy.log(numpy.clip(whole, FAINTEST, 1)) / numpy.log(FAINTEST)
        share = numpy.clip(part / numpy.maximum(whole, 1e-30), 0, 1)
        colour = share[..., None] * KEPT + (1 - share[..., None]) * numpy.array(LOST)
        image = 1 - depth[..., None] * (1 - colour)
        axis.imshow(
            numpy.clip(image, 0, 1),
            interpolation="nearest",
            aspect="auto",
            extent=(0, n_keys, n_keys, offset),
        )
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_major_locator().set_params(nbins=5)
    grid = axes[0].get_subplotspec().get_gridspec()
    for i, axis in enumerate(axes):
        if i % grid.ncols == 0:
            axis.set_ylabel("query position (tokens)", fontsize=8)
        if i >= len(axes) - grid.ncols:
            axis.set_xlabel("key position (tokens)", fontsize=8)
    for colour, what in ((KEPT, "computed"), (LOST, "left out")):
        bar = made.colorbar(
            ScalarMappable(
                LogNorm(FAINTEST, 1), LinearSegmentedColormap.from_list(what, ["white", colour])
            ),
            ax=axes, location="bottom", shrink=0.6, fraction=0.04, aspect=50, pad=0.01,
        )  # fmt: skip
        bar.set_label(f"{what}: share of a query's attention in a cell (logarithmic)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    made.suptitle(title)
    return made


def plot_heads(recall: Any, title: str) -> Any:
    """The attention mass kept, [layers, heads] in 0 to 1, as numbers on colours."""
    import numpy

    recall = numpy.asarray(recall, dtype=float)
    layers, heads = recall.shape
    made = figure(max(5.5, 0.62 * heads + 1.8), max(2.4, 0.42 * layers + 1.6))
    axis = made.subplots()
    low = min(0.9, float(numpy.nanmin(recall))) if numpy.isfinite(recall).any() else 0.0
    image = axis.imshow(recall, vmin=low, vmax=1, cmap="cividis", aspect="auto")
    if layers * heads <= 400:
        for i in range(layers):
            for j in range(heads):
                value = recall[i, j]
                text = "–" if numpy.isnan(value) else f"{100 * value:.1f}"
                dark = numpy.isnan(value) or value < low + 0.6 * (1 - low)
                axis.text(
                    j, i, text, ha="center", va="center", fontsize=8,
                    color="white" if dark and not numpy.isnan(value) else "black",
                )  # fmt: skip
    axis.set(xlabel="head", ylabel="layer")
    axis.set_title(title, fontsize=10)
    for one in (axis.xaxis, axis.yaxis):
        one.get_major_locator().set_params(integer=True, min_n_ticks=1)
    bar = made.colorbar(image, ax=axis)
    bar.ax.yaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}")
    bar.set_label("attention mass kept (%)")
    return made


def plot_needles(
    found: Sequence[Any], names: Sequence[str], lengths: Sequence[int], depths: Sequence[float]
) -> Any:
    """One panel per method: share of the needles' digits found, [depths, lengths] in 0 to 1."""
    import numpy

    made, axes = panels(
        len(found), 4, max(2.5, 0.6 * len(lengths) + 1.1), 0.4 * len(depths) + 1.1, extra=0.6
    )
    for axis, values, name in zip(axes, found, names, strict=True):
        values = numpy.asarray(values, dtype=float)
        image = axis.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                text = "–" if numpy.isnan(value) else f"{100 * value:.0f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=8)
        axis.set_title(name if len(name) <= 30 else name.replace(":", ":\n", 1), fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f}" for d in depths], fontsize=7)
        axis.set_xlabel("prompt length (tokens)", fontsize=8)
        axis.set_ylabel("depth of the needle (%)", fontsize=8)
    bar = made.colorbar(image, ax=axes, fraction=0.03, aspect=30)
    bar.ax.yaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}")
    bar.set_label("digits found (%)")
    made.suptitle("Needles found, by depth and length")
    return made

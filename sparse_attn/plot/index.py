"""Which blocks an index lists."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..block_index import BlockIndex


def plot_index(
    index: BlockIndex, n_queries: int, n_keys: int, *, causal: bool = True, batch: int = 0
) -> Any:
    """One panel per head: listed blocks dark, visible but skipped ones light."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'sparse_attn[plot]'") from error
    mask = index.computed(n_queries, n_keys, causal)[batch].cpu()
    visible = index.full(n_queries, n_keys, index.q_block, index.kv_block).to_mask(n_keys)[0, 0]
    if not causal:
        visible = visible | True
    heads = mask.shape[0]
    columns = min(4, heads)
    rows = math.ceil(heads / columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    colours = ListedColormap(["white", "#dbe4ee", "#17508f"])
    offset = n_keys - n_queries
    rows_end = offset + mask.shape[1] * index.q_block
    columns_end = mask.shape[2] * index.kv_block
    for head, axis in enumerate(axes):
        if head >= heads:
            axis.set_axis_off()
            continue
        listed = mask[head] & visible
        axis.imshow(
            (visible.int() + listed.int()).numpy(),
            cmap=colours,
            vmin=0,
            vmax=2,
            interpolation="nearest",
            aspect="auto",
            extent=(0, columns_end, rows_end, offset),
        )
        # the last blocks may reach beyond the tokens
        axis.set(xlim=(0, n_keys), ylim=(n_keys, offset))
        share = listed.sum().item() / max(1, visible.sum().item())
        axis.set_title(f"head {head}: {share:.0%} of blocks", fontsize=10)
        axis.set_xlabel("key position (tokens)", fontsize=8)
        axis.set_ylabel("query position (tokens)", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.legend(
        handles=[
            Patch(color="#17508f", label="computed"),
            Patch(color="#dbe4ee", label="visible, skipped"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def plot_kept(shares: list[list[float]], title: str) -> Any:
    """A map of the share of a prepared context that each head of each layer keeps."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'sparse_attn[plot]'") from error
    layers, heads = len(shares), max(map(len, shares))
    figure = Figure(figsize=(1.6 + 0.62 * heads, 1.5 + 0.5 * layers), layout="constrained")
    axis = figure.subplots()
    top = max(max(row) for row in shares) or 1.0
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            colour = "white" if share > 0.6 * top else "black"
            axis.text(j, i, f"{share:.1%}", ha="center", va="center", fontsize=8, color=colour)
    axis.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    axis.set_title(title, fontsize=9)
    figure.colorbar(image, label="share kept", format=lambda x, _: f"{x:.0%}")
    return figure

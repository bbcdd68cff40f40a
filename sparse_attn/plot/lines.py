"""Density by layer, time against length, quality against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .style import BASELINE, figure, lengths_axis, style


def plot_density(layers: Mapping[str, Sequence[float | None]], n_keys: int) -> Any:
    """The share of the causal blocks that each method computes in each layer.

    Args:
        layers: by method, a share for each layer; None where the layer uses no method.
        n_keys: tokens of the prompt.
    """
    made = figure(6.4, 3.8)
    axis = made.subplots()
    for i, (name, shares) in enumerate(layers.items()):
        at = [(n, 100 * share) for n, share in enumerate(shares) if share is not None]
        if at:
            axis.plot(*zip(*at, strict=True), label=name, **style(i))
    axis.set(
        title=f"Density by layer, prompt of {n_keys:,} tokens",
        xlabel="layer",
        ylabel="causal blocks computed (%)",
        ylim=(0, 103),
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    below(made, axis)
    return made


def plot_time(seconds: Mapping[str, Mapping[int, float]], what: str, baseline: str) -> Any:
    """Seconds of `what` against the length of the prompt, one line per method."""
    made = figure(6.4, 3.8)
    axis = made.subplots()
    series = 0
    for name, by_length in seconds.items():
        if name == baseline:
            look = BASELINE
        else:
            look, series = style(series), series + 1
        axis.plot(*zip(*sorted(by_length.items()), strict=True), label=name, **look)
    lengths = sorted({n for by_length in seconds.values() for n in by_length})
    lengths_axis(axis, lengths)
    axis.set(title=f"Time of {what}", ylabel="seconds (logarithmic)", yscale="log")
    axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axis.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.yaxis.set_minor_formatter(lambda x, _: "")
    axis.grid(alpha=0.3, which="both")
    below(made, axis)
    return made


def plot_pareto(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    title: str,
    quality: str,
    baseline: str,
    limit: float | None = None,
) -> Any:
    """Quality against speed: a line per method through its settings, the best of all marked.

    Args:
        points: by method (speed-up, quality lost, setting); less lost and more speed are better.
        title: above the picture.
        quality: what the loss is, with its unit.
        baseline: what speed-up 1 and loss 0 stand for.
        limit: a loss that is still accepted, drawn as a band.
    """
    made = figure(6.8, 4.4)
    axis = made.subplots()
    axis.plot([1], [0], "*", color="#222222", markersize=12, label=baseline, zorder=4)
    notes: list[tuple[float, float, str, str]] = []
    for i, (name, given) in enumerate(points.items()):
        line = sorted(given)
        axis.plot(*zip(*((x, y) for x, y, _ in line), strict=True), label=name, **style(i))
        if len(line) > 1:
            notes += [(x, y, text, style(i)["color"]) for x, y, text in line]
    every = [(x, y) for given in points.values() for x, y, _ in given] + [(1.0, 0.0)]
    best = sorted(
        p for p in every if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in every)
    )
    axis.plot(
        *zip(*best, strict=True), color="#999999", linewidth=5, alpha=0.3, zorder=0,
        label="best trade-offs", solid_capstyle="round",
    )  # fmt: skip
    axis.margins(0.1)
    middle = sum(axis.get_xlim()) / 2
    for x, y, text, colour in notes:  # towards the middle, where there is room
        side, place = ("left", 6) if x < middle else ("right", -6)
        axis.annotate(
            text, (x, y), (place, 5), textcoords="offset points", fontsize=7, color=colour, ha=side
        )
    if limit is not None:
        axis.axhspan(axis.get_ylim()[0], limit, color="#009e73", alpha=0.08, zorder=0)
        axis.axhline(limit, color="#009e73", linewidth=0.8, label=f"limit {limit:g}")
    axis.set(title=title, xlabel=f"speed-up of attention over {baseline} (×)", ylabel=quality)
    axis.grid(alpha=0.3)
    below(made, axis)
    return made


def below(made: Any, axis: Any) -> None:
    """The legend under the axes, where it covers nothing; the figure grows for a long one."""
    handles, labels = axis.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = 1 if longest > 48 else 2 if longest > 24 else 4
    rows = -(-len(labels) // columns)
    made.set_figheight(made.get_figheight() + 0.18 * max(0, rows - 3))
    made.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )

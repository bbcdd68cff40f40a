"""What the pictures share."""

from __future__ import annotations

import math
from typing import Any

# readable side by side also for colour-blind eyes (Okabe and Ito), with a marker each
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#555555")
MARKERS = "osD^vPX*"
BASELINE = {"color": "#222222", "linestyle": "--", "marker": None}


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'sparse_attn[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i // len(COLOURS) % len(MARKERS)] if i >= len(COLOURS) else MARKERS[i],
        "markersize": 5,
    }


def panels(n: int, columns: int, width: float, height: float, extra: float = 0.0) -> Any:
    """(figure, n axes in a grid); those of the grid that are too many are switched off."""
    columns = max(1, min(columns, n))
    rows = math.ceil(n / columns)
    made = figure(max(6.0, width * columns), height * rows + extra)  # the title needs that much
    axes = list(made.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[n:]:
        axis.set_axis_off()
    return made, axes[:n]


def lengths_axis(axis: Any, lengths: list[int]) -> None:
    """A logarithmic axis of lengths, labelled at the lengths themselves."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in lengths])
    axis.minorticks_off()
    axis.set_xlabel("prompt length (tokens)")

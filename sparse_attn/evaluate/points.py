"""What the results say of each setting at one length, and which settings lose next to nothing."""

from __future__ import annotations

import statistics
from typing import Any

from ..probe import BASELINE

MORE_BITS, FEWER_NEEDLES = 0.01, 1.0  # bits per token and points that a setting may lose


def measured(results: dict[str, Any], length: int) -> dict[str, dict[str, Any]]:
    """The complete cells of a length, the baseline first."""
    cells = results["cells"][str(length)]
    return {k: v for k, v in cells.items() if v.get("prefill") and v.get("bits") is not None}


def mean_needles(cell: dict[str, Any]) -> float:
    return statistics.mean(cell["needles"].values())


def density(cell: dict[str, Any]) -> float:
    """Mean over the layers in which the method is used; 1 for dense attention."""
    found = [layer["density"] for layer in cell.get("layers") or [] if layer]
    return statistics.mean(found) if found else 1.0


def bits_lost(cell: dict[str, Any], base: dict[str, Any]) -> float:
    return round(cell["bits"] - base["bits"], 6)


def needles_lost(cell: dict[str, Any], base: dict[str, Any]) -> float:
    """In points of the share found."""
    return round(100 * (mean_needles(base) - mean_needles(cell)), 4)


def needles_tell(base: dict[str, Any]) -> bool:
    """Whether the baseline finds so many needles that a setting can lose `FEWER_NEEDLES`."""
    return 100 * mean_needles(base) >= FEWER_NEEDLES


NEEDLES_TELL_NOTHING = (
    f"{BASELINE} finds less than {FEWER_NEEDLES:g} % of the needles, so that no setting can lose "
    "them: within limits is judged by the bits per token alone."
)


def within_limits(cell: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether a setting loses less than `MORE_BITS` and `FEWER_NEEDLES`; if not `needles_tell`,
    the bits alone decide.
    """
    return bits_lost(cell, base) < MORE_BITS and needles_lost(cell, base) < FEWER_NEEDLES


def operating_points(results: dict[str, Any], length: int) -> list[list[str]]:
    """Of each method the setting with the fastest attention within the limits, as rows of text:
    method, density, speed-up of attention and of the prefill, bits lost, needles lost.
    """
    cells = measured(results, length)
    base = cells[BASELINE]
    best: dict[str, str | None] = {}
    for label, cell in cells.items():
        if label == BASELINE:
            continue
        name = results["methods"][label]["family"]
        old = best.setdefault(name, None)
        faster = old is None or cell["attention"] < cells[old]["attention"]
        if within_limits(cell, base) and faster:
            best[name] = label
    rows = []
    for name, label in best.items():
        if label is None:
            rows.append([f"{name}: no setting within the limits", *["–"] * 5])
            continue
        cell = cells[label]
        rows.append([
            label,
            f"{density(cell):.1%}",
            f"{base['attention'] / cell['attention']:.2f}×",
            f"{base['prefill'] / cell['prefill']:.2f}×",
            f"{bits_lost(cell, base):.4f}",
            f"{needles_lost(cell, base):.1f}" if needles_tell(base) else "–",
        ])  # fmt: skip
    return rows


HEAD = ["method", "density", "attention", "prefill", "bits/token lost", "needles lost (points)"]


def markdown(rows: list[list[str]]) -> str:
    """A table for a README."""
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

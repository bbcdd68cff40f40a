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


def complete(results: dict[str, Any]) -> list[int]:
    """The lengths at which the baseline was measured, from the shortest; a run that was stopped
    leaves others.
    """
    return sorted(n for n in map(int, results["cells"]) if BASELINE in measured(results, n))


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


def gain(cell: dict[str, Any], base: dict[str, Any], what: str) -> float:
    """How many times faster than the baseline in the same run: "prefill" or "attention", of the
    tail where the method works behind a prepared context, or "decode".
    """
    base = base | cell.get("same_run", {})
    if what != "decode":
        base = cell.get("baseline", base)
    return base[what] / cell[what]


def decoding(cell: dict[str, Any], base: dict[str, Any]) -> str:
    """The speed-up of decoding, and the rise in bits of a method that chooses there."""
    if not cell.get("decode"):
        return "–"
    speed = f"{gain(cell, base, 'decode'):.2f}×"
    if cell["decode_bits"] is None:
        return f"{speed}, dense"
    return f"{speed}, {signed(cell['decode_bits'] - base['decode_bits'], 4)}"


def signed(x: float, digits: int) -> str:
    """With its sign; nothing is neither more nor less."""
    x = round(x, digits)
    return f"{x:+.{digits}f}" if x else f"{0:.{digits}f}"


def within_limits(cell: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether a setting loses less than `MORE_BITS` and `FEWER_NEEDLES`; if not `needles_tell`,
    the bits alone decide.
    """
    return bits_lost(cell, base) < MORE_BITS and needles_lost(cell, base) < FEWER_NEEDLES


def fastest(results: dict[str, Any], length: int) -> dict[str, str | None]:
    """Of each method the label with the fastest attention within the limits, None if none is."""
    cells = measured(results, length)
    base = cells[BASELINE]
    best: dict[str, str | None] = {}
    for label, cell in cells.items():
        if label == BASELINE:
            continue
        name = results["methods"][label]["family"]
        old = best.setdefault(name, None)
        speed = gain(cell, base, "attention")
        faster = old is None or speed > gain(cells[old], base, "attention")
        if within_limits(cell, base) and faster:
            best[name] = label
    return best


def operating_points(results: dict[str, Any], length: int) -> list[list[str]]:
    """`fastest` as rows of `HEAD`."""
    cells = measured(results, length)
    base = cells[BASELINE]
    rows = []
    for name, label in fastest(results, length).items():
        if label is None:
            rows.append([f"{name}: no setting within the limits", *["–"] * (len(HEAD) - 1)])
            continue
        cell = cells[label]
        rows.append([
            label,
            f"{density(cell):.1%}",
            f"{gain(cell, base, 'attention'):.2f}×",
            f"{gain(cell, base, 'prefill'):.2f}×",
            decoding(cell, base),
            f"{bits_lost(cell, base):.4f}",
            f"{needles_lost(cell, base):.1f}" if needles_tell(base) else "–",
        ])  # fmt: skip
    return rows


def behind(results: dict[str, Any], length: int) -> str:
    """What the numbers of methods that work behind a prepared context are of; "" without any."""
    for cell in measured(results, length).values():
        if "baseline" in cell:
            return (
                f"squeezed: density and speed-ups are of the last {cell['tail']:,} tokens behind a "
                f"prepared context of {cell['context']:,}, against {BASELINE} over a dense cache."
            )
    return ""


HEAD = [
    "method", "density", "attention", "prefill", "decoding, change in bits/token",
    "bits/token lost", "needles lost (points)",
]  # fmt: skip


def markdown(rows: list[list[str]]) -> str:
    """A table for a README."""
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

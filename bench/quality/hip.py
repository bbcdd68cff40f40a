"""How much attention mass HiP keeps at which budget: python -m bench.quality.hip [LENGTH]

HiP and InfiniteHiP at their defaults but for the budget, beside the exact best choice of as many
blocks of two tokens and the window with the sink alone, with as many tokens. Inputs: those of
bench/inputs.py and keys that are alike over some length. Writes bench/results/hip_quality.json and
.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bench.inputs import gen, locality
from bench.recall import attention_mass, best_recall, recall
from sparse_attn import BlockIndex, HiP, InfiniteHiP

RESULTS = Path(__file__).parents[1] / "results"
BUDGETS = (128, 256, 512, 1024, 2048)
SINK, WINDOW, BLOCK = 16, 256, 64


def window_only(query: torch.Tensor, tokens: int) -> BlockIndex:
    rows = -(-query.shape[2] // BLOCK)
    nothing = torch.zeros(1, 1, rows, 0, dtype=torch.int32), torch.zeros(1, 1, rows).int()
    return BlockIndex(*nothing, BLOCK, 2, SINK, WINDOW + tokens)


def stages(budget: int, merge: str) -> InfiniteHiP:
    return InfiniteHiP(
        (64, 32, 8), (8 * budget, 4 * budget, budget), (4, 4, 1), BLOCK, SINK, WINDOW,
        merge_heads=merge,
    )  # fmt: skip


def measure(query: torch.Tensor, key: torch.Tensor, blocks: int) -> dict[str, list[float]]:
    masses = attention_mass(query, key, BLOCK, blocks)
    found = {}
    for name, config in (
        ("HiP", lambda b: HiP(budget=b)),
        ("HiP, two branches (paper)", lambda b: HiP(budget=b, branch=2)),
        ("InfiniteHiP", lambda b: stages(b, "none")),
        ("InfiniteHiP, heads merged", lambda b: stages(b, "all")),
    ):
        found[name] = [recall(masses, config(b).select(query, key)) for b in BUDGETS]
    found["best choice"] = [best_recall(masses, b, 2, SINK, WINDOW) for b in BUDGETS]
    found["window only"] = [recall(masses, window_only(query, b)) for b in BUDGETS]
    return found


def cases(length: int):
    for kind in ("mixed", "sharp"):
        q, k, _ = gen(1, length, kind)
        yield kind, *(torch.from_numpy(x).transpose(1, 2).bfloat16() for x in (q, k)), 16
    for alike in (1, 4, 16):
        q, k = (torch.from_numpy(x).transpose(1, 2) for x in locality(0, length, alike))
        yield f"alike over {alike}", q, k, 1


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(3 * len(results), 3.4), sharey=True)
    for ax, (title, lines) in zip(axes, results.items(), strict=True):
        for name, values in lines.items():
            style = {"best choice": ":", "window only": "--"}.get(name, "o-")
            ax.plot(BUDGETS, values, style, ms=3, label=name)
        ax.set_xscale("log", base=2)
        ax.set_title(title)
        ax.set_xlabel("budget, tokens")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("attention mass kept")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(length: int) -> None:
    results = {}
    for name, query, key, blocks in cases(length):
        results[name] = measure(query, key, blocks)
        print(f"| {name} | " + " | ".join(f"{b}" for b in BUDGETS) + " |")
        for what, values in results[name].items():
            print(f"| {what} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "hip_quality.json").write_text(
        json.dumps({"length": length, "budgets": BUDGETS, "kept": results}, indent=1) + "\n"
    )
    plot(results, RESULTS / "hip_quality.png")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8192)

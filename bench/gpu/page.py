"""`python -m bench gpu_page`: writes docs/gpu.md from bench/results/gpu_check.json and aot.json."""

from __future__ import annotations

import json
import re
from typing import Any

from ..aot import SHARED_LIMIT, SPILL_LIMIT, Row
from ..gpu_check import PARTS, ROOT, met

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "gpu.md"

INTRODUCTION = """# On a GPU

Made by `python -m bench gpu_page` from `gpu_check.json` and `aot.json` in `bench/results`.

## Measured

"""

NOTHING = """Nothing: no GPU was at hand and no kernel has run on one. The Triton kernels have run
under Triton's interpreter only, the CUDA kernels in an [executor](cuda.md) on the CPU only, where
they pass the same tests as the CPU kernels; what follows was found without a GPU. Tests that need
one are shown as skipped.
"""

COMMANDS = """
`python bench/gpu_check.py` builds, checks and measures everything on one GPU in 8 minutes, in a
checkout with PyTorch ≥ 2.11 and Triton and nothing installed. Each part is a process of its own:
what fails is reported, and the rest goes on.

| option | |
|---|---|
| `--only dense,decode` | these parts |
| `--dry-run` | all parts at tiny sizes on the CPU, under the interpreter |

Parts in their order; what no longer fits into the 8 minutes is reported as skipped. `tests` is a
fixed part of the suites: `python -m pytest -k "triton or cuda or gpu"` runs the whole.

| part | at most |
|---|---|
"""

FIRST_CALL = """
## The first call

Tile sizes stand in one table per architecture (`triton_kernels/configs.py`). The first call of an
operator compiles one configuration of each kernel it launches and tries no others. Lengths and
batch sizes compile nothing anew where the rows of the tensors are multiples of 16 elements
(head_dim 64, 96, 128, ..; 40 compiles anew as strides become multiples of 16 or cease to be), but
for a few steps: decode, too few tiles to fill the GPU, more than 128 blocks.
`sparse_attn.warmup(n_heads, n_key_heads, head_dim)` makes these calls beforehand;
Triton keeps what it compiled on disk. Capture CUDA graphs after it. Seconds of one processor to
compile for sm_90:

| call | kernels | seconds |
|---|---|---|
"""

AHEAD = """
## Compiled ahead of time

Registers per thread / bytes spilled per thread / shared memory per block, from
`python -m bench aot`. It compiles every configuration for GPUs that are not here and fails above
{spill} spilled bytes or above the shared memory ({limits};
consumer GPUs take the tiles of sm_80 and have 99 KiB). Where a case compiles a kernel more than
once, the most demanding; over all head_dim if the kernel's tile depends on none. float16 is within
a few registers of bf16.

| case | kernel | {archs} |
|---|---|{rule}
"""


SALE = """
## SALE's selection, estimated

Not measured: counted in the machine code of `sale_estimate`'s CUDA kernel (`python -m bench
sass`), which a warp executes for 64 queries × 32 keys of one head.

| GPU | head_dim | instructions | of them products | |
|---|---|---|---|---|
{rows}
On an H100 SXM ({processors} multiprocessors, {clock} GHz, 8192 operations of 8-bit integers per
clock and multiprocessor at the peak of 1979 TOP/s, four instructions issued per clock) at 128k
tokens, 32 heads, head_dim 128, where the fastest dense kernel is taken to need {dense:.0f} ms
(600 TFLOP/s):

| bound | clocks per 64 × 32 | ms | share of dense |
|---|---|---|---|
{bounds}
The peak needs wgmma, and this kernel has mma.sync, for which the second row assumes 62 %: that is
what to expect at best, and it misses the goal of 20 %. For sm_90 the Triton kernel is compiled to
wgmma, but to about 400 instructions for the same work: 100 clocks to issue them, no less.
Quantisation, the reference region and the lists come on top.
"""
PROCESSORS, CLOCK, DENSE_RATE, HEADS, LENGTH = 132, 1.83e9, 600e12, 32, 131072


def sale(tiles: list[dict[str, Any]]) -> str:
    """What the counts of bench/results/sass.json come to."""
    rows = "".join(
        f"| {t['arch']} | {t['head_dim']} | {t['instructions']} | {t['products']} "
        f"| `{t['product']}` |\n" for t in tiles
    )  # fmt: skip
    (own,) = (t for t in tiles if t["arch"] == "sm_90a" and t["head_dim"] == 128)
    pairs = HEADS * LENGTH**2 / 2
    dense = 4 * 128 * pairs / DENSE_RATE
    peak = 2 * 128 * 64 * 32 / 8192
    bounds = ""
    for what, clocks in (("products at the peak", peak), ("products at 62 % of it", peak / 0.62),
                         ("instructions issued", own["instructions"] / 4)):  # fmt: skip
        seconds = pairs / (64 * 32) * clocks / PROCESSORS / CLOCK
        bounds += f"| {what} | {clocks:.0f} | {seconds * 1e3:.0f} | {seconds / dense:.0%} |\n"
    return SALE.format(
        rows=rows, processors=PROCESSORS, clock=CLOCK / 1e9, dense=dense * 1e3, bounds=bounds
    )


def measured(found: dict[str, Any]) -> str:
    """The table of one run on a GPU."""
    device = found["device"]
    if device.get("gpu") is None:
        raise SystemExit("gpu_check.json holds no GPU's numbers, it is of a dry run")
    lines = [
        f"{device['date']}, {device['gpu']} ({device['arch']}), driver {device['driver']}, "
        f"torch {device['torch']}, CUDA {device['cuda']}, Triton {device['triton']}. "
        f"CUDA kernels: {found['cuda_kernels']}.",
        "", "| what | value | goal | met |", "|---|---|---|---|",
    ]  # fmt: skip
    notes = []
    for row in found["rows"]:
        if "note" in row:
            notes.append(f"- {row['what']}: {' '.join(row['note'].split())}")
        else:
            value = f"{row['value']:.4g} {row['unit']}".strip()
            lines.append(f"| {row['what']} | {value} | {row['goal']} | {met(row)} |")
    notes += [
        f"- part {name}: {part['status']}"
        for name, part in found["parts"].items()
        if part["status"] != "done"
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def first_call(rows: list[Row]) -> str:
    lines = []
    for call in ("prefill", "backward", "decode", "select", "sale", "merge"):
        case = f"{call} bf16 128"
        found = [row for row in rows if row.case == case and row.arch == "sm_90"]
        lines.append(f"| {case} | {len(found)} | {sum(row.seconds for row in found):.1f} |")
    return "\n".join(lines) + "\n"


# whose tiles hold a row of queries or keys: every case counts
BY_WIDTH = (
    "block_sparse_attention", "query_gradient", "key_gradient", "probe_extent", "probe_profile",
    "sale_estimate",
    "hip_select", "hip_prune_select",
    "cluster_scores", "squeezed_attend",
)  # fmt: skip


def compiled(rows: list[Row]) -> str:
    """Every case of the kernels in `BY_WIDTH`; of others the most demanding of each dtype."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda r: (r.spilled, r.registers, r.shared)):
        if " f16 " in row.case:
            continue
        operator, dtype = re.split(r"\W", row.case)[0], "f32" if " f32 " in row.case else "bf16"
        case = row.case if row.kernel in BY_WIDTH else f"{operator} {dtype}"
        groups.setdefault((case, row.kernel), {})[row.arch] = row
    lines = []
    for (case, kernel), found in sorted(groups.items()):
        cells = [
            f"{r.registers} / {r.spilled} / {r.shared / 1024:.0f} KiB"
            for r in (found[arch] for arch in SHARED_LIMIT)
        ]
        lines.append(f"| {case} | `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def text() -> str:
    """The whole page."""
    file = RESULTS / "gpu_check.json"
    rows = [Row(**row) for row in json.loads((RESULTS / "aot.json").read_text())]
    ahead = AHEAD.format(
        spill=SPILL_LIMIT,
        limits=", ".join(f"{arch} {size >> 10} KiB" for arch, size in SHARED_LIMIT.items()),
        archs=" | ".join(SHARED_LIMIT), rule="---|" * len(SHARED_LIMIT),
    )  # fmt: skip
    parts = "".join(f"| {name} | {seconds} s |\n" for name, (_, seconds) in PARTS.items())
    return (
        INTRODUCTION
        + (measured(json.loads(file.read_text())) if file.exists() else NOTHING)
        + COMMANDS + parts
        + FIRST_CALL + first_call(rows)
        + sale(json.loads((RESULTS / "sass.json").read_text()))
        + ahead + compiled(rows)
    )  # fmt: skip


def main() -> None:
    PAGE.write_text(text())
    print(f"written: {PAGE}")

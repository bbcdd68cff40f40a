"""`python -m bench cuda_aot [--quick]`: compiles the CUDA kernels, with no GPU; what they use.

Each case asks an operator's plan, on tensors without data, which kernels it would launch; nvcc
compiles those. The table shows registers and spilled bytes per thread, shared memory per block.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

# architecture: multiprocessors, bytes of shared memory that a block can have; the code of sm_80
# runs on sm_86 and sm_89 too, which have the least
LIMITS = {"sm_80": (108, 99 * 1024), "sm_90a": (132, 227 * 1024), "sm_100a": (148, 227 * 1024)}
QUICK = ("sm_80", "sm_90a")
FLAGS = ("-O3", "-std=c++20", "-ftz=true", "-cubin", "-w", "--resource-usage")
CACHE = Path(__file__).parent.parent / "build" / "cuda_aot"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One compiled kernel, with what its plan adds."""

    op: str
    arch: str
    kernel: str
    threads: int
    registers: int
    spilled: int
    shared: int


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(quick: bool) -> list[tuple[Callable[..., None], Any]]:
    """Functions and their arguments; quick: the kernels of common calls, in one dtype."""
    from .cases import all_of

    dtypes = (torch.bfloat16,) if quick else DTYPES.values()
    return [case for of in all_of("cuda") for dtype in dtypes for case in of(dtype, quick)]


def planned(arch: str, quick: bool) -> dict[str, dict[str, tuple[int, int]]]:
    """operator -> kernel -> threads and dynamic shared memory of its largest launch."""
    from sparse_attn.nvrtc import launch

    found: dict[str, dict[str, tuple[int, int]]] = {}

    def record(op: str, name: str, plan: Any, *rest: Any) -> None:
        threads = plan.block[0] * plan.block[1] * plan.block[2]
        before = found.setdefault(op, {}).get(name, (0, 0))
        found[op][name] = max(before, (threads, plan.shared_bytes))

    run, limits = launch.run, launch.limits
    launch.run, launch.limits = record, lambda device: launch.DeviceLimits(*LIMITS[arch])
    try:
        for function, args in cases(quick):
            function(*args)
    finally:
        launch.run, launch.limits = run, limits
    return found


def build(op: str, arch: str, names: list[str], cubin: Path) -> str:
    """Compiles the named kernels of an operator; returns what ptxas says of them, demangled."""
    cubin.with_suffix(".cu").write_text(code(op, names))
    done = subprocess.run(
        ["nvcc", *FLAGS, f"-arch={arch}", cubin.with_suffix(".cu").name, "-o", cubin.name],
        cwd=cubin.parent, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{op} for {arch}: {done.stderr[-3000:]}")
    return demangled(done.stdout + done.stderr)


def code(op: str, names: list[str]) -> str:
    source = import_module("sparse_attn.nvrtc.source")
    uses = "".join(f"auto* f{i} = &sparse_attn::{name};\n" for i, name in enumerate(names))
    return source.assembled(op) + uses


def reported(op: str, arch: str, names: list[str]) -> str:
    """What ptxas says; kept by the hash of all that decides it, for a test that asks again."""
    about = (code(op, names), arch, *FLAGS, nvcc_version())
    kept = CACHE / f"{op}_{hashlib.sha256(repr(about).encode()).hexdigest()[:24]}.txt"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            written = Path(folder) / kept.name
            written.write_text(build(op, arch, names, Path(folder) / "kernels.cubin"))
            written.replace(kept)
    return kept.read_text()


@cache
def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def demangled(text: str) -> str:
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


def compile_kernels(op: str, arch: str, kernels: dict[str, tuple[int, int]]) -> list[Row]:
    """Registers, spills and static shared memory as ptxas reports them."""
    names = sorted(kernels)
    text, rows = reported(op, arch, names), []
    for part in text.split("Compiling entry function")[1:]:
        name = next((n for n in names if f"sparse_attn::{n}(" in part.split("\n")[0]), None)
        if name is None:  # no template, and no case launches it
            continue
        stores, loads = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        static = re.search(r"(\d+) bytes smem", part)
        threads, dynamic = kernels[name]
        rows.append(
            Row(op, arch, name, threads, int(re.search(r"Used (\d+) registers", part)[1]),
                int(stores) + int(loads), dynamic + int(static[1] if static else 0))
        )  # fmt: skip
    missing = set(names) - {row.kernel for row in rows}
    if missing:
        raise RuntimeError(f"{op} for {arch}: nvcc reports nothing of {sorted(missing)}")
    return sorted(rows, key=lambda r: re.sub(r"\d+", lambda n: n[0].zfill(4), r.kernel))


def table(quick: bool) -> list[Row]:
    jobs = [
        (op, arch, kernels)
        for arch in (QUICK if quick else LIMITS)
        for op, kernels in planned(arch, quick).items()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda job: compile_kernels(*job), jobs) for row in rows]


def main(arguments: list[str]) -> None:
    if shutil.which("nvcc") is None:
        raise SystemExit("no nvcc on PATH: install the CUDA toolkit")
    quick = "--quick" in arguments
    rows = table(quick)
    if "--json" in arguments:
        print(json.dumps([asdict(row) for row in rows]))
        return
    archs = QUICK if quick else tuple(LIMITS)
    print("| kernel | threads | " + " | ".join(archs) + " |\n|---|---|" + "---|" * len(archs))
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.kernel, {})[row.arch] = row
    for kernel, found in groups.items():
        cells = [
            f"{r.registers} / {r.spilled} / {r.shared / 1024:.0f} KiB" if r else "not used"
            for r in (found.get(arch) for arch in archs)
        ]
        threads = next(iter(found.values())).threads
        print(f"| `{kernel}` | {threads} | " + " | ".join(cells) + " |")

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


def merge(dtype: torch.dtype, dv: int) -> None:
    from sparse_attn.nvrtc.merge_attention_states import merge_attention_states as run

    out, lse = empty(1, 8, 4096, dv, dtype=dtype), empty(1, 8, 4096)
    run(out, lse, out, lse)


def attention(dtype: torch.dtype, dim: int, q_block: int, n_queries: int = 4096) -> None:
    """Paged: the same kernels, with more shared memory."""
    from sparse_attn.nvrtc.block_sparse_attention import block_sparse_attention as run

    query = empty(1, 8, n_queries, dim, dtype=dtype)
    key = empty(1024, 2, 16, dim, dtype=dtype)
    table = empty(1, 512, dtype=torch.int32)
    counts = empty(1, 2, -(-n_queries // q_block), dtype=torch.int32)
    indices = empty(*counts.shape, 64, dtype=torch.int32)
    run(query, key, key, indices, counts, q_block, 128, True, 0, 0, None, table, table[:, 0])


def select(dtype: torch.dtype, dim: int) -> None:
    from sparse_attn.nvrtc.flex_prefill_select import flex_prefill_select as run

    run(empty(1, 8, 131072, dim, dtype=dtype), empty(1, 2, 131072, dim, dtype=dtype))


def sale(dtype: torch.dtype, dim: int, kv_block: int = 32) -> None:
    from sparse_attn.nvrtc.sale_estimate import sale_estimate
    from sparse_attn.nvrtc.sale_quantize import sale_quantize
    from sparse_attn.nvrtc.sale_threshold import sale_threshold

    n = 131072
    query, key = empty(1, 8, n, dim, dtype=dtype), empty(1, 2, n, dim, dtype=dtype)
    query_packed, query_step, _ = sale_quantize(query)
    key_packed, key_step, mean = sale_quantize(key, None, "key", kv_block)
    sale_threshold(query, key, mean, empty(8), 64, kv_block)
    rows = empty(1, 8, n)
    sale_estimate(query_packed, query_step, key_packed, key_step, rows, rows, 64, kv_block)


def hip(dtype: torch.dtype, dim: int) -> None:
    from sparse_attn.nvrtc.hip_prune_select import hip_prune_select as prune
    from sparse_attn.nvrtc.hip_select import hip_select as search

    query, key = (empty(1, heads, 131072, dim, dtype=dtype) for heads in (8, 2))
    search(query, key)
    prune(query, key, [256, 32, 8], [32768, 8192, 2048], [4, 4, 1])


def squeezed_lookup(dtype: torch.dtype, dim: int, n_queries: int) -> None:
    from sparse_attn.nvrtc.squeezed_lookup import squeezed_lookup as run

    def level(clusters: int) -> tuple[torch.Tensor, ...]:
        return (
            empty(1, 2, clusters, dim, dtype=dtype), empty(1, 2, clusters),
            empty(1, 2, clusters + 1, dtype=torch.int32), empty(),
        )  # fmt: skip

    run(empty(1, 8, n_queries, dim, dtype=dtype), *level(6500), *level(1300))


def squeezed_attend(dtype: torch.dtype, dim: int, n_queries: int) -> None:
    from sparse_attn.nvrtc.squeezed_attend import squeezed_attend as run

    context, tail = empty(1, 2, 131072, dim, dtype=dtype), empty(1, 2, 1200, dim, dtype=dtype)
    starts, counts = empty(1, 2, 3250, dtype=torch.int32), empty(1, 2, dtype=torch.int32)
    query = empty(1, 8, n_queries, dim, dtype=dtype)
    run(query, context, context, tail, tail, starts, starts, counts)


def cases(quick: bool) -> list[tuple[Callable[..., None], Any]]:
    """Functions and their arguments; quick: the kernels of common calls, in one dtype."""
    found: list[tuple[Callable[..., None], Any]] = []
    for name in ("bf16",) if quick else DTYPES:
        dtype = DTYPES[name]
        found += [(merge, (dtype, dv)) for dv in ((128,) if quick else (128, 5))]
        found += [(select, (dtype, 256))]  # the widest slices of the probe
        found += [(sale, (dtype, dim)) for dim in ((128, 256) if quick else (64, 96, 128, 256, 40))]
        if not quick:
            found += [(sale, (dtype, 128, kv_block)) for kv_block in (16, 64)]
        found += [(hip, (dtype, dim)) for dim in ((128,) if quick else (64, 128, 256))]
        for dim in (64, 128) if quick else (64, 96, 128, 256):
            found.append((attention, (dtype, dim, 128)))  # 128 rows, or 64
            found.append((attention, (dtype, dim, 1, 1)))  # decoding: 16 rows
            if not quick:
                found.append((attention, (dtype, dim, 16)))  # 64 rows
        for dim in (128,) if quick else (64, 96, 128, 256):
            for n_queries in (1, 1024) if quick else (1, 16, 1024):
                found.append((squeezed_lookup, (dtype, dim, n_queries)))
                found.append((squeezed_attend, (dtype, dim, n_queries)))
    return found


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

"""`python -m bench aot [--quick] [--json] [--only TEXT]`: compiles for GPUs that are not here.

Without --quick and --json it also writes bench/results/aot.json, from which docs/gpu.md is made;
with --only, the rows of the cases whose names contain TEXT, and leaves the others as they are.
Each case runs an operator's launcher on fake CUDA tensors; what it would launch is compiled. The
table shows registers and spilled bytes per thread and shared memory per block; the command fails
where one is over its bound.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# bytes per block; consumer parts take the tiles of sm_80 and have less than it
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
SPILL_LIMIT = 128  # bytes per thread: a few values that live across the loops, none inside them
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    case: str
    arch: str
    kernel: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    seconds: float  # of one processor, to compile; almost 0 if Triton's cache had it


def attention(dtype: str, head_dim: int, n_queries: int, q_block: int = 128, kv_block: int = 128,
              edges: bool = False, value_dim: int = 0, heads: int = 8) -> None:  # fmt: skip
    from sparse_attn.triton_kernels.block_sparse_attention import block_sparse_attention as run

    n_keys = 8192
    query = torch.empty(1, heads, n_queries, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, n_keys, head_dim, dtype=DTYPES[dtype], device="cuda")
    value = torch.empty(1, 2, n_keys, value_dim or head_dim, dtype=DTYPES[dtype], device="cuda")
    rows, blocks = -(-n_queries // q_block), n_keys // kv_block
    counts = torch.empty(1, 2, rows, dtype=torch.int32, device="cuda")
    indices = torch.empty(1, 2, rows, blocks, dtype=torch.int32, device="cuda")
    run(query, key, value, indices, counts, q_block, kv_block, True, *(64, 64) if edges else (0, 0))


def backward(dtype: str, head_dim: int, block: int = 128, edges: bool = False,
             value_dim: int = 0) -> None:  # fmt: skip
    from sparse_attn.triton_kernels.block_sparse_attention_backward import (
        block_sparse_attention_backward as run,
    )

    from sparse_attn.block_index import BlockIndex

    n = 4096
    query = torch.empty(1, 8, n, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, n, head_dim, dtype=DTYPES[dtype], device="cuda")
    value = torch.empty(1, 2, n, value_dim or head_dim, dtype=DTYPES[dtype], device="cuda")
    out = torch.empty(1, 8, n, value_dim or head_dim, dtype=DTYPES[dtype], device="cuda")
    lse = torch.empty(1, 8, n, device="cuda")
    counts = torch.empty(1, 2, n // block, dtype=torch.int32, device="cuda")
    indices = torch.empty(1, 2, n // block, n // block, dtype=torch.int32, device="cuda")
    # a torch without CUDA makes tensors there but cannot compare or sort them
    offsets, rows = counts.new_empty(1, 2, n // block + 1), indices.flatten(2)
    BlockIndex.transpose = lambda index, n_keys: (offsets, rows)
    run(out, lse, query, key, value, out, lse, indices, counts, block, block, True,
        *(64, 64) if edges else (0, 0))  # fmt: skip


def merge(dtype: str, head_dim: int) -> None:
    from sparse_attn.triton_kernels.merge_attention_states import merge_attention_states as run

    out = torch.empty(1, 8, 4096, head_dim, dtype=DTYPES[dtype], device="cuda")
    lse = torch.empty(1, 8, 4096, device="cuda")
    run(out, lse, out, lse)


def flex_prefill(dtype: str, head_dim: int, block: int = 128, gamma: float = 0.95) -> None:
    from sparse_attn.triton_kernels.flex_prefill_select import flex_prefill_select as run

    query = torch.empty(1, 8, 131072, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, 131072, head_dim, dtype=DTYPES[dtype], device="cuda")
    run(query, key, gamma, block_size=block)


def sale(dtype: str, head_dim: int, q_block: int = 64, kv_block: int = 32) -> None:
    from sparse_attn.triton_kernels.sale_estimate import sale_estimate
    from sparse_attn.triton_kernels.sale_quantize import sale_quantize
    from sparse_attn.triton_kernels.sale_threshold import sale_threshold

    n = 131072
    query = torch.empty(1, 8, n, head_dim, dtype=DTYPES[dtype], device="cuda")
    key = torch.empty(1, 2, n, head_dim, dtype=DTYPES[dtype], device="cuda")
    query_packed, query_step, _ = sale_quantize(query)
    key_packed, key_step, mean = sale_quantize(key, None, "key", kv_block)
    threshold, rows = torch.empty(8, device="cuda"), torch.empty(1, 8, n, device="cuda")
    sale_threshold(query, key, mean, threshold, q_block, kv_block)
    sale_estimate(query_packed, query_step, key_packed, key_step, rows, rows, q_block, kv_block)


def cases(quick: bool) -> dict[str, tuple[Any, ...]]:
    """Name -> (function, its arguments): every row of the configuration table, every code path."""
    found: dict[str, tuple[Any, ...]] = {
        "merge bf16 128": (merge, "bf16", 128),
        "select everything bf16 128": (flex_prefill, "bf16", 128, 128, 1.0),
        "sale bf16 128": (sale, "bf16", 128),
    }
    for dtype in ("bf16", "f32") if quick else DTYPES:
        for d in (128,) if quick else (64, 128, 256):
            found[f"prefill {dtype} {d}"] = (attention, dtype, d, 4096)
            found[f"decode {dtype} {d}"] = (attention, dtype, d, 1, 1, 16, True)
            found[f"backward {dtype} {d}"] = (backward, dtype, d)
            found[f"select {dtype} {d}"] = (flex_prefill, dtype, d)
            if not quick:
                found[f"sink+window {dtype} {d}"] = (attention, dtype, d, 4096, 128, 128, True)
                found[f"blocks of 64 {dtype} {d}"] = (attention, dtype, d, 4096, 64, 64)
                found[f"blocks of 16 {dtype} {d}"] = (attention, dtype, d, 4096, 16, 16)
                found[f"gathered tokens {dtype} {d}"] = (attention, dtype, d, 4096, 128, 1, True)
    if not quick:
        found |= {f"merge {dtype} 128": (merge, dtype, 128) for dtype in DTYPES}
        for d in (64, 128, 256):
            found[f"backward, sink+window bf16 {d}"] = (backward, "bf16", d, 128, True)
        found["backward, blocks of 16 bf16 128"] = (backward, "bf16", 128, 16)
        found["backward bf16 192, values 128"] = (backward, "bf16", 192, 128, False, 128)
        found["select bf16 128, blocks of 64"] = (flex_prefill, "bf16", 128, 64)
        found |= {f"sale bf16 {d}": (sale, "bf16", d) for d in (64, 256)}
        found["sale f32 128"] = (sale, "f32", 128)
        found["sale, blocks of 16 bf16 128"] = (sale, "bf16", 128, 16, 16)
        found["sale, blocks of 128 and 64 bf16 128"] = (sale, "bf16", 128, 128, 64)
        found["prefill bf16 96"] = (attention, "bf16", 96, 4096)
        found["prefill bf16 192, values 128"] = (attention, "bf16", 192, 4096, 128, 128, False, 128)
    return found


def specialise(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What a launch compiles for: types, constants, and which arguments are multiples of 16."""
    named = dict(zip(kernel.arg_names, args, strict=False)) | options
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    multiples = []
    for i, parameter in enumerate(kernel.params):
        name, x = parameter.name, named[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(x, int) and x == 1 and not free):
            types[name], constants[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            types[name] = "*" + NAMES[x.dtype]
            multiples.append(i)  # PyTorch's allocations are
        elif isinstance(x, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            if x % 16 == 0 and not free:
                multiples.append(i)
    return types, constants, multiples


def compile_one(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: str) -> Any:
    """Compiles a kernel for the arguments of a launch, specialised as the launch would be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, multiples = specialise(kernel, args, options)
    aligned = {(i,): [["tt.divisibility", 16]] for i in multiples}
    source = ASTSource(kernel, types, constants, aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    of_compiler = ("num_warps", "num_stages", "enable_fp_fusion")
    flags = {k: options[k] for k in options if k in of_compiler}
    return triton.compile(source, target=target, options=flags)


NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
         torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8"}  # fmt: skip


def usage(compiled: Any) -> dict[str, int]:
    """Registers and stack of a cubin; without local arrays the stack holds spills only."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "spilled": int(stack)}


def launches(arch: str, function: Any, *args: Any) -> list[tuple[Any, ...]]:
    """(kernel, programs, arguments, options) of what a function of fake tensors would launch."""
    from sparse_attn.triton_kernels import launch
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: list[tuple[Any, ...]] = []

    def record(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        found.append((kernel, programs, args, options))

    run, properties = launch.run, launch.properties
    launch.run, launch.properties = record, lambda index: (arch, 132)
    try:
        with FakeTensorMode():
            function(*args)
    finally:
        launch.run, launch.properties = run, properties
    return found


def processor_seconds() -> float:
    """Of this process and of the assembler that it has run."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def compile_case(name: str, arch: str, quick: bool) -> list[Row]:
    """Everything one case would launch."""
    rows = []
    for kernel, _, args, options in launches(arch, *cases(quick)[name]):
        start = processor_seconds()
        compiled = compile_one(kernel, args, options, arch)
        seconds = round(processor_seconds() - start, 2)
        m = compiled.metadata
        kernel_name = kernel.__name__.removesuffix("_kernel")
        used = usage(compiled) | {"shared": m.shared, "seconds": seconds}
        rows.append(Row(name, arch, kernel_name, m.num_warps, m.num_stages, **used))
    return rows


def table(quick: bool, processes: int, only: str = "") -> list[Row]:
    names = [name for name in cases(quick) if only in name]
    jobs = [(name, arch, quick) for name in names for arch in SHARED_LIMIT]
    with ProcessPoolExecutor(processes) as pool:
        return [row for rows in pool.map(compile_case, *zip(*jobs, strict=True)) for row in rows]


def over_limits(rows: list[Row]) -> list[str]:
    """What spills more than it may, or needs more shared memory than there is."""
    return [
        f"{r.case}, {r.kernel}, {r.arch}: {r.spilled} bytes spilled, {r.shared} bytes shared"
        for r in rows
        if r.spilled > SPILL_LIMIT or r.shared > SHARED_LIMIT[r.arch]
    ]


def markdown(rows: list[Row]) -> str:
    """registers / spilled bytes / shared memory; of kernels compiled twice in a case the larger."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda r: (r.spilled, r.registers)):
        groups.setdefault((row.case, row.kernel), {})[row.arch] = row
    lines = ["| case | kernel | " + " | ".join(SHARED_LIMIT) + " |", "|---|---|" + "---|" * 3]
    for (case, kernel), found in sorted(groups.items()):
        cells = [
            f"{r.registers} / {r.spilled} / {r.shared / 1024:.0f} KiB"
            for r in (found[arch] for arch in SHARED_LIMIT)
        ]
        lines.append(f"| {case} | `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_json(rows: list[Row]) -> str:
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n"


def main(arguments: list[str]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1: the interpreter compiles nothing, unset it")
    only = arguments[arguments.index("--only") + 1] if "--only" in arguments else ""
    rows = table("--quick" in arguments, os.cpu_count() or 1, only)
    print(as_json(rows) if "--json" in arguments else markdown(rows))
    if not {"--quick", "--json"} & set(arguments):
        file = Path(__file__).parent / "results" / "aot.json"
        kept = [Row(**row) for row in json.loads(file.read_text())] if only else []
        order = list(cases(quick=False))
        rows += [row for row in kept if row.case in order and only not in row.case]
        file.write_text(as_json(sorted(rows, key=lambda row: order.index(row.case))))
    wrong = over_limits(rows)
    if wrong:
        raise SystemExit("over the limits:\n" + "\n".join(wrong))

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


def cases(quick: bool) -> dict[str, tuple[Any, ...]]:
    """Name -> (function, its arguments): every row of the configuration table, every code path."""
    from .cases import all_of

    return {name: case for of in all_of("triton") for name, case in of(quick).items()}


def specialise(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What a launch compiles for: types, constants, and which arguments are multiples of 16."""
    named = dict(zip(kernel.arg_names, args, strict=False)) | options
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    multiples = []
    for i, parameter in enumerate(kernel.params):
        name, x = parameter.name, named[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1 and not free):
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


def merged(rows: list[Row], committed: list[Row]) -> list[Row]:
    """The committed table with new rows of some cases, in the order of the cases."""
    renewed, order = {row.case for row in rows}, list(cases(quick=False))
    kept = [row for row in committed if row.case in order and row.case not in renewed]
    return sorted([*kept, *rows], key=lambda row: order.index(row.case))


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
        committed = [Row(**row) for row in json.loads(file.read_text())] if only else []
        file.write_text(as_json(merged(rows, committed)))
    wrong = over_limits(rows)
    if wrong:
        raise SystemExit("over the limits:\n" + "\n".join(wrong))

"""`python -m bench sass`: what SALE's selection executes per block of keys, from the machine code.

Compiles sale_estimate's kernels for GPUs that are not here, disassembles them and counts what a
warp executes for its 64 queries and a block of keys, which is a piece of code without a jump.
Writes bench/results/sass.json, from which docs/gpu.md is made. Needs nvcc, and cuobjdump of CUDA's
toolkit or of Triton.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from .cuda_aot import LIMITS, build, demangled

# head dimension -> the kernel for blocks of 32 keys
KERNELS = {64: "sale_estimate_kernel<2, 4>", 128: "sale_estimate_kernel<4, 4>"}
JUMPS = ("BRA", "BSYNC", "BSSY", "EXIT", "CALL", "RET")


@dataclass(frozen=True)
class Tile:
    """What a warp executes for 64 queries and 32 keys."""

    arch: str
    head_dim: int
    product: str  # the matrix instruction
    products: int
    instructions: int  # all of them


def disassembler() -> str | None:
    """cuobjdump, where there is one that finds its nvdisasm."""
    if shutil.which("cuobjdump") and shutil.which("nvdisasm"):
        return shutil.which("cuobjdump")
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def pieces(cubin: Path) -> dict[str, list[list[str]]]:
    """Kernel -> its pieces of code up to a jump, as the names of the instructions."""
    text = subprocess.run(
        [str(disassembler()), "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[list[str]]] = {}
    for part in demangled(text).split("Function : ")[1:]:
        name = re.search(r"sparse_attn::(\w+(?:<[^>]*>)?)", part.split("\n")[0])
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", part, re.M)
        code: list[list[str]] = [[]]
        for line in lines:
            code[-1].append(line)
            if line.startswith(JUMPS):
                code.append([])
        found[name[1] if name else ""] = code
    return found


def compiled(arch: str, kernels: list[str]) -> dict[str, list[list[str]]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        build("sale_estimate", arch, kernels, cubin)
        return pieces(cubin)


def tile(code: list[list[str]], arch: str, head_dim: int) -> Tile:
    """Of the two pieces with products the one without conversions, which nearly all blocks take."""
    with_products = [p for p in code if any(x.startswith("IMMA") for x in p)]
    piece = min(with_products, key=len)
    products = [x for x in piece if x.startswith("IMMA")]
    return Tile(arch, head_dim, products[0], len(products), len(piece))


def main() -> None:
    if shutil.which("nvcc") is None or disassembler() is None:
        raise SystemExit("no nvcc on PATH, or no cuobjdump there or in Triton")
    tiles = []
    for arch in LIMITS:
        found = compiled(arch, list(KERNELS.values()))
        tiles += [tile(found[name], arch, dim) for dim, name in KERNELS.items()]
    for row in tiles:
        print(row)
    lines = ",\n".join(json.dumps(asdict(row)) for row in tiles)
    (Path(__file__).parent / "results" / "sass.json").write_text(f"[\n{lines}\n]\n")

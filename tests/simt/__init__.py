"""Runs the device code of csrc/cuda on the CPU, where every access and every barrier is checked.

See docs/cuda.md. The sources are compiled with g++ at the first use and cached by their hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-g1", "-w"]
# device code calls a check before each access; merging accesses would hide which they were
DEVICE = ["-O2", "-fsanitize=thread", "-fno-tree-vectorize", "-fno-store-merging"]
HOST = ["-O3"]
DOOR = ["-O0"]  # pybind11's templates, called once per run


def why_not() -> str | None:
    """What the executor needs and this machine lacks."""
    if shutil.which("g++") is None:
        return "the SIMT executor needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "the SIMT executor needs pybind11: pip install pybind11"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the SIMT executor needs Python's headers: install python3-dev"
    return None


def digest(csrc: Path) -> str:
    sources = [p for p in HERE.rglob("*") if p.suffix in (".h", ".cpp")] + [Path(__file__)]
    sources += [p for d in ("cuda", "common") for p in (csrc / d).rglob("*.*h")]
    found = hashlib.sha256(sysconfig.get_platform().encode())
    for path in sorted(sources):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def compile_all(csrc: Path, ops: Iterable[str], name: str, target: Path) -> None:
    import pybind11

    include = [HERE.parent, HERE, csrc, pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*FLAGS, f"-DSIMT_MODULE={name}", *(f"-I{p}" for p in include)]
    sources = [(p, DOOR if p.stem == "module" else HOST) for p in sorted(HERE.glob("*.cpp"))]
    sources += [(HERE / "ops" / f"{op}.cpp", DEVICE) for op in ops]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compile_one(source: tuple[Path, list[str]]) -> str:
            made = f"{folder}/{source[0].stem}.o"
            command = ["g++", *flags, *source[1], "-c", str(source[0]), "-o", made]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-5000:]}")
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = f"{folder}/{target.name}"
        subprocess.run(["g++", "-shared", *objects, "-o", linked, "-ldl"], check=True)
        os.replace(linked, target)


@cache
def module(csrc: Path = CSRC, ops: tuple[str, ...] | None = None) -> ModuleType:
    """The compiled executor with the programs of `ops`, by default of all."""
    ops = ops or tuple(sorted(p.stem for p in (HERE / "ops").glob("*.cpp")))
    name = "simt_" + hashlib.sha256(repr((digest(csrc), ops)).encode()).hexdigest()[:12]
    target = CACHE / f"{name}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # another process may be at it: one is enough
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_all(csrc, ops, name, target)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def named_line(message: str, library: str) -> str:
    """Replaces an offset in the library by the file and the line it was compiled from."""
    found = re.search(r" \[\+(0x[0-9a-f]+)\]", message)
    if not found:
        return message
    where = ""
    if shutil.which("addr2line"):
        lines = subprocess.run(
            ["addr2line", "-i", "-e", library, found[1]], capture_output=True, text=True
        ).stdout.split("\n")
        known = [Path(line.split(" ")[0]).name for line in lines if line and "??" not in line]
        known = [line for line in known if not line.startswith("host.h")]
        where = " (" + " from ".join(known) + ")" if known else ""
    return message.replace(found[0], where)


def run(
    program: str,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
    numbers: Mapping[str, float],
    seed: int = 0,
    library: ModuleType | None = None,
) -> None:
    """Runs a program; outputs are written to. Raises RuntimeError at the first fault."""
    library = library or module()

    def handed(x: torch.Tensor, writable: bool):
        return library.Tensor(x.data_ptr(), x.shape, x.stride(), x.element_size(), writable)

    tensors = {name: handed(x, False) for name, x in inputs.items()}
    tensors |= {name: handed(x, True) for name, x in outputs.items()}
    try:
        library.run(program, tensors, {k: float(v) for k, v in numbers.items()}, seed)
    except RuntimeError as error:
        raise RuntimeError(f"{program}: {named_line(str(error), library.__file__)}") from None

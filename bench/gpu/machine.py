"""The parts that run other programs: the machine, the build, the tests, first calls, sanitizers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from .context import Context
from .timing import time_in_turn

ROOT = Path(__file__).parents[2]

SUITE = "(triton or cuda) and (gpu and not inductor or bfloat16 and (parity or kernel_equals))"


def command(
    context: Context, words: list[str], seconds: float, **env: str
) -> tuple[int | None, str]:
    """Runs a program with a time limit; its exit status (None: out of time) and what it printed."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | env, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(max(1, min(seconds, context.left() - 3)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        out.seek(0)
        return status, out.read()


def machine(context: Context) -> None:
    """What the measurements are on, and the two ceilings: a copy and a matrix product."""
    n = context.size(8192, 64)
    a, b = (torch.randn(n, n, device=context.device, dtype=context.dtype) for _ in range(2))
    source = torch.empty(context.size(1 << 31, 1 << 12), dtype=torch.int8, device=context.device)
    target = torch.empty_like(source)
    seconds = time_in_turn(
        context, {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, 1.0
    )
    context.add("copy", 2 * source.numel() / seconds["copy"] / 1e12, "TB/s")
    context.add(f"matmul {n}", 2 * n**3 / seconds["matmul"] / 1e12, "TFLOP/s")


def build(context: Context) -> None:
    """The extension in place, with CUDA if there is a compiler for it."""
    nvcc = shutil.which("nvcc") or next(Path("/usr/local").glob("cuda*/bin/nvcc"), None)
    kinds = ("cuda", "auto") if nvcc else ("auto",)
    if context.dry:
        context.note("build", f"would build {' or '.join(kinds)}")
        return
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")  # for this GPU alone: quicker
    for kind in kinds:
        status, text = command(
            context, [sys.executable, "setup.py", "build_ext", "--inplace"], context.left() * 0.8,
            SPARSE_ATTN_BUILD=kind, SPARSE_ATTN_CUDA_ARCHS=arch,
        )  # fmt: skip
        if status == 0:
            context.note("build", f"built, SPARSE_ATTN_BUILD={kind}")
            return
        context.failed(f"build {kind}", "out of time" if status is None else text)


def tests(context: Context) -> None:
    """What only a GPU can show, and of each operator's suite the comparison in bfloat16."""
    missing = [name for name in ("pytest", "hypothesis", "numpy") if find_spec(name) is None]
    if missing:
        context.note("tests", f"skipped: no {' and no '.join(missing)}")
        return
    words = [sys.executable, "-m", "pytest", "--no-header", "-rfE", "-p", "no:cacheprovider"]
    if context.dry:
        words += ["tests/ops/test_merge_attention_states.py", "-k", "triton and joins"]
    else:
        words += ["tests/test_gpu.py", "tests/ops", "-k", SUITE]
        if find_spec("xdist") is not None:
            words += ["-n", "8"]  # most of the time goes into compiling
    status, text = command(context, words, context.left())
    lines = text.strip().split("\n")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            context.failed("test", line)
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])
    counts = {kind: int(number) for number, kind in found}
    if counts and status is not None:
        others = {kind: counts.get(kind, 0) for kind in ("failed", "error", "skipped")}
        context.add("tests", counts.get("passed", 0), "passed", **others)
    if status is None:
        raise RuntimeError(f"out of time after {text.count('.')} passed")
    if status != 0:
        raise RuntimeError(lines[-1] if counts else text)


WARM = """
import json, sparse_attn
found = sparse_attn.warmup(32, 8, 128, backend={backend!r}, device={device!r})
print(json.dumps([x.seconds for x in found]))
"""


def first_call(context: Context) -> None:
    """What the first calls of a process cost: with nothing on disk, then with what was compiled."""
    for backend in context.size(context.backends("flex_prefill_attention"), ["cpp"]):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("nothing compiled", "compiled before"):
                code = WARM.format(backend=backend, device=context.device)
                status, text = command(
                    context, [sys.executable, "-c", code], context.left(),
                    TRITON_CACHE_DIR=folder, CUPY_CACHE_DIR=folder,
                )  # fmt: skip
                if status != 0:
                    context.failed(f"first call, {backend}", text)
                    break
                seconds = json.loads(text.strip().split("\n")[-1])
                context.add(f"first calls, {backend}, {state}", sum(seconds), "s")


def own_kernels() -> list[str]:
    """The names of all kernels, as the sources have them."""
    files = [*(ROOT / "csrc" / "cuda").glob("*.cuh"), *(ROOT / "triton_kernels").glob("*.py")]
    found = (re.findall(r"\b([a-z_]+_kernel)\(", file.read_text()) for file in files)
    return sorted({name for names in found for name in names})


def memcheck(context: Context) -> None:
    """The small checks, with accesses to memory watched."""
    sanitized(context, "memcheck")


def racecheck(context: Context) -> None:
    """The small checks, with races in shared memory watched."""
    sanitized(context, "racecheck")


def sanitized(context: Context, name: str) -> None:
    """The small checks under compute-sanitizer, which watches our kernels only."""
    tool = shutil.which("compute-sanitizer") or next(
        map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if tool is None:
        context.note(name, "skipped: no compute-sanitizer")
        return
    run = [tool, "--tool", name, "--error-exitcode", "9", "--launch-timeout", "0"]
    for kernel in own_kernels():
        run += ["--kernel-name", f"kernel_substring={kernel}"]  # any of them
    run += [sys.executable, "-m", "bench.gpu.check"]
    if context.dry:
        context.note(name, "would run " + " ".join(run[1:]))
        return
    # every allocation by itself, so that the end of a tensor is the end of what may be touched
    status, text = command(context, run, context.left(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if status == 0:
        context.add(name, 0, "errors")
    else:
        raise RuntimeError("out of time" if status is None else text)

"""Builds, checks and measures everything on a GPU within 8 minutes: `python bench/gpu_check.py`.

Needs a checkout, torch and Triton; nothing installed. `--only dense,decode` runs some parts,
`--dry-run` all of them at tiny sizes on the CPU. Each part is a process of its own with a time
limit: what fails, even by an illegal memory access, is reported and the next part runs. Ends in a
table; writes gpu_check.json to $OUT, or to bench/results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(ROOT))
TOTAL = 470.0  # seconds
PATIENCE = 600.0  # for a part of a dry run: the interpreter's speed is nobody's concern

# in order of worth: name -> (module.function, most seconds); together no more than TOTAL, so that
# no part takes the time of another
PARTS = {
    "build": ("machine.build", 70),
    "machine": ("machine.machine", 10),
    "check": ("check.run", 70),
    "tests": ("machine.tests", 78),
    "dense": ("attention.dense", 30),
    "sparse": ("attention.sparse", 20),
    "sale": ("sale.run", 20),
    "flex_prefill": ("flex_prefill.run", 25),
    "hip": ("hip.run", 15),
    "decode": ("attention.decode", 10),
    "squeezed": ("squeezed.run", 12),
    "operators": ("operators.run", 20),
    "memcheck": ("machine.memcheck", 35),
    "racecheck": ("machine.racecheck", 25),
    "first_call": ("machine.first_call", 20),
    "sweep": ("attention.sweep", 10),
}


def run_part(name: str, file: Path, seconds: float, dry: bool) -> None:
    """In a child process: one part."""
    from bench.gpu.context import Context

    module, function = PARTS[name][0].split(".")
    context = Context(name, file, seconds, dry)
    try:
        getattr(import_module(f"bench.gpu.{module}"), function)(context)
    except Exception as error:
        context.failed(name, error)
        raise


def in_a_process(target: Any, args: tuple[Any, ...], seconds: float) -> str:
    """Runs a function in a fork, with what is imported here; "done" or what happened."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.terminate()
        process.join(3)
        process.kill()
        process.join()
        return f"ended after {seconds:.0f} s"
    return "done" if process.exitcode == 0 else f"failed, exit status {process.exitcode}"


def describe_device() -> None:
    """In a child process, for the parent must not touch CUDA: device and versions, as JSON."""
    import torch

    p = torch.cuda.get_device_properties(0)
    print(json.dumps({"gpu": p.name, "arch": f"sm_{p.major}{p.minor}",
                      "processors": p.multi_processor_count, "memory_gib": p.total_memory >> 30,
                      "cuda": torch.version.cuda}))  # fmt: skip


def device() -> dict[str, Any] | None:
    """The GPU, its driver and the versions; None if there is no GPU."""
    code = "from bench.gpu_check import describe_device; describe_device()"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        return None
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.split()[0]  # fmt: skip
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {**json.loads(found.stdout.strip().split("\n")[-1]), "driver": driver}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "date": date.today().isoformat()}
    for package in ("torch", "triton", "cupy-cuda13x", "flash-attn", "flashinfer-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cuda_kernels() -> str:
    """How the CUDA kernels run: from the extension, by NVRTC, or not at all and why.

    The first call imports sparse_attn, once for all parts that follow: it finds only what is built.
    """
    from sparse_attn import _ext

    if _ext.cuda_extension_missing is None:
        return "extension"
    return "NVRTC" if _ext.cuda_missing is None else f"none: {_ext.cuda_missing}"


def run_all(names: list[str], dry: bool) -> dict[str, Any]:
    end = time.monotonic() + TOTAL
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.touch()
        names = sorted(names, key=lambda name: name != "build")  # before anything is imported
        for name in names:
            if name != "build":
                cuda_kernels()
            limit = PATIENCE if dry else min(PARTS[name][1], end - time.monotonic())
            print(f"== {name}", flush=True)
            start = time.monotonic()
            status = "skipped: out of time"
            if limit > 8:
                status = in_a_process(run_part, (name, file, limit - 3, dry), limit)
            parts[name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    return {"cuda_kernels": cuda_kernels(), "parts": parts, "rows": rows}


def met(row: dict[str, Any]) -> str:
    """Whether a goal such as ">= 0.9" is met."""
    if not row.get("goal"):
        return ""
    sign, number = row["goal"].split()
    good = {">=": row["value"] >= float(number), "<=": row["value"] <= float(number),
            ">": row["value"] > float(number)}[sign]  # fmt: skip
    return "yes" if good else "NO"


def table(found: dict[str, Any]) -> str:
    """Goals, failures and what took how long, short enough for a screen or two."""
    lines = [f"CUDA kernels: {found['cuda_kernels']}"]
    lines += [f"{name:<14}{p['seconds']:>7.1f} s  {p['status']}" for name, p in
              found["parts"].items()]  # fmt: skip
    lines.append("")
    for row in found["rows"]:
        if "note" in row:
            lines.append(f"{row['part']}: {row['what']}: {row['note'][-200:]}")
    lines += ["", f"{'':<62}{'value':>10}         {'goal':<9} met"]
    for row in found["rows"]:
        shown = row.get("goal") or row["part"] in ("machine", "operators", "first_call", "tests")
        if shown and "note" not in row:
            lines.append(f"{row['what']:<62}{row['value']:>10.4g} {row['unit']:<8}"
                             f"{row['goal']:<9} {met(row)}")  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    args = parser.parse_args(arguments)
    names = args.only.split(",") if args.only else list(PARTS)
    unknown = set(names) - set(PARTS)
    if unknown:
        parser.error(f"no such part {sorted(unknown)}; there are {', '.join(PARTS)}")
    os.chdir(ROOT)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    about = {"gpu": None} if args.dry_run else device()
    if about is None:
        raise SystemExit("no CUDA device: nothing to check here (--dry-run exercises the script)")
    found = {"device": about | versions(), **run_all(names, args.dry_run)}
    print(f"\n{json.dumps(found['device'])}\n{table(found)}")
    if args.dry_run and "OUT" not in os.environ:
        return  # nothing was measured
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    path = folder / "gpu_check.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()

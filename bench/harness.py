"""Times alternatives in turn in one run, each checked before it is timed."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import sparse_attn
from sparse_attn import cpu_isa
from sparse_attn.brief import dtype_name

RESULTS = Path(__file__).parent / "results"
DTYPE = cpu_isa.model_dtype()  # in which this machine would run a model: the fair baseline's
DTYPE_NAME = dtype_name(DTYPE)


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return {
        "cpu": name,
        "instruction_set": cpu_isa.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sparse_attn": sparse_attn.__version__,
        "date": date.today().isoformat(),
    }


def time_in_turn(alternatives: dict[str, Callable[[], Any]], repeats: int = 7) -> dict[str, float]:
    """Median seconds of each; one warm-up each, then rounds, so that drift hits all alike."""
    for run in alternatives.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(repeats):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def check(what: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Raises unless the relative error of a result is small: nothing wrong gets timed."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative error {error:.3g} > {tolerance}")


class Report:
    """Prints rows `name, value, goal` as they come and writes them as JSON."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, value: float, goal: str = "", **details: Any) -> None:
        self.rows.append({"what": what, "value": value, "goal": goal, **details})
        shown = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in details.items()
        )
        print(f"{what:<62} {value:>8.3g}  {goal:<10} {shown}", flush=True)

    def write(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        path.write_text(json.dumps({"hardware": hardware(), "rows": self.rows}, indent=1) + "\n")
        print(f"written: {path}")

"""From which length on a method is faster than dense attention: a small measured table.

`python -m bench crossover` measures the entries again, with the defaults of each method;
bench/gpu_check.py will measure those of a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import cpu_isa

NEVER = 2**31  # keys: no prompt has as many


class Crossover(NamedTuple):
    """The method wins from so many keys on, for at least so many queries."""

    keys: int
    queries: int


# method -> instruction set of the C++ kernels -> what bench/results/crossover.json shows there
# (crossover_amx.json, crossover_avx2.json; for avx512bf16 hip.json for both methods of HiP)
MEASURED: dict[str, dict[str, Crossover]] = {
    "flex_prefill": {
        "amx": Crossover(16384, 4096),
        "avx512bf16": Crossover(8192, 4096),
        "avx2": Crossover(8192, 1024),
    },
    "sale": {
        # dense runs on the tile unit, the selection on vector units: about as long as all of dense
        "amx": Crossover(NEVER, 1),
        "avx512bf16": Crossover(8192, 512),
        "avx2": Crossover(4096, 128),
    },
    "hip": {
        "avx512bf16": Crossover(4096, 128),
        "avx2": Crossover(4096, 128),
    },
    "infinite_hip": {
        "avx512bf16": Crossover(16384, 128),
        "avx2": Crossover(16384, 128),
    },
}
CAUTIOUS = Crossover(16384, 4096)  # where nobody has measured


def dense_is_faster(method: str, backend: str, query: torch.Tensor, n_keys: int) -> str | None:
    """Why the dense path is taken, or None."""
    if method not in MEASURED or backend == "reference":
        return None
    place = cpu_isa.BEST if backend == "cpp" else backend
    measured = MEASURED[method].get(place)
    least = measured or CAUTIOUS
    why = "" if measured else f"; a guess: {method} has not been measured on {place}"
    if least.keys >= NEVER:
        return f"{method} has no kernel on {place} that could beat dense"
    for n, enough, what in (
        (n_keys, least.keys, "keys"),
        (query.shape[2], least.queries, "queries"),
    ):
        if n < enough:
            return f"dense is faster below {enough} {what} ({n} given){why}"
    return None

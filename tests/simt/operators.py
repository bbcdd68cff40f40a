"""Runs the CUDA kernels of an operator in the executor, for tensors on the CPU.

The program of an operator (tests/simt/ops/<op>.cpp) gets the tensors of a call and of its results
by the names of the schema and the other arguments as numbers; None is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from sparse_attn.nvrtc.launch import DTYPES, aligned_rows, last_dim_contiguous
from sparse_attn.registry import NS, OPS, Op

from . import HERE, run

ROWS_OF_16_BYTES = (
    "block_sparse_attention", "flex_prefill_select", "squeezed_attend", "squeezed_lookup",
)  # fmt: skip
LIBRARY = torch.library.Library(NS, "IMPL")
_seed = 0


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind that shows where no kernel has written."""
    return torch.full_like(x, torch.nan if x.is_floating_point() else -0x55555556)


def as_bound(op: Op, x: torch.Tensor) -> torch.Tensor:
    """The tensor that a binding passes on: copied where the kernels cannot read it in place."""
    if x.dim() != 4:
        return x
    rows = op.name in ROWS_OF_16_BYTES and x.is_floating_point()
    return aligned_rows(x) if rows else last_dim_contiguous(x)


def arguments(op: Op, *args: Any) -> tuple[dict, dict, dict]:
    """What the program of an operator gets: inputs, outputs, numbers."""
    schema = op.default._schema
    values = {a.name: x for a, x in zip(schema.arguments, op.bind(*args), strict=True)}
    inputs = {k: as_bound(op, x) for k, x in values.items() if isinstance(x, torch.Tensor)}
    numbers = {k: x for k, x in values.items() if isinstance(x, (bool, int, float))}
    numbers["dtype"] = DTYPES[next(iter(inputs.values())).dtype]
    outputs = {r.name: poisoned(x) for r, x in zip(schema.returns, op.empty(*args), strict=True)}
    return inputs, outputs, numbers


def in_executor(op: Op, *args: Any) -> tuple[torch.Tensor, ...]:
    inputs, outputs, numbers = arguments(op, *args)
    run(op.name, inputs, outputs, numbers, _seed)
    return tuple(outputs.values())


PROGRAMS = [p.stem for p in (HERE / "ops").glob("*.cpp") if p.stem in OPS]
for name in PROGRAMS:
    LIBRARY.impl(f"{name}.cuda", partial(in_executor, OPS[name]), "CPU")


@contextmanager
def executor(seed: int) -> Iterator[None]:
    """Within it backend="cuda" takes CPU tensors; `seed` decides the order of the threads."""
    global _seed
    rows = [row for op in OPS.values() for row in op.impls if row.backend == "cuda"]
    before = [(row.device, row.missing) for row in rows]
    for row in rows:
        row.device, row.missing = "any", None
    _seed = seed
    try:
        yield
    finally:
        _seed = 0
        for row, (device, missing) in zip(rows, before, strict=True):
            row.device, row.missing = device, missing

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

from sparse_attn.registry import NS, OPS, Op

from . import HERE, run

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/common/params.h
LIBRARY = torch.library.Library(NS, "IMPL")
_seed = 0


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind that shows where no kernel has written."""
    return torch.full_like(x, torch.nan if x.is_floating_point() else -0x55555556)


def arguments(op: Op, *args: Any) -> tuple[dict, dict, dict]:
    """What the program of an operator gets: inputs, outputs, numbers."""
    schema = op.default._schema
    values = {a.name: x for a, x in zip(schema.arguments, op.bind(*args), strict=True)}
    # as the bindings do
    inputs = {
        name: x.contiguous() if x.dim() == 4 and x.stride(3) != 1 else x
        for name, x in values.items()
        if isinstance(x, torch.Tensor)
    }
    numbers = {k: x for k, x in values.items() if isinstance(x, (bool, int, float))}
    numbers["dtype"] = DTYPES[next(iter(inputs.values())).dtype]
    outputs = {r.name: poisoned(x) for r, x in zip(schema.returns, op._fake(*args), strict=True)}
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

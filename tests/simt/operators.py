"""Runs the CUDA kernels of an operator in the executor, for tensors on the CPU.

The program of an operator (tests/simt/ops/<op>.cpp) gets the tensors of a call and of its results
by the names of the schema and the other arguments as numbers; None is left out. A string is a
number 1 named "argument=string", a list one number "argument[i]" per element.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from sparse_attn.nvrtc.launch import DTYPES, aligned_bytes, aligned_rows, last_dim_contiguous
from sparse_attn.ops._sale import GROUPS
from sparse_attn.registry import NS, OPS, Op

from . import HERE, run

ROWS_OF_16_BYTES = (
    "block_sparse_attention", "flex_prefill_select", "hip_prune_select", "hip_select",
    "sale_quantize", "sale_threshold", "squeezed_attend", "squeezed_lookup",
)  # fmt: skip
POISON = {torch.int32: -0x55555556, torch.uint8: 0xAA}
CONTIGUOUS_VECTORS = ("sale_estimate", "sale_quantize", "sale_threshold")
LIBRARY = torch.library.Library(NS, "IMPL")
_seed = 0


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind that shows where no kernel has written."""
    return torch.full_like(x, torch.nan if x.is_floating_point() else POISON[x.dtype])


def as_bound(op: Op, x: torch.Tensor) -> torch.Tensor:
    """The tensor that a binding passes on: copied where the kernels cannot read it in place."""
    if x.dim() != 4:
        return x.contiguous() if op.name in CONTIGUOUS_VECTORS else x
    if x.dtype == torch.uint8:
        return aligned_bytes(x)
    rows = op.name in ROWS_OF_16_BYTES and x.is_floating_point()
    return aligned_rows(x) if rows else last_dim_contiguous(x)


def arguments(op: Op, *args: Any) -> tuple[dict, dict, dict]:
    """What the program of an operator gets: inputs, outputs, numbers."""
    schema = op.default._schema
    values = {a.name: x for a, x in zip(schema.arguments, op.bind(*args), strict=True)}
    inputs = {k: as_bound(op, x) for k, x in values.items() if isinstance(x, torch.Tensor)}
    numbers = {k: x for k, x in values.items() if isinstance(x, (bool, int, float))}
    if values.get("group") is not None:  # of sale_quantize: SaleGroup in csrc/common/params.h
        numbers["group"] = GROUPS.index(values["group"])
    for name, x in values.items():
        if isinstance(x, str):
            numbers[f"{name}={x}"] = 1
        elif isinstance(x, (list, tuple)):
            numbers |= {f"{name}[{i}]": n for i, n in enumerate(x)}
    numbers["dtype"] = DTYPES.get(next(iter(inputs.values())).dtype, 0)
    results = op.empty(*args)
    results = (results,) if isinstance(results, torch.Tensor) else results
    outputs = {r.name: poisoned(x) for r, x in zip(schema.returns, results, strict=True)}
    return inputs, outputs, numbers


def in_executor(op: Op, *args: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
    inputs, outputs, numbers = arguments(op, *args)
    run(op.name, inputs, outputs, numbers, _seed)
    results = tuple(outputs.values())
    return results if len(results) > 1 else results[0]


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

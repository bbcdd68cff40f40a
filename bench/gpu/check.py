"""Every operator on every GPU backend against the float64 reference, at small sizes.

`python -m bench.gpu.check` runs it by itself, as compute-sanitizer does. Inputs, references and
comparisons stay on the CPU, so that the GPU runs little beside the operators.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparse_attn.registry import Op

from .context import Context

# relative errors of a dense computation in the dtype are about a third of these
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def run(context: Context) -> None:
    for name, problem in problems(context):
        if problem is None:
            context.add(name, 1, "right")
        else:
            context.failed(name, problem)


def problems(context: Context) -> Iterator[tuple[str, BaseException | str | None]]:
    """(what was checked, what is wrong with it)."""
    from ..cases import all_of

    for what, operator, function, args in (row for of in all_of("checks") for row in of(context)):
        for backend in context.backends(operator):
            torch.manual_seed(0)
            try:
                problem = function(context, backend, *args)
            except Exception as error:
                problem = error
            yield f"{what}, {backend}", problem


def double(args: tuple[Any, ...]) -> list[Any]:
    floating = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point()  # noqa: E731
    return [x.double() if floating(x) else x for x in args]


def call(context: Context, op: Op, backend: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """An operator of tensors on the CPU; its results on the CPU, where the reference runs too."""
    device = "cpu" if backend == "reference" else context.device
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
    return [x.cpu() for x in op(*moved, backend=backend)]


def apart(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str | None:
    error = ((got.double() - want).norm() / want.norm()).item()
    return None if error <= tolerance else f"relative error {error:.3g} > {tolerance}"


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        found = list(problems(Context("check", Path(file.name), 600)))
    wrong = [f"{name}: {problem}" for name, problem in found if problem is not None]
    print(f"{len(found)} checked")
    if wrong:
        raise SystemExit("\n".join(wrong))

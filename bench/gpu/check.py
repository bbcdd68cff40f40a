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

from sparse_attn import BlockIndex
from sparse_attn.registry import Op

from .context import Context

# relative errors of a dense computation in the dtype are about a third of these
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
BF16, ALL = (torch.bfloat16,), tuple(TOLERANCE)
# (B, Hq, Hkv, Hi, Tq, Tk, D, Dv, q_block, kv_block, causal, sink, window), dtypes
SHAPES = [
    ((1, 4, 2, 4, 300, 300, 128, 128, 128, 128, True, 0, 0), ALL),
    ((2, 4, 2, 2, 200, 333, 64, 64, 64, 64, True, 7, 40), BF16),
    ((1, 8, 2, 2, 1, 4000, 128, 128, 1, 16, True, 0, 0), ALL),
    ((1, 4, 1, 1, 70, 300, 96, 40, 16, 3, False, 5, 0), BF16),
    ((1, 2, 2, 1, 130, 257, 256, 256, 128, 32, True, 0, 0), BF16),
]
DRY = [((1, 4, 1, 1, 20, 100, 32, 24, 16, 3, False, 5, 0), BF16)]


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


def shapes_of(context: Context) -> list[tuple[tuple, tuple[torch.dtype, ...]]]:
    """Sizes of attention, with the dtypes that each is for."""
    return DRY if context.dry else SHAPES


def double(args: tuple[Any, ...]) -> list[Any]:
    floating = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point()  # noqa: E731
    return [x.double() if floating(x) else x for x in args]


def call(context: Context, op: Op, backend: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """An operator of tensors on the CPU; its results on the CPU, where the reference runs too."""
    device = "cpu" if backend == "reference" else context.device
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
    return [x.cpu() for x in op(*moved, backend=backend)]


def attention_inputs(shape: tuple, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of block_sparse_attention."""
    batch, heads, key_heads, list_heads, n_queries, n_keys, dim, value_dim, *rest = shape
    q_block, kv_block, causal, sink, window = rest
    query, key, value = (
        torch.randn(batch, n, h, d, dtype=dtype).transpose(1, 2)
        for n, h, d in ((n_queries, heads, dim), (n_keys, key_heads, dim),
                        (n_keys, key_heads, value_dim))
    )  # fmt: skip
    mask = torch.rand(batch, list_heads, -(-n_queries // q_block), -(-n_keys // kv_block)) < 0.4
    index = BlockIndex.from_mask(mask, q_block, kv_block)
    return query, key, value, *index.blocks, causal, sink, window


def apart(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str | None:
    error = ((got.double() - want).norm() / want.norm()).item()
    return None if error <= tolerance else f"relative error {error:.3g} > {tolerance}"


def searched(context: Context, backend: str, op: Op, options: tuple[Any, ...]) -> str | None:
    """Whole numbers: every sum is exact, most scores tie, and the choice is one."""
    for n_queries in (context.size(200, 40), 1):
        query, key = (
            torch.randint(-2, 3, (1, heads, n, 64)).to(context.dtype)
            for heads, n in ((4, n_queries), (2, context.size(2000, 300)))
        )
        got, want = (call(context, op, name, (query, key, *options)) for name in
                     (backend, "reference"))  # fmt: skip
        if not all(torch.equal(x, y) for x, y in zip(got, want, strict=True)):
            return f"{n_queries} queries: the choice is another"
    return None


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        found = list(problems(Context("check", Path(file.name), 600)))
    wrong = [f"{name}: {problem}" for name, problem in found if problem is not None]
    print(f"{len(found)} checked")
    if wrong:
        raise SystemExit("\n".join(wrong))

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
from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.block_sparse_attention_backward import op as gradient
from sparse_attn.ops.flex_prefill_select import op as select
from sparse_attn.ops.merge_attention_states import op as merge
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


def run(context: Context) -> None:
    for name, problem in problems(context):
        if problem is None:
            context.add(name, 1, "right")
        else:
            context.failed(name, problem)


def problems(context: Context) -> Iterator[tuple[str, BaseException | str | None]]:
    """(what was checked, what is wrong with it)."""
    torch.manual_seed(0)
    some = SHAPES[3:4] if context.dry else SHAPES
    checks = [
        (f"{what} {shape} {dtype}".replace("torch.", ""), operator.name, function, (shape, dtype))
        for what, operator, function, shapes in (
            ("attention", attend, attention, some), ("backward", gradient, backward, some[:2]),
        )
        for shape, dtypes in shapes
        for dtype in dtypes
    ]  # fmt: skip
    checks += [("merge", merge.name, merged, ()), ("select", select.name, selected, ())]
    checks += [(f"pages of {n}", attend.name, paged, (n,)) for n in (16, 128)]
    for what, operator, function, args in checks:
        for backend in context.backends(operator):
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


def inputs(shape: tuple, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of block_sparse_attention."""
    batch, heads, key_heads, list_heads, n_queries, n_keys, dim, value_dim, *rest = shape
    q_block, kv_block, causal, sink, window = rest
    query, key, value = (
        torch.randn(batch, n, h, d, dtype=dtype).transpose(1, 2)
        for n, h, d in ((n_queries, heads, dim), (n_keys, key_heads, dim),
                        (n_keys, key_heads, value_dim))
    )  # fmt: skip
    mask = torch.rand(batch, list_heads, -(-n_queries // q_block), -(-n_keys // kv_block)) < 0.4
    return query, key, value, *BlockIndex.from_mask(mask, q_block, kv_block), causal, sink, window


def attention(context: Context, backend: str, shape: tuple, dtype: torch.dtype) -> str | None:
    args = inputs(shape, dtype)
    want, want_lse = attend(*double(args), backend="reference")
    out, lse = call(context, attend, backend, args)
    again, _ = call(context, attend, backend, args)
    if not torch.equal(out, again):
        return "two runs differ"
    seen = want_lse.isfinite()
    if not torch.equal(lse.isfinite(), seen):
        return "lse is infinite in the wrong rows"
    return apart(out, want, TOLERANCE[dtype]) or apart(lse[seen], want_lse[seen], 1e-4)


def paged(context: Context, backend: str, page_size: int) -> str | None:
    """Keys in shuffled pages give the bits that they give in one piece."""
    room = context.size(1024, 256)
    shape = (2, 4, 2, 2, context.size(100, 20), room, 128, 128, 32, 64, True, 7, 40)
    query, key, value, *rest = inputs(shape, torch.bfloat16)
    lengths = torch.tensor([room - 5, 33], dtype=torch.int32)
    order = torch.randperm(2 * room // page_size)
    pages = []
    for x in (key, value):
        cache = x.new_empty(len(order), page_size, 2, 128)
        cache[order] = x.transpose(1, 2).reshape(cache.shape)
        pages.append(cache.transpose(1, 2))
    table = order.int().view(2, -1)
    want = call(context, attend, backend, (query, key, value, *rest, None, None, lengths))
    got = call(context, attend, backend, (query, *pages, *rest, None, table, lengths))
    exact = attend(*double((query, key, value, *rest)), kv_lengths=lengths, backend="reference")
    if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
        return "differs from keys in one piece"
    return apart(got[0], exact[0], TOLERANCE[torch.bfloat16])


def backward(context: Context, backend: str, shape: tuple, dtype: torch.dtype) -> str | None:
    query, key, value, *rest = inputs(shape, dtype)
    out, lse = attend(query, key, value, *rest, backend="reference")
    grads = torch.randn_like(out), torch.randn_like(lse)
    args = (*grads, query, key, value, out, lse, *rest)
    want = gradient(*double(args), backend="reference")
    got, again = (call(context, gradient, backend, args) for _ in range(2))
    for name, x, y, exact in zip(("query", "key", "value"), got, again, want, strict=True):
        problem = apart(x, exact, TOLERANCE[dtype])
        if problem or not torch.equal(x, y):
            return f"grad_{name}: {problem or 'two runs differ'}"
    return None


def apart(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str | None:
    error = ((got.double() - want).norm() / want.norm()).item()
    return None if error <= tolerance else f"relative error {error:.3g} > {tolerance}"


def merged(context: Context, backend: str) -> str | None:
    out, lse = (torch.randn(2, 2, 4, 300, d) for d in (128, 1))
    lse = lse[..., 0].clone()
    lse[0, 0, 0, :5] = -torch.inf
    args = (out[0], lse[0], out[1], lse[1])
    want = merge(*double(args), backend="reference")
    got = call(context, merge, backend, args)
    return apart(got[0], want[0], 1e-6) or apart(got[1], want[1], 1e-6)


def selected(context: Context, backend: str) -> str | None:
    """Sets may differ from the reference's where scores nearly tie: at most 1 % of the blocks."""
    n = context.size(2000, 150)
    for tau in context.size((0.0, 10.0), (10.0,)):
        query = torch.randn(1, context.size(4, 2), n, 64)
        key = torch.randn(1, context.size(2, 1), n, 64)
        key[:, :, :: n // 7] *= 4
        args = (query, key, 0.8, tau, 128, None, 64)
        masks = []
        for name in (backend, "reference"):
            indices, counts, _ = call(context, select, name, args)
            index = BlockIndex(indices, counts, 64, 64)
            index.validate(n, n)
            masks.append(index.to_mask(n))
        differ = (masks[0] != masks[1]).float().mean().item()
        if differ > 0.01:
            return f"{differ:.2%} of the blocks differ at tau={tau}"
    return None


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        found = list(problems(Context("check", Path(file.name), 600)))
    wrong = [f"{name}: {problem}" for name, problem in found if problem is not None]
    print(f"{len(found)} checked")
    if wrong:
        raise SystemExit("\n".join(wrong))

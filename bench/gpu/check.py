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
from sparse_attn.ops.hip_prune_select import op as prune
from sparse_attn.ops.hip_select import op as search
from sparse_attn.ops.merge_attention_states import op as merge
from sparse_attn.ops.sale_estimate import op as estimate
from sparse_attn.ops.sale_quantize import op as quantize
from sparse_attn.ops.squeezed_attend import op as attend_to_runs
from sparse_attn.ops.squeezed_attention import op as squeezed
from sparse_attn.ops.squeezed_lookup import op as lookup
from sparse_attn.reference.squeezed_lookup import cluster_scores
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
    torch.manual_seed(0)
    some = DRY if context.dry else SHAPES
    checks = [
        (f"{what} {shape} {dtype}".replace("torch.", ""), operator.name, function, (shape, dtype))
        for what, operator, function, shapes in (
            ("attention", attend, attention, some), ("backward", gradient, backward, some[:2]),
        )
        for shape, dtypes in shapes
        for dtype in dtypes
    ]  # fmt: skip
    checks += [("merge", merge.name, merged, ()), ("select", select.name, selected, ())]
    checks += [("sale quantize", quantize.name, quantized, ())]
    checks += [("sale estimate", estimate.name, estimated, ())]
    checks += [("HiP's search", search.name, searched, (search, (64, 16, 2, 2, 1, 4, 20))),
               ("HiP's stages", prune.name, searched,
                (prune, ([64, 16, 4], [512, 128, 48], [2, 1, 1], 16, 4, 20)))]  # fmt: skip
    checks += [
        (f"squeezed attention, {n} queries", squeezed.name, squeezed_attention, (n,))
        for n in (1, context.size(40, 18))
    ]
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
    index = BlockIndex.from_mask(mask, q_block, kv_block)
    return query, key, value, *index.blocks, causal, sink, window


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


def quantized(context: Context, backend: str) -> str | None:
    """Codes and steps are the reference's bit by bit, for the mean that the kernel found."""
    for group, block, dim in (("query", 32, 128), ("key", 16, 64), ("key", 32, 96)):
        x = torch.randn(2, 2, context.size(1000, 50), dim).to(torch.bfloat16) + 3
        packed, step, mean = call(context, quantize, backend, (x, None, group, block))
        if not torch.allclose(mean, x.float().mean(2), rtol=1e-4):
            return f"{group}: wrong mean"
        want = quantize(x, mean, group, block, backend="reference")
        if not torch.equal(packed, want[0]) or not torch.equal(step, want[1]):
            return f"{group}: codes or steps differ from the reference's"
    return None


def estimated(context: Context, backend: str) -> str | None:
    """The lists are the reference's bit by bit: rounded biases small and large, bars met or not."""
    shapes = ((3000, 128, 64, 32), (700, 64, 128, 64), (500, 40, 16, 16), (400, 256, 32, 32))
    for n, dim, q_block, kv_block in context.size(shapes, ((200, 32, 64, 32),)):
        query, key = torch.randn(1, 4, n, dim) + 0.5, torch.randn(1, 2, n, dim)
        codes, steps, mean = quantize(query, None, "query", backend="reference")
        keys = quantize(key, None, "key", kv_block, backend="reference")
        wide = (key - keys[2][:, :, None]).repeat_interleave(2, 1)
        bias = (wide @ mean[..., None])[..., 0]
        for size in (1.0, 1e7):
            theta = dim**0.5 * (3.5 + 0.4 * torch.randn(1, 4, n)) * size
            args = (codes, steps, *keys[:2], bias * size, theta, q_block, kv_block)
            want = estimate(*args, backend="reference")
            got = call(context, estimate, backend, args)
            if not all(torch.equal(x, y) for x, y in zip(got, want, strict=True)):
                return f"lists differ from the reference's at {n}, {dim}, {q_block}, {kv_block}"
    return None


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


def squeezed_attention(context: Context, backend: str, n_queries: int) -> str | None:
    """A lookup of two levels makes the reference's runs; attention to them and to a tail."""
    dim, parents, each = context.size((128, 60, 8), (32, 6, 8))  # each: clusters of a parent
    dtype = torch.float32 if context.dry else torch.bfloat16
    query = torch.randn(2, 4, n_queries, dim, dtype=dtype)
    sizes = torch.randint(0, 9, (1, 2, parents * each))
    level = []
    for n_keys in (sizes, sizes.unflatten(-1, (parents, each)).sum(-1)):
        centroids = torch.randn(1, 2, n_keys.shape[-1], dim, dtype=dtype)
        log_counts = n_keys.float().log()
        below = n_keys if n_keys is sizes else torch.full_like(n_keys, each)
        bounds = torch.nn.functional.pad(below.cumsum(-1), (1, 0)).int()
        # between two scores
        threshold = cluster_scores(query, centroids, log_counts).median() * 1.001
        level += [centroids, log_counts, bounds, threshold]
    runs = [call(context, lookup, name, (query, *level)) for name in (backend, "reference")]
    if not all(torch.equal(x, y) for x, y in zip(*runs, strict=True)):
        return "other runs than the reference's"
    n = int(level[2].max())
    context_keys = [torch.randn(1, 2, n, dim, dtype=dtype) for _ in range(2)]
    tails = [torch.randn(2, 2, 60, dim, dtype=dtype) for _ in range(2)]
    states = (query, *context_keys, *tails)
    exact = attend_to_runs(*double(states), *runs[1][:3], backend="reference")[0]
    out, again = (call(context, squeezed, backend, (*states, *level))[0] for _ in range(2))
    if not torch.equal(out, again):
        return "two runs differ"
    return apart(out, exact, TOLERANCE[dtype])


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file:
        found = list(problems(Context("check", Path(file.name), 600)))
    wrong = [f"{name}: {problem}" for name, problem in found if problem is not None]
    print(f"{len(found)} checked")
    if wrong:
        raise SystemExit("\n".join(wrong))

"""Cases of hip_prune_select that only the tests need."""

from functools import partial

import torch
from hypothesis import strategies as st

from sparse_attn.ops.hip_prune_select import op
from tests.cases import DTYPES, Shape, inputs, layouts
from tests.hip import GUARDED
from tests.ops.drawn import pages_of, query_key_value


def arguments(draw):
    query, key, _ = query_key_value(draw)
    key, *pages = pages_of(draw, key)
    chunks = draw(st.sampled_from(([256, 32, 8], [64, 64], [12], [128, 64, 32, 16, 8, 4, 2, 1])))
    q_block = draw(st.integers(1, 128))
    keeps = [draw(st.integers(1, 9000)) for _ in chunks[1:]] + [draw(st.integers(1, 300))]
    strides = [draw(st.integers(1, q_block)) for _ in chunks]
    edges = [draw(st.integers(0, 3000)) for _ in range(2)]
    names = [draw(st.sampled_from(x)) for x in (("centre", "first"), ("none", "group", "all"))]
    scale = draw(st.sampled_from((None, 0.0)))
    return query, key, chunks, keeps, strides, q_block, *edges, *names, False, scale, *pages


def direct_call():
    return *inputs(Shape(Tq=64, Tk=64), torch.float16)[:2], [8], [32], [1]


def guarded():
    for shape in GUARDED:
        for dtype in DTYPES:
            for layout, (query, key) in layouts(*inputs(shape, dtype)[:2]).items():
                name = f"{dtype}, {layout}, {shape}"
                run = partial(
                    op, chunks=[32, 8], keeps=[96, 24], q_strides=[2, 1], q_block=16, sink=5,
                    window=9, backend="cpp",
                )  # fmt: skip
                yield f"hip_prune_select, {name}", run, [query, key]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.hip_prune_select import hip_prune_select as run

    run(new(8, n_queries), new(2, n_keys), [256, 32, 8], [32768, 8192, 2048], [4, 4, 1])

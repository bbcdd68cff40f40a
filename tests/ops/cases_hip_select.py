"""Cases of hip_select that only the tests need."""

from functools import partial

import torch
from hypothesis import strategies as st

from sparse_attn.ops.hip_select import op
from tests.cases import DTYPES, Shape, inputs, layouts
from tests.hip import GUARDED
from tests.ops.drawn import pages_of, query_key_value


def arguments(draw):
    query, key, _ = query_key_value(draw)
    key, *pages = pages_of(draw, key)
    q_block, kv_block = draw(st.integers(1, 128)), draw(st.integers(1, 128))
    options = [
        draw(st.integers(1, 600)), q_block, kv_block, draw(st.integers(1, q_block)),
        draw(st.integers(1, kv_block)), draw(st.integers(0, 300)), draw(st.integers(0, 3000)),
        draw(st.sampled_from(("centre", "first"))), draw(st.sampled_from((2, 4))),
    ]  # fmt: skip
    options += [draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from((None, -0.3)))]
    return query, key, *options, *pages


def direct_call():
    return inputs(Shape(Tq=64, Tk=64), torch.float16)[:2]


def guarded():
    for shape in GUARDED:
        for dtype in DTYPES:
            for layout, (query, key) in layouts(*inputs(shape, dtype)[:2]).items():
                name = f"{dtype}, {layout}, {shape}"
                for share in (False, True):
                    run = partial(
                        op, budget=21, q_block=16, kv_block=3, sink=5, window=9,
                        share_kv_heads=share, backend="cpp",
                    )  # fmt: skip
                    yield f"hip_select, {name}, {share=}", run, [query, key]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.hip_select import hip_select as run

    run(new(8, n_queries), new(2, n_keys))

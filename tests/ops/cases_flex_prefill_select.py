"""Cases of flex_prefill_select that only the tests need."""

from functools import partial

import torch
from hypothesis import strategies as st

from sparse_attn.ops.flex_prefill_attention import op as attention
from sparse_attn.ops.flex_prefill_select import op
from tests.cases import DTYPES, Shape, inputs, layouts
from tests.ops.drawn import query_key_value

FLEX = [
    (Shape(Tq=300, Tk=300, D=64, Dv=64, Hq=4, Hkv=2), 128),
    (Shape(Tq=140, Tk=2100, D=32, Dv=32, Hq=1), 128),
    (Shape(Tq=65, Tk=400, D=80, Dv=40), 37),
    (Shape(Tq=50, Tk=21, D=33, Dv=7, B=2), 16),
    (Shape(Tq=1, Tk=131, D=96, Dv=96, Hq=3, Hkv=1), 64),
]


def arguments(draw):
    query, key, _ = query_key_value(draw)
    gamma, tau = draw(st.sampled_from((0.3, 0.95, 1.0, 2.0))), draw(st.sampled_from((0.0, 0.1)))
    low, high = draw(st.integers(0, 10**4)), draw(st.sampled_from((None, 1, 5000)))
    block, scale = draw(st.integers(1, 128)), draw(st.sampled_from((None, 0.3)))
    return query, key, gamma, tau, low, high, block, "exact", True, scale


def direct_call():
    return inputs(Shape(Tq=64, Tk=64), torch.float16)[:2]


def guarded():
    for shape, block in FLEX:
        for dtype in DTYPES:
            for layout, (query, key, value) in layouts(*inputs(shape, dtype, spread=3.0)).items():
                for tau in (0.0, 1.0):  # vertical and slash; query-aware
                    options = {"gamma": 0.7, "tau": tau, "min_budget": block, "block_size": block}
                    name = f"{dtype}, {layout}, {shape}, {options}"
                    run = partial(op, **options, backend="cpp")
                    yield f"flex_prefill_select, {name}", run, [query, key]
                    if layout == "gaps" and tau == 0:  # both operators in it have their own cases
                        run = partial(attention, **options, backend="cpp")
                        yield f"flex_prefill_attention, {name}", run, [query, key, value]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.flex_prefill_select import flex_prefill_select as run

    run(new(8, n_queries), new(2, n_keys))


COMPILED = {
    "probe_profile_kernel": 2,  # two passes
    "choose_kernel": 2,  # chunks of 128 and of 1024 blocks
    "list_kernel": 2,
}

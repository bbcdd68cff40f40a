"""Cases of squeezed_attend that only the tests need."""

from functools import partial

import torch
from hypothesis import strategies as st

from sparse_attn.ops.squeezed_attend import op
from tests.cases import DTYPES, Shape, inputs, layouts
from tests.ops.drawn import models_layout, query_key_value
from tests.squeezed_cases import attend_inputs

GUARDED = [
    (Shape(B=2, Tq=1, Tk=301, Hq=4, Hkv=2, D=72, Dv=40), 4, 33),
    (Shape(Tq=70, Tk=97, Hq=4, Hkv=2, D=33, Dv=17), 2, 81),
    (Shape(Tq=9, Tk=5000, D=64, Dv=64), 2, 9),
]


def arguments(draw):
    query, key, value = query_key_value(draw)
    batch, hkv, room = query.shape[0], key.shape[1], draw(st.integers(0, 3000))
    tails = [models_layout(query.dtype, batch, hkv, room, x.shape[3]) for x in (key, value)]
    if draw(st.booleans()):
        key, value = key[:1], value[:1]
    heads, runs = draw(st.sampled_from((hkv, query.shape[1]))), draw(st.integers(1, 500))
    starts, sums = (
        torch.zeros(heads, batch, runs, dtype=torch.int32).transpose(0, 1) for _ in "ab"
    )
    counts = torch.zeros(heads, batch, dtype=torch.int32).t()
    lengths = draw(st.sampled_from((None, torch.zeros(batch, dtype=torch.int32))))
    scale = draw(st.sampled_from((None, 0.3)))
    return query, key, value, *tails, starts, sums, counts, lengths, scale


def direct_call():
    query, key, value = inputs(Shape(Tq=64, Tk=64), torch.float16)
    runs = torch.tensor([[[3], [8]]], dtype=torch.int32)  # 3 or 8 tokens, from token 3 or 8 on
    counts = torch.ones(1, 2, dtype=torch.int32)
    return query, key, value, key, value, runs, runs, counts, counts[:, 0] + 63


def guarded():
    for dtype in DTYPES:
        for shape, heads, tail in GUARDED:
            args = attend_inputs(shape, heads, tail, dtype=dtype)
            lengths = torch.full((shape.B,), tail - 2, dtype=torch.int32)
            run = partial(op, backend="cpp")
            for layout, first in layouts(*args[:5]).items():
                name = f"squeezed_attend, {dtype}, {layout}, {shape}"
                yield name, run, [*first, *args[5:8], lengths]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.squeezed_attend import squeezed_attend as run

    key, value = new(2, n_keys), new(2, n_keys)
    starts = new.empty(8, n_keys // 40, dtype=torch.int32)
    lengths = new.empty(dtype=torch.int32)
    counts = new.empty(8, dtype=torch.int32)
    run(new(8, n_queries), key, value, key, value, starts, starts, counts, lengths)

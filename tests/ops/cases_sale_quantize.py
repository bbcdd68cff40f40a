"""Cases of sale_quantize that only the tests need."""

from functools import partial

import torch
from hypothesis import strategies as st

from sparse_attn.ops.sale_quantize import op
from tests.cases import DTYPES, Shape, inputs, layouts
from tests.ops.cases_sale_select import GUARDED
from tests.ops.drawn import query_key_value


def arguments(draw):
    _, x, _ = query_key_value(draw)
    mean = torch.empty(*x.shape[:2], x.shape[3]) if draw(st.booleans()) else None
    return (
        x,
        mean,
        draw(st.sampled_from(("query", "key"))),
        draw(st.sampled_from((16, 64))),
    )


def direct_call():
    query = inputs(Shape(Tq=64), torch.float16)[0]
    return query, query[:, :, 0].float()


def guarded():
    for shape, q_block, kv_block in GUARDED:
        grid = {"q_block": q_block, "kv_block": kv_block, "local": 16, "sink": 16}
        for dtype in DTYPES:
            for layout, (_, key, _) in layouts(*inputs(shape, dtype, spread=3.0)).items():
                for group in ("query", "key"):
                    run = partial(op, group=group, block=kv_block, backend="cpp")
                    name = f"{group}, {dtype}, {layout}, {shape}, {grid}"
                    yield f"sale_quantize, {name}", run, [key]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.sale_quantize import sale_quantize as run

    run(new(8, n_queries))
    run(new(2, n_keys), None, "key")


COMPILED = {"sale_code_kernel": 2}  # queries and keys

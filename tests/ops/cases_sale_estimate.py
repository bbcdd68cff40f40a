"""Cases of sale_estimate that only the tests need."""

from functools import partial

import torch
from hypothesis import strategies as st

from sparse_attn.ops._sale import n_groups
from sparse_attn.ops.sale_estimate import op
from sparse_attn.ops.sale_quantize import op as quantize
from tests.cases import Shape, inputs
from tests.ops.cases_sale_select import GUARDED
from tests.ops.drawn import query_key_value


def arguments(draw):
    query, key, _ = query_key_value(draw)
    q_block, kv_block = (
        draw(st.sampled_from((16, 32, 64, 128))),
        draw(st.sampled_from((16, 32, 64))),
    )
    edges = draw(st.integers(1, 10**5)), draw(st.integers(0, 10**5))
    sizes = [(x.shape[1], n_groups(x.shape[2], kind, kv_block)) for x, kind in
             ((query, "query"), (key, "key"))]  # fmt: skip
    sizes += [(query.shape[1], x.shape[2]) for x in (key, query)]
    query_step, key_step, *rows = (torch.empty(len(query), *size) for size in sizes)
    query, key = (x[..., ::2].to(torch.uint8) for x in (query, key))
    return query, query_step, key, key_step, *rows, q_block, kv_block, *edges


def direct_call():
    return case(64, 64)


def case(Tq=150, Tk=150, D=64, Hq=2, Hkv=1, B=1, kv_block=32, spread=3.4, offset=0.5):
    """Codes of random tensors and bars that about half of the blocks exceed."""
    query, key = inputs(Shape(B=B, Hq=Hq, Hkv=Hkv, Tq=Tq, Tk=Tk, D=D))[:2]
    query = query + offset * torch.randn(D)
    packed, step, mean = quantize(query, None, "query", backend="reference")
    k_packed, k_step, k_mean = quantize(key, None, "key", kv_block, backend="reference")
    of_query = (key - k_mean[:, :, None]).repeat_interleave(Hq // Hkv, 1)
    bias = (of_query @ mean[..., None])[..., 0]
    size = (D * (1 + offset**2)) ** 0.5
    theta = size * (spread + 0.4 * torch.randn(B, Hq, Tq))
    return packed, step, k_packed, k_step, bias, theta


def guarded():
    for shape, q_block, kv_block in GUARDED:
        grid = {"q_block": q_block, "kv_block": kv_block, "local": 16, "sink": 16}
        query, key, _ = inputs(shape, torch.bfloat16, spread=3.0)
        packed, step, _ = quantize(query, None, "query")
        keys = quantize(key, None, "key", kv_block)[:2]
        bias = torch.randn(shape.B, shape.Hq, shape.Tk)
        theta = torch.randn(shape.B, shape.Hq, shape.Tq) + 5
        run = partial(op, **grid, backend="cpp")
        yield f"sale_estimate, {shape}, {grid}", run, [packed, step, *keys, bias, theta]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.sale_estimate import sale_estimate as run
    from sparse_attn.triton_kernels.sale_quantize import sale_quantize as quantize

    codes = *quantize(new(8, n_queries))[:2], *quantize(new(2, n_keys), None, "key")[:2]
    run(*codes, new.empty(8, n_keys), new.empty(8, n_queries))

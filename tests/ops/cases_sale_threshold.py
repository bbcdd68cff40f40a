"""Cases of sale_threshold that only the tests need."""

import torch
from hypothesis import strategies as st

from tests.cases import Shape, inputs
from tests.ops.drawn import query_key_value


def arguments(draw):
    query, key, _ = query_key_value(draw)
    q_block, kv_block = (
        draw(st.sampled_from((16, 32, 64, 128))),
        draw(st.sampled_from((16, 32, 64))),
    )
    edges = draw(st.integers(1, 10**5)), draw(st.integers(0, 10**5))
    mean = torch.empty(*key.shape[:2], key.shape[3])
    scale = draw(st.sampled_from((None, 0.3)))
    return query, key, mean, torch.empty(query.shape[1]), q_block, kv_block, *edges, True, scale


def direct_call():
    query, key, _ = inputs(Shape(Tq=64, Tk=64), torch.float16)
    return query, key, key[:, :, 0].float(), torch.ones(2)


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.sale_threshold import sale_threshold as run

    query, key = new(8, n_queries), new(2, n_keys)
    run(query, key, new.empty(2, 128), new.empty(8, batch=None), 64, 32)

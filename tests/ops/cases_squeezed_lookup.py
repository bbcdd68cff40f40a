"""Cases of squeezed_lookup that only the tests need."""

from functools import partial

import torch
from hypothesis import strategies as st

from sparse_attn.ops.squeezed_lookup import op
from tests.cases import DTYPES, layouts
from tests.ops.drawn import models_layout, query_key_value
from tests.squeezed_cases import Case, lookup_inputs

GUARDED = [
    Case(Tq=1, K=77, K1=5, D=72),
    Case(B=2, C=2, Tq=9, K=33, D=33, shared=True),
    Case(B=2, Tq=1, Hq=9, Hkv=1, K=1030, D=64),
    Case(Tq=70, K=31, K1=3, D=1),
]


def level_arguments(draw, query, hkv, batch):
    """A level of clusters without its threshold's value, of one context or one per sequence."""
    clusters, batch = draw(st.integers(1, 9000)), draw(st.sampled_from((1, batch)))
    return (
        models_layout(query.dtype, batch, hkv, clusters, query.shape[3]),
        torch.empty(hkv, batch, clusters).transpose(0, 1),
        torch.empty(batch, hkv, clusters + 1, dtype=torch.int32), torch.empty(()),
    )  # fmt: skip


def arguments(draw):
    query, key, _ = query_key_value(draw)
    fine = level_arguments(draw, query, key.shape[1], query.shape[0])
    coarse = level_arguments(draw, query, key.shape[1], fine[0].shape[0])
    coarse = coarse if draw(st.booleans()) else (None,) * 4
    return query, *fine, *coarse, draw(st.booleans()), draw(st.sampled_from((None, -0.3)))


def direct_call():
    return tuple(lookup_inputs(Case(K1=4), torch.float16))


def guarded():
    for dtype in DTYPES:
        for case in GUARDED:
            args = lookup_inputs(case, dtype)
            given = [x for x in args if isinstance(x, torch.Tensor)]
            run = partial(op, shared=case.shared, backend="cpp")
            for layout, first in layouts(*given[:2]).items():
                yield f"squeezed_lookup, {dtype}, {layout}, {case}", run, [*first, *given[2:]]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.squeezed_lookup import squeezed_lookup as run

    def level(clusters):
        ends = new.empty(2, clusters + 1, batch=1, dtype=torch.int32)
        centroids = new.empty(2, clusters, 128, batch=1, dtype=torch.float16)
        return centroids, new.empty(2, clusters, batch=1), ends, new.empty(batch=None)

    run(new(8, n_queries), *level(n_keys // 20), *level(n_keys // 99))


COMPILED = {
    "cluster_scores_kernel": 4,  # two passes over each of two levels
    "test_clusters_kernel": 3,  # the coarse level in chunks of 128 and of 1024, the fine one
}

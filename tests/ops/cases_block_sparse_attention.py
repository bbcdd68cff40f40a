"""Cases of block_sparse_attention that only the tests need."""

from functools import partial

import torch
from hypothesis import strategies as st

from sparse_attn.ops.block_sparse_attention import op
from tests.cases import DTYPES, GARBAGE, Shape, index, inputs, layouts
from tests.ops.drawn import models_layout, query_key_value

ATTENTION = [
    # prefill: odd lengths, blocks of every kind, head_dim with and without a rest
    Shape(Tq=70, Tk=70, D=64, Dv=64),
    Shape(Tq=129, Tk=129, D=80, Dv=96, Hq=4, Hkv=2, Hi=4, q_block=64, kv_block=32, share=1.0),
    Shape(Tq=65, Tk=65, D=96, Dv=80, q_block=17, kv_block=5, B=2),
    Shape(Tq=257, Tk=257, D=128, Dv=128, Hi=1, q_block=128, kv_block=128, share=1.0),
    Shape(Tq=330, Tk=331, D=72, Dv=33, q_block=5, kv_block=3),
    Shape(Tq=40, Tk=40, D=33, Dv=1, q_block=128, kv_block=128, share=1.0),
    Shape(Tq=7, Tk=31, D=1, Dv=5, q_block=1, kv_block=1),
    # chunked prefill, and more queries than keys
    Shape(Tq=50, Tk=333, D=128, Dv=64, Hq=6, Hkv=2, Hi=2, q_block=16, kv_block=64),
    Shape(Tq=20, Tk=8300, D=64, Dv=40, q_block=64, kv_block=128, share=1.0),
    Shape(Tq=50, Tk=31, D=40, Dv=24, Hi=1, q_block=16, kv_block=17),
    # decode
    Shape(Tq=1, Tk=8191, D=80, Dv=128, Hq=4, Hkv=1, Hi=1, q_block=1, kv_block=16, share=1.0),
    Shape(Tq=1, Tk=33, D=96, Dv=96, Hq=2, Hkv=2, q_block=1, kv_block=64, share=1.0),
    Shape(Tq=3, Tk=501, D=128, Dv=80, Hq=2, Hkv=2, q_block=2, kv_block=7),
    Shape(Tq=3, Tk=3, D=20, Dv=13, q_block=128, kv_block=1, share=1.0),
]  # fmt: skip
MASKS = [(True, 0, 0), (True, 5, 19), (False, 3, 9)]  # causal, sink, window
CACHES = [  # page_size, the capacity is Tk
    (16, Shape(B=2, Tq=1, Tk=512, D=128, Dv=128, Hq=4, Hkv=1, Hi=1, q_block=1, share=1.0)),
    (16, Shape(B=2, Tq=70, Tk=256, D=64, Dv=72, q_block=32, kv_block=32)),
    (64, Shape(B=3, Tq=40, Tk=256, D=40, Dv=64, Hq=4, Hkv=2, Hi=4, q_block=17, kv_block=5)),
    (128, Shape(B=2, Tq=130, Tk=384, D=96, Dv=33, share=1.0)),
    (0, Shape(B=3, Tq=33, Tk=200, D=64, Dv=64, q_block=16, kv_block=16)),
]


def spare(x, lengths):
    """x with NaN where a sequence has no key."""
    beyond = torch.arange(x.shape[2]) >= lengths[:, None]
    return x.masked_fill(beyond[:, None, :, None], torch.nan)


def paged(key, value, lengths, page_size, tokens_first=True):
    """The same keys and values in shuffled pages: (key, value, block_table).

    Pages that no sequence uses hold NaN, places of the table beyond a length hold no page.
    """
    batch, heads, capacity = key.shape[:3]
    per_sequence = capacity // page_size
    pages = torch.randperm(batch * per_sequence + 3)[: batch * per_sequence]
    table = pages.reshape(batch, per_sequence).to(torch.int32)
    caches = []
    for x in (key, value):
        shape = (batch * per_sequence + 3, heads, page_size, x.shape[3])
        if tokens_first:  # [pages, page_size, heads, D] seen as [pages, heads, page_size, D]
            cache = x.new_full([shape[i] for i in (0, 2, 1, 3)], torch.nan).transpose(1, 2)
        else:
            cache = x.new_full(shape, torch.nan)
        parts = spare(x, lengths).unflatten(2, (per_sequence, page_size)).transpose(1, 2)
        cache[table.long()] = parts
        caches.append(cache)
    unused = torch.arange(per_sequence) * page_size >= lengths[:, None]
    garbage = GARBAGE[torch.arange(batch * per_sequence) % 3].view(batch, per_sequence)
    wide = torch.full((batch, per_sequence + 2), -7, dtype=torch.int32)
    wide[:, :per_sequence] = torch.where(unused, garbage, table)
    return *caches, wide[:, :per_sequence]


def arguments(draw):
    query, key, value = query_key_value(draw)
    q_block, kv_block = draw(st.integers(1, 128)), draw(st.integers(1, 128))
    heads = draw(st.sampled_from((1, key.shape[1], query.shape[1])))
    rows, most = -(-query.shape[2] // q_block), draw(st.integers(1, 500))
    indices = torch.zeros(query.shape[0], heads, rows, most, dtype=torch.int32)
    edges = [draw(st.sampled_from((0, 1, 100, 10**6))) for _ in range(2)]
    scale = draw(st.sampled_from((None, 0.3)))
    counts = torch.zeros(indices.shape[:3], dtype=torch.int32)
    lengths, table = torch.zeros(query.shape[0], dtype=torch.int32), None
    if draw(st.booleans()):
        size = draw(st.sampled_from((16, 32, 64, 128)))
        key, value = (models_layout(x.dtype, 9, x.shape[1], size, x.shape[3]) for x in (key, value))
        table = torch.zeros(query.shape[0], draw(st.integers(1, 900)), dtype=torch.int32)
    cache = table, draw(st.sampled_from((None, lengths)))
    options = q_block, kv_block, draw(st.booleans()), *edges, scale
    return query, key, value, indices, counts, *options, *cache


def direct_call():
    shape = Shape(Tq=64, Tk=64)
    cache = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return *inputs(shape, torch.float16), *index(shape), True, 0, 0, None, *cache


def guarded():
    yield from contiguous_keys()
    yield from cached_keys()


def contiguous_keys():
    for shape in ATTENTION:
        listed = index(shape)
        for dtype in DTYPES:
            for layout, tensors in layouts(*inputs(shape, dtype)).items():
                for causal, sink, window in MASKS[: None if layout == "gaps" else 1]:
                    run = partial(
                        op, q_block=shape.q_block, kv_block=shape.kv_block, causal=causal,
                        sink=sink, window=window, backend="cpp",
                    )  # fmt: skip
                    name = f"block_sparse_attention, {dtype}, {layout}, {shape}, {causal=}, {sink=}"
                    yield name, run, [*tensors, listed.indices, listed.counts]


def cached_keys():
    """The pages in use lie between pages of NaN, and places of no page lead outside."""
    for page_size, shape in CACHES:
        listed = index(shape)
        lengths = torch.tensor([shape.Tk - 7, 33, 0][: shape.B], dtype=torch.int32)
        for dtype in DTYPES:
            query, key, value = inputs(shape, dtype)
            tensors = [spare(key, lengths), spare(value, lengths)]
            if page_size:
                *tensors, table = paged(key, value, lengths, page_size)
                tensors.append(table)
            for causal, sink, window in MASKS:

                def run(query, key, value, *rest, causal=causal, sink=sink, window=window,
                        shape=shape):  # fmt: skip
                    *table, lengths, indices, counts = rest
                    return op(
                        query, key, value, indices, counts, shape.q_block, shape.kv_block, causal,
                        sink, window, None, *table or [None], lengths, backend="cpp",
                    )  # fmt: skip

                name = f"block_sparse_attention in pages of {page_size}, {dtype}, {shape}, {sink=}"
                yield name, run, [query, *tensors, lengths, listed.indices, listed.counts]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.block_sparse_attention import block_sparse_attention as run

    rows = -(-n_queries // 128)
    lists = new.empty(8, rows, -(-n_keys // 128), dtype=torch.int32)
    counts = new.empty(8, rows, dtype=torch.int32)
    run(new(8, n_queries), new(2, n_keys), new(2, n_keys), lists, counts, 128, 128)


COMPILED = {"block_sparse_attention_kernel": 2}  # split over the keys or not

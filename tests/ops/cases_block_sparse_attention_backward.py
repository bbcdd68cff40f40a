"""Cases of block_sparse_attention_backward that only the tests need."""

from dataclasses import replace
from functools import partial

import torch

from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.block_sparse_attention_backward import op
from tests.cases import DTYPES, index, inputs, padded
from tests.ops.cases_block_sparse_attention import ATTENTION, MASKS


def guarded():
    for shape in ATTENTION:
        shape = replace(shape, Tk=min(shape.Tk, 700))  # only the forward splits longer ones
        listed = index(shape)
        for dtype, (causal, sink, window) in zip(DTYPES, MASKS, strict=True):
            options = {
                "q_block": shape.q_block, "kv_block": shape.kv_block, "causal": causal,
                "sink": sink, "window": window, "backend": "cpp",
            }  # fmt: skip
            tensors = inputs(shape, dtype)
            if causal and sink:
                tensors = [padded(x) for x in tensors]
            out, lse = attend(*tensors, *listed[:2], **options)
            grads = [torch.randn_like(out), torch.randn_like(lse)]
            name = f"block_sparse_attention_backward, {dtype}, {shape}, {causal=}, {sink=}"
            run = partial(op, **options)
            yield name, run, [*grads, *tensors, out, lse, listed.indices, listed.counts]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.block_sparse_attention_backward import (
        block_sparse_attention_backward as run,
    )

    from sparse_attn.block_index import BlockIndex

    query, lse = new(8, n_queries), new.empty(8, n_queries)
    rows = -(-n_queries // 128)
    lists = new.empty(8, rows, -(-n_keys // 128), dtype=torch.int32)
    counts = new.empty(8, rows, dtype=torch.int32)
    # a torch without CUDA makes tensors there but cannot sort them
    offsets = new.empty(8, lists.shape[3] + 1, dtype=torch.int32)
    BlockIndex.transpose = lambda index, n_keys: (offsets, lists.flatten(2))
    run(query, lse, query, new(2, n_keys), new(2, n_keys), query, lse, lists, counts, 128, 128)

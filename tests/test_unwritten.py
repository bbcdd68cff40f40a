"""Every element of a result is written: what `torch.empty` hands out is poisoned."""

from contextlib import contextmanager

import pytest
import torch

from sparse_attn.ops import (
    block_sparse_attention,
    flex_prefill_select,
    hip_prune_select,
    hip_select,
    merge_attention_states,
)
from tests import hip
from tests.cases import DTYPES, RUNS, Shape, call, index, inputs

NEVER = torch.iinfo(torch.int32).max  # what poisons an int32
SHAPES = [
    Shape(B=2, Hq=4, Hkv=2, Tq=70, Tk=70, D=40, Dv=24, Hi=4, q_block=16, kv_block=16, share=0.3),
    Shape(Tq=90, Tk=33, q_block=32, kv_block=32, share=0.6),  # rows before the first key
    Shape(Tq=1, Tk=300, q_block=1, kv_block=64, share=0.4),
    Shape(Tq=33, Tk=129, D=33, Dv=17, q_block=128, kv_block=128, share=0.0),
]


@contextmanager
def poisoned():
    """torch fills empty tensors with NaN, integers with their largest value."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9).isnan().all() and (torch.empty(9, dtype=torch.int32) == NEVER).all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.Tq}x{s.Tk}")
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_nothing_is_left_unwritten(run, shape):
    for dtype in DTYPES if run[0] == "cpp" else DTYPES[::2]:
        query, key, value = inputs(shape, dtype)
        listed = index(shape)
        options = {"block_size": shape.kv_block, "min_budget": 16, "gamma": 0.6}
        with poisoned():
            out, lse = call(block_sparse_attention.op, run, query, key, value, *listed, sink=1)
            twice = call(merge_attention_states.op, run, out, lse, out, lse)
            indices, counts, pattern = call(flex_prefill_select.op, run, query, key, **options)
        for x in (out, *twice):
            assert not x.isnan().any()
        assert not lse.isnan().any() and (lse < torch.inf).all()
        assert ((pattern == 0) | (pattern == 1)).all()
        assert ((counts >= 0) & (counts <= indices.shape[-1])).all()
        places = torch.arange(indices.shape[-1]) < counts[..., None]
        assert (indices[places] < indices.shape[-1]).all()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.Tq}x{s.Tk}")
@pytest.mark.parametrize("op", [hip_select.op, hip_prune_select.op], ids=lambda op: op.name)
def test_no_place_of_an_index_is_left_unwritten(op, shape):
    """The places behind a list, too: they are 0."""
    options = {"q_block": shape.q_block, "window": 5, "sink": 3}
    if op is hip_select.op:
        options |= {"budget": 40, "kv_block": min(shape.kv_block, 8)}
    else:
        options |= {"chunks": [16, 4], "keeps": [64, 20], "q_strides": [1, 1]}
    for run in hip.runs_of(op):
        for dtype in DTYPES if run[0] == "cpp" else DTYPES[2:]:
            query, key, _ = inputs(shape, dtype)
            with poisoned():
                indices, counts = call(op, run, query, key, **options)
            hip.check_index(indices, counts, shape.Tk)

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn.block_index import BlockIndex
from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.block_sparse_attention_backward import op
from tests.cases import (
    DTYPES,
    FLOOR,
    RUNS,
    TRITON,
    Shape,
    assert_as_accurate,
    call,
    index,
    inputs,
    instruction_set,
)
from tests.ops.test_block_sparse_attention import dense_in_dtype

NAMES = ("query", "key", "value")


def arguments(run, shape, dtype, listed, causal=True, sink=0, window=0, scale=None, lse=True):
    """Gradients of out and lse, then what the forward was given and returned."""
    query, key, value = inputs(shape, dtype)
    args = (*listed, causal, sink, window, scale)
    out, got_lse = call(attend, run, query, key, value, *args)
    grad_out = torch.randn(shape.B, shape.Tq, shape.Hq, shape.Dv).to(dtype).transpose(1, 2)
    grad_lse = torch.randn(shape.B, shape.Tq, shape.Hq).transpose(1, 2) if lse else None
    return (grad_out, grad_lse, query, key, value, out, got_lse, *args)


def double(args):
    """The same call, exact: out and lse are computed again."""
    grad_out, grad_lse, *tensors = (x if x is None else x.double() for x in args[:5])
    out, lse = attend(*tensors, *args[7:], backend="reference")
    return (grad_out, grad_lse, *tensors, out, lse, *args[7:])


def dense_gradients(grad_out, grad_lse, query, key, value, out, lse, indices, counts, q_block,
                    kv_block, *options):  # fmt: skip
    """PyTorch's own gradients of attention as written, in the inputs' dtype."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    results = dense_in_dtype(*leaves, BlockIndex(indices, counts, q_block, kv_block), *options)
    seen = lse.isfinite()  # a row without keys has no gradient, where autograd finds NaN
    total = (results[0].float() * grad_out.float())[seen].sum()
    if grad_lse is not None:
        total = total + (results[1] * grad_lse)[seen].sum()
    if total.requires_grad:
        total.backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def check(run, shape, dtype, listed=None, **options):
    listed = index(shape) if listed is None else listed
    args = arguments(run, shape, dtype, listed, **options)
    exact = op(*double(args), backend="reference")
    dense = dense_gradients(*args)
    got = call(op, run, *args)
    # P is exp(scores - lse): it inherits the rounding of lse and scores, two halves of 2^-23
    seen = args[6][args[6].isfinite()]
    floor = FLOOR[dtype] + 2**-23 * (seen.abs().max().item() if len(seen) else 0)
    for name, g, e, d, x in zip(NAMES, got, exact, dense, args[2:5], strict=True):
        assert g.shape == x.shape and g.dtype == dtype and g.isfinite().all(), name
        # rows without keys: NaN in autograd's gradients, which are then no measure
        assert_as_accurate(g, e, d if d.isfinite().all() else e.to(dtype), floor)
    assert (got[0][args[6] == -torch.inf] == 0).all()


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(Tq=130, Tk=200, Hq=4, Hkv=2, Hi=4, q_block=64, kv_block=64),
        Shape(Tq=150, Tk=150, Hi=1, q_block=128, kv_block=128, D=128, Dv=128, B=2, share=1.0),
        Shape(Tq=1, Tk=500, Hq=8, Hkv=2, Hi=2, q_block=1, kv_block=16, share=0.3),
        Shape(Tq=33, Tk=90, Hq=2, Hkv=1, Hi=2, q_block=17, kv_block=1, share=0.1, D=32, Dv=32),
        Shape(Tq=50, Tk=31, D=40, Dv=24, Hi=1, q_block=16, kv_block=17),
        Shape(Tq=5, Tk=1, D=8, Dv=8, share=1.0),
        Shape(Tq=70, Tk=100, D=96, Dv=192, Hq=6, Hkv=2, Hi=2, q_block=33, kv_block=20),
    ],
    ids=str,
)
def test_parity(run, dtype, shape):
    check(run, shape, dtype)
    check(run, shape, dtype, causal=False, scale=0.3, lse=False)
    check(run, shape, dtype, sink=7, window=19, scale=-0.1)

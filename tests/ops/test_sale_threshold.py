"""theta against float64, row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.ops.sale_threshold import op
from tests.cases import (
    CUDA,
    DTYPES,
    RUNS,
    TRITON,
    Shape,
    assert_as_accurate,
    call,
    cuda_why_not,
    inputs,
    opcheck,
)
from tests.ops.test_sale_estimate import regions

RUNS = [*RUNS, CUDA[-1]]


def theta_in(dtype, query, key, mean, threshold, q_block, kv_block, local, sink, scale):
    """By the words of the documentation, in `dtype`: [B, Hq, Tq], times the scale."""
    Tq, Tk = query.shape[2], key.shape[2]
    wide = lambda x: x.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)  # noqa: E731
    region = torch.zeros(Tq, Tk, dtype=torch.bool)
    for m, (low, begin, seen) in enumerate(regions(Tq, Tk, q_block, kv_block, local, sink)):
        rows = slice(m * q_block, (m + 1) * q_block)
        region[rows, : low * kv_block] = True
        region[rows, begin * kv_block : seen * kv_block] = True
    region &= torch.arange(Tk) <= Tk - Tq + torch.arange(Tq)[:, None]
    scores = query.to(dtype) @ wide(key).mT * scale
    lse = scores.masked_fill(~region, -torch.inf).logsumexp(-1)
    constant = (query.to(dtype) * wide(mean)[:, :, None]).sum(-1) * scale
    return lse + threshold.to(dtype).log()[:, None] - constant


@pytest.mark.parametrize("run", RUNS[:-1], ids=str)
@settings(max_examples=12)
@given(data=st.data())
def test_equals_float64(run, data):
    any_case(run, data, 120 if run == TRITON else 500)


@settings(max_examples=2)
@given(data=st.data())
@pytest.mark.skipif(cuda_why_not() is not None, reason="no way to run CUDA kernels")
def test_cuda_equals_float64(data):  # the executor is slow
    any_case(CUDA[-1], data, 40)


def any_case(run, data, longest):
    pick = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    dtype = pick(*(DTYPES[1:] if run[0] == "cuda" else DTYPES))
    Tk = data.draw(st.integers(1, longest))
    shape = Shape(
        B=pick(1, 2), Hq=4, Hkv=2, Tq=data.draw(st.integers(1, Tk)), Tk=Tk, D=pick(8, 64, 128)
    )
    query, key, _ = inputs(shape, dtype, spread=pick(0.3, 2.0))
    key = (key + pick(0.0, 3.0) * torch.randn(shape.D)).to(dtype)
    mean, threshold = key.float().mean(2), torch.tensor([0.004, 0.1, 1.0, 2e-5])
    grid = (pick(16, 64, 128), pick(16, 32, 64), pick(1, 64, 100, 128), pick(0, 32, 40))
    scale = pick(None, 0.3)
    args = (query, key, mean, threshold, *grid)
    (theta,) = call(op, run, *args, True, scale)
    factor = shape.D**-0.5 if scale is None else scale
    exact, dense = (theta_in(d, *args, factor) for d in (torch.float64, torch.float32))
    assert theta.dtype == torch.float32
    # kernels for 16-bit inputs exponentiate to a relative 2.6e-6
    floor = 1e-6 if dtype == torch.float32 or run[0] == "reference" else 1e-5
    assert_as_accurate(theta.double() * factor, exact, dense, floor)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_dense_heads_and_rows_without_keys(run):
    dtype = torch.bfloat16 if run[0] == "cuda" else torch.float32
    query, key, _ = inputs(Shape(Tq=90, Tk=40, Hq=3, Hkv=1), dtype)
    threshold = torch.tensor([9e-6, 0.0, 0.5])
    (theta,) = call(op, run, query, key, key.float().mean(2), threshold)
    assert (theta[:, :2] == -torch.inf).all()
    assert (theta[:, 2, :50] == -torch.inf).all() and theta[:, 2, 50:].isfinite().all()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_mean_only_shifts_a_row(run):
    """theta - q . k' + ... is the same importance whatever constant is taken from the keys."""
    dtype = torch.bfloat16 if run[0] == "cuda" else torch.float32
    query, key, _ = inputs(Shape(Tq=70, Tk=70), dtype)
    threshold, mean = torch.full((2,), 0.004), torch.randn(1, 1, 64)
    (a,), (b,) = (call(op, run, query, key, m, threshold) for m in (mean, torch.zeros_like(mean)))
    shift = (query.float() * mean[:, :, None]).sum(-1)
    torch.testing.assert_close(b - a, shift, rtol=1e-4, atol=1e-4)


def test_under_autocast_it_computes_in_float32():
    query, key, _ = inputs(Shape(Tq=70, Tk=70), torch.bfloat16)
    args = (query, key, key.float().mean(2), torch.full((2,), 0.004))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = op(*args)
    assert torch.equal(inside, op(*args))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key_mean": torch.zeros(1, 2, 64)}, r"key_mean: shape is \(1, 2, 64\), expected"),
        ({"threshold": torch.zeros(1)}, "threshold: number of heads is 1, expected 2"),
        ({"threshold": torch.zeros(2).double()}, "threshold: expected dtype float32"),
        ({"scale": -1.0}, "scale: got -1.0, expected 0 or more; negate the query"),
        ({"causal": False}, "causal: SALE is defined for causal prefill"),
        ({"q_block": 0}, "q_block: got 0, expected one of"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    query, key, _ = inputs(Shape())
    args = (query, key, torch.zeros(1, 1, 64), torch.ones(2))
    args = dict(zip(("query", "key", "key_mean", "threshold"), args, strict=True))
    with pytest.raises((ValueError, TypeError), match=message):
        op(**{**args, **change})


@pytest.mark.parametrize("overload", ["default", "cpp", "reference", "triton"])
def test_opcheck(overload):
    query, key, _ = inputs(Shape(Tq=50, Tk=70))
    args = (query, key, key.mean(2), torch.full((2,), 0.01), 32, 16, 20, 5)
    opcheck(getattr(torch.ops.sparse_attn.sale_threshold, overload), args)

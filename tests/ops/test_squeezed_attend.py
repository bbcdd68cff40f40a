"""Attention over runs and a tail against dense attention under the same mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.ops.squeezed_attend import op
from sparse_attn.reference.squeezed_attend import token_mask
from tests.cases import CUDA, DTYPES, FLOOR, Shape, assert_as_accurate, call, opcheck
from tests.squeezed_cases import attend_inputs, dtype_for, in_float64, runs_for

RUNS = runs_for(op)
REFERENCE = RUNS[0]


def assert_accurate(run, args):
    """As accurate as dense attention in the same dtype under the same mask."""
    dtype = args[0].dtype
    exact, exact_lse = call(op, REFERENCE, *in_float64(args))
    dense, dense_lse = call(op, REFERENCE, *args)
    out, lse = call(op, run, *args)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    assert_as_accurate(out, exact, dense_in(dtype, args, dense), FLOOR[dtype])
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and (out[empty] == 0).all()
    seen = ~empty
    if seen.any():
        assert_as_accurate(lse[seen], exact_lse[seen], dense_lse[seen], 2e-6)
    return out, lse


def assert_same(run, got, want):
    """The same call in other shapes: the same bits in C++, elsewhere but for the order of sums."""
    if run[0] == "cpp":
        assert torch.equal(got, want)
    else:
        tolerance = 1e-5 + 2 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def dense_in(dtype, args, dense):
    """PyTorch's dense attention in the dtype itself, with the mask of the call."""
    if dtype == torch.float32:
        return dense
    query, key, value, tail_key, tail_value, starts, sums, counts, lengths, scale = args
    batch, heads, n_queries = query.shape[:3]
    far = token_mask(starts, sums, counts, key.shape[2])
    far = far.repeat_interleave(heads // far.shape[1], 1)[:, :, None].expand(-1, -1, n_queries, -1)
    n_tail = tail_key.shape[2]
    lengths = torch.full((batch,), n_tail) if lengths is None else lengths
    position = lengths[:, None] - n_queries + torch.arange(n_queries)
    near = (torch.arange(n_tail) <= position[..., None])[:, None].expand(-1, heads, -1, -1)
    mask = torch.cat([far, near], -1)
    keys, values = (
        torch.cat([x.expand(batch, -1, -1, -1), y], 2).repeat_interleave(heads // x.shape[1], 1)
        for x, y in ((key, tail_key), (value, tail_value))
    )
    out = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, mask, scale=scale
    )  # fmt: skip
    return out.nan_to_num(0)


SHAPES = [  # shape, H', tail, C
    (Shape(Tq=1, Tk=500, Hq=4, Hkv=2, D=64, Dv=64), 4, 37, 1),
    (Shape(B=2, Tq=1, Tk=500, Hq=8, Hkv=1, D=128, Dv=128), 1, 5, 1),
    (Shape(B=2, Tq=1, Tk=70, Hq=4, Hkv=4, D=96, Dv=40), 4, 130, 2),
    (Shape(B=2, Tq=33, Tk=300, Hq=4, Hkv=2, D=64, Dv=64), 4, 60, 1),
    (Shape(Tq=150, Tk=333, Hq=6, Hkv=2, D=40, Dv=72), 2, 150, 1),
    (Shape(Tq=7, Tk=40, Hq=2, Hkv=1, D=64, Dv=64), 2, 7, 1),
    (Shape(Tq=5, Tk=40, Hq=2, Hkv=1, D=64, Dv=64), 2, 3, 1),  # queries before the tail
    (Shape(Tq=2, Tk=33, Hq=2, Hkv=2, D=64, Dv=64), 2, 0, 1),  # no tail at all
]


@pytest.mark.parametrize("shape, Hi, tail, C", SHAPES, ids=str)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_parity(run, shape, Hi, tail, C):
    for dtype in DTYPES if run[0] == "cpp" else [dtype_for(run)]:
        for share in (0.4, 1.0):
            args = attend_inputs(shape, Hi, tail, share, C, dtype)
            assert_accurate(run, args)


@pytest.mark.parametrize("shape, Hi, tail, C", SHAPES[:4], ids=str)
@pytest.mark.parametrize("run", CUDA[:-1], ids=str)
def test_the_order_of_threads_does_not_show(run, shape, Hi, tail, C):
    args = attend_inputs(shape, Hi, tail, 0.6, C, torch.float16)
    want = call(op, CUDA[-1], *args)
    assert all(torch.equal(x, y) for x, y in zip(call(op, run, *args), want, strict=True))


@settings(max_examples=10)
@given(
    data=st.data(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    Tq=st.one_of(st.just(1), st.integers(1, 140)),
    Tk=st.integers(1, 300),
    tail=st.integers(0, 150),
)
@pytest.mark.parametrize("run", RUNS[1:] or RUNS, ids=str)
def test_shapes(run, data, heads, Tq, Tk, tail):
    batch = data.draw(st.integers(1, 2))
    shape = Shape(B=batch, Hq=heads[0], Hkv=heads[1], Tq=Tq, Tk=Tk, D=64, Dv=32)
    args = attend_inputs(
        shape, data.draw(st.sampled_from(heads)), tail, data.draw(st.sampled_from([0.0, 0.3, 0.9])),
        data.draw(st.sampled_from([1, batch])), dtype_for(run),
    )  # fmt: skip
    if data.draw(st.booleans()):
        args[8] = torch.randint(0, tail + 1, (batch,), dtype=torch.int32)
    assert_accurate(run, args)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 70])
def test_everything_kept_is_dense_attention(run, Tq):
    shape = Shape(B=2, Tq=Tq, Tk=260, Hq=4, Hkv=2)
    args = attend_inputs(shape, 4, Tq + 20, 1.0, dtype=dtype_for(run))
    out, _ = assert_accurate(run, args)
    query, key, value, tail_key, tail_value = (x.float() for x in args[:5])
    keys = torch.cat([key.expand(2, -1, -1, -1), tail_key], 2)
    values = torch.cat([value.expand(2, -1, -1, -1), tail_value], 2)
    mask = torch.ones(Tq, 280 + Tq).tril(280).bool()
    want = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, mask, enable_gqa=True
    )
    assert_as_accurate(out, want, want.to(out.dtype), 5e-6 if out.dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 6])
def test_heads_that_keep_nothing_and_everything(run, Tq):
    """Very unequal heads: the empty one has its tail alone."""
    shape = Shape(Tq=Tq, Tk=9000, Hq=4, Hkv=4, D=64, Dv=64)
    args = attend_inputs(shape, 4, Tq + 3, 0.2, dtype=dtype_for(run), mean=30)
    for x, head in zip(args[5:8], (0, 0, 0), strict=True):
        x[0, head] = 0
    args[5][0, 3, 0], args[6][0, 3, 0], args[7][0, 3] = 0, 9000, 1
    out, _ = assert_accurate(run, args)
    alone = [x[:, :1] for x in args[:8]]
    alone[1:3] = [x[:, :, :1] for x in alone[1:3]]
    assert_same(run, call(op, run, *alone)[0][0, 0], out[0, 0])


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 4])
def test_nothing_at_all(run, Tq):
    args = attend_inputs(Shape(Tq=Tq, Tk=50), 2, 0, 0.0, dtype=dtype_for(run))
    out, lse = call(op, run, *args)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 20])
def test_extreme_scores(run, Tq):
    args = attend_inputs(Shape(Tq=Tq, Tk=90), 2, 30, dtype=dtype_for(run))
    args[0] = args[0] * 100
    args[1], args[3] = args[1] * 50, args[3] * 50
    out, lse = assert_accurate(run, args)
    assert lse.abs().max() > 5e3 and out.isfinite().all()


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 20])
def test_tail_that_is_not_there_is_not_read(run, Tq):
    """A buffer longer than its tail, other lengths per sequence: the same as cut tails."""
    args = attend_inputs(Shape(B=2, Tq=Tq, Tk=90), 2, 64, dtype=dtype_for(run))
    args[8] = torch.tensor([25, 61], dtype=torch.int32)
    for x in args[3:5]:
        x[0, :, 25:], x[1, :, 61:] = torch.nan, torch.inf
    out, lse = call(op, run, *args)
    assert out.isfinite().all()
    for b, n in enumerate((25, 61)):
        cut = [args[0][b : b + 1], *args[1:3], *(x[b : b + 1, :, :n] for x in args[3:5])]
        cut += [x[b : b + 1] for x in args[5:8]]
        alone, alone_lse = call(op, run, *cut)
        assert_same(run, alone[0], out[b])
        assert_same(run, alone_lse[0], lse[b])


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_batches_strides_and_repeats(run):
    args = attend_inputs(
        Shape(B=3, Tq=5, Tk=120, Hq=4, Hkv=2), 4, 30, dtype=dtype_for(run)
    )  # fmt: skip
    out, lse = call(op, run, *args)
    again = call(op, run, *args)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    wide = [x.contiguous() for x in args[:5]]
    wide[1:3] = [x.repeat(3, 1, 1, 1) for x in wide[1:3]]
    assert_same(run, call(op, run, *wide, *args[5:])[0], out)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_a_bit(threads):
    args = attend_inputs(Shape(Tq=1, Tk=20000, Hq=4, Hkv=2), 4, 300, dtype=torch.bfloat16, mean=20)
    before = torch.get_num_threads()
    want = op(*args)
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(want, op(*args), strict=True))
    finally:
        torch.set_num_threads(before)


# ---- the operator ------------------------------------------------------------------------------

BAD = [
    (0, lambda x: x[0], "query: expected 4 dimensions"),
    (0, lambda x: x[:, :3], "query: 3 heads"),
    (1, lambda x: x.double(), "key: dtype"),
    (1, lambda x: x.repeat(3, 1, 1, 1), "key: batch size is 3, expected 2 as in query, or 1"),
    (1, lambda x: x[:, :, :0], "key: dimension Tk is empty"),
    (2, lambda x: x[:, :, 1:], "value: length"),
    (3, lambda x: x[:1], "tail_key: batch size"),
    (3, lambda x: x[:, :1], "tail_key: number of heads"),
    (4, lambda x: x[:, :, 1:], "tail_value: length"),
    (4, lambda x: x[..., 1:], "tail_value: head_dim"),
    (5, lambda x: x[:, :3], "starts: 3 heads"),
    (5, lambda x: x.long(), "starts: expected dtype"),
    (6, lambda x: x[..., 1:], "sums: shape"),
    (7, lambda x: x[:, 1:], "counts: shape"),
    (8, lambda x: torch.zeros(2), "tail_lengths: expected dtype"),
    (8, lambda x: torch.zeros(3, dtype=torch.int32), "tail_lengths: batch size"),
    (9, lambda x: float("nan"), "scale: got nan"),
]


@pytest.mark.parametrize("backend", sorted({run[0] for run in RUNS}))
@pytest.mark.parametrize("at, change, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input(backend, at, change, message):
    args = attend_inputs(Shape(B=2, Hq=4, Hkv=2), 4, 9)
    args[at] = change(args[at])
    with pytest.raises((ValueError, TypeError), match=message):
        op(*args, backend=backend)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        op.default(*args)


@pytest.mark.parametrize("backend", sorted({run[0] for run in RUNS} & {"cpp", "reference"}))
@pytest.mark.parametrize(
    "at, value, message",
    [
        (7, -1, "counts"),
        (7, 1000, "counts"),
        (5, 60, "starts"),
        (5, -1, "starts"),
        (6, 71, "starts"),
    ],
)
def test_illegal_runs_are_refused_on_the_cpu(backend, at, value, message):
    args = attend_inputs(Shape(), 2, 9, share=0.5)
    args[7].clamp_(min=1)
    args[5][0, 1, 0], args[6][0, 1, 0], args[7][0, 1] = 50, 20, 1
    op(*args, backend=backend)
    args[at].view(-1)[(args[at].numel() // 2)] = value
    with pytest.raises(RuntimeError, match=message):
        op(*args, backend=backend)


@pytest.mark.parametrize("overload", ["default", *sorted({run[0] for run in RUNS})])
def test_opcheck(overload):
    args = attend_inputs(Shape(B=2, Tq=3), 2, 9, dtype=torch.bfloat16)
    args[8:] = [torch.tensor([5, 9], dtype=torch.int32), 0.2]
    opcheck(getattr(torch.ops.sparse_attn.squeezed_attend, overload), args)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_argument_reaches_the_kernel(run):
    args = attend_inputs(Shape(Tq=3), 2, 12, dtype=dtype_for(run))
    base = call(op, run, *args)[0]
    for at, value in ((8, torch.tensor([7], dtype=torch.int32)), (9, 0.7)):
        changed = [value if i == at else x for i, x in enumerate(args)]
        out, _ = assert_accurate(run, changed)
        assert (out - base).abs().max() > 0.01
    for at in range(5):
        changed = [x * 0.5 if i == at else x for i, x in enumerate(args)]
        assert (assert_accurate(run, changed)[0] - base).abs().max() > 0.01


def test_compiles_whole_and_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, dynamic=True, backend="eager")
    for tail in (9, 12):
        args = attend_inputs(Shape(B=2, Tq=3), 2, tail)
        assert torch.equal(compiled(*args)[0], op(*args)[0])


def test_no_silent_loss_of_gradient():
    args = attend_inputs(Shape(Tq=3), 2, 9)
    args[0] = args[0].detach().requires_grad_()
    with pytest.raises(NotImplementedError, match="squeezed_attend has no backward"):
        op(*args)[0].sum().backward()

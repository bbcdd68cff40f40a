import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.block_index import BlockIndex
from sparse_attn.nvrtc import block_sparse_attention as nvrtc
from sparse_attn.nvrtc.launch import DeviceLimits
from sparse_attn.ops.block_sparse_attention import op
from tests.cases import (
    CUDA,
    DTYPES,
    FLOOR,
    RUNS,
    TRITON,
    Lists,
    Shape,
    assert_as_accurate,
    call,
    index,
    inputs,
    opcheck,
)


def check(run, shape, dtype, causal=True, sink=0, window=0, scale=None, spread=1.0, listed=None):
    """A backend against the float64 reference, with the error of the plain dense computation."""
    query, key, value = inputs(shape, dtype, spread)
    listed = index(shape) if listed is None else listed
    args = (*listed, causal, sink, window, scale)
    exact, exact_lse = op.default(query.double(), key.double(), value.double(), *args)
    dense, dense_lse = dense_in_dtype(query, key, value, listed, causal, sink, window, scale)
    out, lse = call(op, run, query, key, value, *args)
    assert out.shape == exact.shape and out.dtype == dtype and lse.dtype == torch.float32
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen) and (lse[~seen] == -torch.inf).all()
    assert (out[~seen] == 0).all()
    assert_as_accurate(out, exact, dense, FLOOR[dtype])
    if seen.any():
        # kernels for 16-bit inputs exponentiate to a relative 2.6e-6, which shows in lse alone
        floor = 5e-7 if dtype == torch.float32 else 1e-5
        assert_as_accurate(lse[seen], exact_lse[seen], dense_lse[seen], floor)


def dense_in_dtype(query, key, value, listed, causal, sink, window, scale):
    """Softmax attention as written, every step rounded to the inputs' dtype, scores in float32."""
    from sparse_attn.reference.block_sparse_attention import token_mask

    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    mask = token_mask(
        listed.indices, listed.counts, slice(0, query.shape[2]),
        (heads, key.shape[1], query.shape[2], key.shape[2]),
        listed.q_block, listed.kv_block, causal, sink, window,
    )  # fmt: skip
    scale = query.shape[3] ** -0.5 if scale is None else scale
    keys, values = (x.repeat_interleave(groups, 1).float() for x in (key, value))
    scores = (query.float() @ keys.mT * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(~mask.any(-1), 0)[..., None]).exp()
    return (weights.to(query.dtype).float() @ values).to(query.dtype), lse


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(Tq=200, Tk=333, Hq=4, Hkv=2, Hi=4, q_block=64, kv_block=64),
        Shape(Tq=300, Tk=300, Hi=1, q_block=128, kv_block=128, D=128, Dv=128, B=2),
        Shape(Tq=1, Tk=4500, Hq=8, Hkv=2, Hi=2, q_block=1, kv_block=16, share=0.3),
        Shape(Tq=1, Tk=700, Hq=7, Hkv=1, Hi=1, q_block=1, kv_block=32, D=80, Dv=200, share=0.6),
        Shape(Tq=33, Tk=6000, Hq=2, Hkv=1, Hi=2, q_block=17, kv_block=1, share=0.05),
        Shape(Tq=50, Tk=31, D=40, Dv=24, Hi=1, q_block=16, kv_block=17),
        Shape(Tq=5, Tk=1, D=8, Dv=8, share=1.0),
        Shape(Tq=130, Tk=257, D=96, Dv=192, Hq=6, Hkv=2, Hi=2, q_block=5, kv_block=3),
        Shape(Tq=65, Tk=65, D=256, Dv=256, kv_block=32),
        Shape(Tq=40, Tk=40, D=33, Dv=1, kv_block=128, q_block=128),
    ],
    ids=str,
)
def test_parity(run, dtype, shape):
    check(run, shape, dtype)
    check(run, shape, dtype, causal=False, scale=0.3)
    check(run, shape, dtype, sink=7, window=19, scale=-0.1)


CUDA_SHAPES = {  # (padded head_dim, rows of a tile): a shape that leads to it
    (64, 16): Shape(Tq=1, Tk=700, Hq=8, Hkv=2, Hi=2, q_block=1, kv_block=16),  # split over keys
    (64, 64): Shape(Tq=45, Tk=100, Hq=6, Hkv=2, Hi=1, q_block=17, kv_block=3),
    (64, 128): Shape(Tq=200, Tk=333, Hq=3, Hkv=1, Hi=1, D=40, Dv=24),
    (96, 16): Shape(Tq=3, Tk=600, Hq=4, Hkv=1, Hi=1, D=96, Dv=80, q_block=4, kv_block=128),
    (96, 64): Shape(Tq=40, Tk=157, Hq=6, Hkv=2, Hi=2, D=80, Dv=96, q_block=20, kv_block=1),
    (96, 128): Shape(Tq=150, Tk=140, Hi=1, D=96, Dv=96, q_block=128, kv_block=32),
    (128, 16): Shape(Tq=9, Tk=900, Hi=2, D=128, Dv=128, q_block=16, kv_block=64),  # split
    (128, 64): Shape(Tq=100, Tk=50, Hi=2, D=128, Dv=16, q_block=48, kv_block=17),
    (128, 128): Shape(Tq=128, Tk=700, Hq=1, Hi=1, D=128, Dv=128, q_block=128, kv_block=128),
    (256, 16): Shape(Tq=5, Tk=300, Hq=6, Hkv=2, Hi=6, D=136, Dv=256, q_block=5, kv_block=32),
    (256, 64): Shape(Tq=100, Tk=90, Hi=1, D=256, Dv=192, q_block=80, kv_block=5),
}


@pytest.mark.parametrize("run", CUDA, ids=str)
@pytest.mark.parametrize("tile", CUDA_SHAPES, ids=str)
def test_every_kernel_of_cuda(tile, run):
    shape = CUDA_SHAPES[tile]
    dtype = (torch.bfloat16, torch.float16)[run[1] % 2]
    check(run, shape, dtype)
    check(run, shape, dtype, sink=7, window=19, scale=-0.1)
    check(run, shape, dtype, causal=False, sink=70, window=150, scale=0.3)


def test_the_shapes_lead_to_every_kernel_of_cuda():
    plans = {}
    for tile, shape in CUDA_SHAPES.items():
        args = (*inputs(shape, torch.float16), *index(shape), True, 0, 0, None)
        p = nvrtc.params(*op.bind(*args), *op.empty(*args))
        plans[tile] = nvrtc.plan(p, DeviceLimits(4, 163 * 1024))  # as in tests/simt/ops/common.h
    assert all((plan.dim, plan.rows) == tile for tile, plan in plans.items())
    assert {plan.rows for plan in plans.values() if plan.splits > 1} >= {16, 128}


@pytest.mark.parametrize("run", CUDA, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_any_shape_on_cuda(run, data):
    any_shape(run, data, 140, DTYPES[1:])


@pytest.mark.parametrize("run", RUNS, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_any_shape(run, data):
    any_shape(run, data, 70 if run == TRITON else 140, DTYPES)  # the interpreter is slow


def any_shape(run, data, longest, dtypes):
    pick = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    length = lambda: data.draw(st.integers(1, longest))  # noqa: E731
    kv_heads, group = pick(1, 2), pick(1, 2, 3)
    shape = Shape(
        B=pick(1, 2), Hkv=kv_heads, Hq=kv_heads * group, Hi=pick(1, kv_heads, kv_heads * group),
        Tq=length(), Tk=length(), D=pick(8, 32, 64, 72), Dv=pick(8, 32, 64, 80),
        q_block=data.draw(st.integers(1, 128)), kv_block=data.draw(st.integers(1, 128)),
        share=pick(0.0, 0.2, 1.0),
    )  # fmt: skip
    check(
        run, shape, pick(*dtypes), causal=pick(True, False), sink=pick(0, 1, 40, 500),
        window=pick(0, 1, 33, 500), scale=pick(None, 0.0, 1.0),
    )  # fmt: skip


@pytest.mark.parametrize("run", [*RUNS, *CUDA], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_block_and_dense(run, dtype):
    shape = Shape(Tq=140, Tk=150, Hi=1)
    empty = Lists(torch.empty(1, 1, 3, 0, dtype=torch.int32),
                       torch.zeros(1, 1, 3, dtype=torch.int32), 64, 64)  # fmt: skip
    check(run, shape, dtype, listed=empty)
    check(run, shape, dtype, listed=empty, sink=150)
    check(run, shape, dtype, listed=empty, causal=False, window=9)


@pytest.mark.parametrize("run", [*RUNS, *CUDA], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(run, dtype):
    """Logits of about +-1e4: no overflow, no NaN, the largest key wins."""
    query, key, value = inputs(Shape(Tq=64, Tk=300, Hi=1), dtype)
    query, key = query.sign() * 12, key.sign() * 12
    listed = BlockIndex.full(64, 300, 64, 64).blocks
    args = (query, key, value, *listed, True, 0, 0, 1.0)
    exact, exact_lse = op(*(x.double() for x in args[:3]), *args[3:])
    out, lse = call(op, run, *args)
    assert exact_lse.abs().max() > 3000
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("run", [*RUNS, CUDA[0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 40])
def test_nan_and_infinity_show(run, dtype, queries):
    """A row that sees a score of NaN or +infinity is NaN, as in dense attention, never 0."""
    query, key, value = inputs(Shape(Tq=queries, Tk=70, Hi=1), dtype)
    listed = BlockIndex.full(queries, 70, 64, 64).blocks
    for changed, entry, row in (
        ("query", (0, 0, -1), (0, 0, -1)),
        ("key", (0, 0, 0), (0, slice(None), slice(None))),
    ):
        for bad in (torch.nan, torch.inf):
            q, k = query.clone(), key.clone()
            x, other = (q, k) if changed == "query" else (k, q)
            x[entry] = bad
            other[:] = 1  # so that infinities do not cancel
            out, lse = call(op, run, q, k, value, *listed)
            assert out[row].isnan().all() and not lse[row].isfinite().any()


@pytest.mark.parametrize("run", [*RUNS, *CUDA], ids=str)
def test_strides_and_determinism(run):
    shape = Shape(B=2, Tq=90, Tk=128, Hq=4, Hkv=2, Hi=4, q_block=32, kv_block=32)
    query, key, value = inputs(shape, torch.bfloat16)
    listed = index(shape)
    wide = torch.randn(2, 2, 128, 2, 64, dtype=torch.bfloat16)
    wide[..., 0, :], wide[..., 1, :] = key, value
    last = query.transpose(2, 3).contiguous().transpose(2, 3)
    one = call(op, run, query, key, value, *listed)
    for q, k, v in (
        (query.contiguous(), key.contiguous(), value.contiguous()),
        (last, wide[..., 0, :], wide[..., 1, :]),
    ):
        two = call(op, run, q, k, v, *listed)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    shared = [x[:1].expand(2, -1, -1, -1) for x in (query, key, value)]
    first = Lists(listed.indices[:1], listed.counts[:1], 32, 32)
    both = Lists(*(x[:1].expand(2, *x.shape[1:]) for x in listed[:2]), 32, 32)
    out = call(op, run, *shared, *both)[0]
    assert torch.equal(out[0], out[1])
    alone = call(op, run, *(x[:1] for x in shared), *first)[0]
    assert torch.equal(out[:1], alone)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_result(threads):
    shape = Shape(Tq=1, Tk=9000, Hq=4, Hi=1, q_block=1, kv_block=64)
    args = (*inputs(shape, torch.bfloat16), *index(shape))
    before = torch.get_num_threads()
    one = op(*args)[0]
    try:
        torch.set_num_threads(threads)
        assert torch.equal(one, op(*args)[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
def test_rows_see_only_their_keys(backend):
    """Keys above the diagonal may hold anything finite: they never reach a row."""
    query, key, value = inputs(Shape(Tq=64, Tk=64), torch.bfloat16)
    listed = Lists(*BlockIndex.full(64, 64, 64, 64).blocks)
    before = call(op, backend, query, key, value, *listed)[0][:, :, :40]
    key, value = key.clone(), value.clone()
    key[:, :, 40:], value[:, :, 40:] = 1e4, -1e4
    assert torch.equal(before, call(op, backend, query, key, value, *listed)[0][:, :, :40])


@pytest.mark.parametrize(
    "run, heads", [*((TRITON, heads) for heads in (1, 2, 4)), (CUDA[-1], 2)], ids=str
)
@pytest.mark.parametrize("q_block, kv_block", [(1, 4), (16, 16), (64, 128), (128, 64), (128, 128)])
def test_sink_and_window_beside_long_lists(run, q_block, kv_block, heads):
    """Sink, window and lists that overlap, over long enough lists for every loop of the kernel."""
    length = {1: 3, 16: 40}.get(q_block, 150)  # few tiles: the interpreter is slow
    shape = Shape(Tq=length, Tk=430, Hq=4, Hkv=2, Hi=heads, q_block=q_block, kv_block=kv_block)
    listed = index(replace(shape, share=0.7))
    for sink, window in ((0, 0), (200, 0), (0, 233), (130, 150), (300, 300)):
        check(run, shape, torch.float16, sink=sink, window=window, listed=listed)


@pytest.mark.parametrize("run", [TRITON, *CUDA], ids=str)
def test_a_list_out_of_order_stays_inside_the_keys(run):
    """Undefined values, but no read outside: interpreter and executor would tell."""
    shape = Shape(Tq=130, Tk=200, Hi=1, q_block=64, kv_block=64)
    lists = ([3, -9, 2**31 - 1, 0], [9, 1, 8, 0])
    for wrong, counts in itertools.product(lists, (4, 2**30, -5)):
        ids = torch.tensor(wrong, dtype=torch.int32).expand(1, 1, 3, 4).contiguous()
        listed = Lists(ids, torch.full((1, 1, 3), counts, dtype=torch.int32), 64, 64)
        out, _ = call(op, run, *inputs(shape, torch.bfloat16), *listed, sink=3)
        assert out.isfinite().all()


def legal():
    shape = Shape(Tq=100, Tk=100, Hq=4, Hkv=2, Hi=4)
    names = ("query", "key", "value", "indices", "counts", "q_block", "kv_block")
    return dict(zip(names, (*inputs(shape), *index(shape)), strict=True))


BAD = [
    ("query", lambda x: x[0], "query: expected 4 dimensions"),
    ("query", lambda x: x.int(), "query: expected dtype"),
    ("query", lambda x: x[:, :3], "query: 3 heads"),
    ("query", lambda x: x[:, :, :0], "query: dimension Tq is empty"),
    ("query", lambda x: x.to("meta"), "key: device"),
    ("query", lambda x: 1.0, "query: expected a tensor"),
    ("key", lambda x: x.half(), "key: dtype"),
    ("key", lambda x: x[..., :8], "key: head_dim"),
    ("key", lambda x: x[:, :, :50], "value: length"),
    ("key", lambda x: x[:, :, :0], "key: dimension Tk is empty"),
    (
        "key",
        lambda x: x[:, :, :1].expand(-1, -1, 2**31 + 128, -1),
        "key: 100 queries and 2147483776",
    ),
    ("value", lambda x: x[:, :1], "value: number of heads"),
    ("value", lambda x: x.expand(2, -1, -1, -1), "value: batch size"),
    ("indices", lambda x: x.long(), "indices: expected dtype"),
    ("indices", lambda x: x[:, :3], "indices: 3 heads"),
    ("indices", lambda x: x[:, :, :1], "indices: 1 query blocks"),
    ("indices", lambda x: x + 2, "indices: row"),
    ("indices", lambda x: x * 0, "indices: row"),
    ("indices", lambda x: x - 5, "indices: row"),
    ("counts", lambda x: x[:, :, :1], "counts: shape"),
    ("counts", lambda x: x - 9, "counts: .*negative"),
    ("counts", lambda x: x + 9, "counts: .*larger than the capacity"),
    ("q_block", lambda x: 0, "q_block: got 0"),
    ("kv_block", lambda x: 129, "kv_block: got 129"),
    ("sink", lambda x: -1, "sink: got -1"),
    ("window", lambda x: -1, "window: got -1"),
    ("scale", lambda x: float("nan"), "scale: got nan"),
    ("scale", lambda x: float("inf"), "scale: got inf"),
    ("scale", lambda x: 1e300, "scale: got 1e\\+300"),
]


# what is listed can be checked only where it lies in the memory of the host
CONTENTS = ("indices: row", "counts: .*")


@pytest.mark.parametrize("backend", ["cpp", "reference", "triton", "cuda"])
@pytest.mark.parametrize("name, change, message", BAD, ids=[f"{n}-{m}" for n, _, m in BAD])
def test_bad_input(backend, name, change, message):
    if backend in ("triton", "cuda") and message.startswith(CONTENTS):
        pytest.skip("a GPU kernel does not check the contents of an index")
    arguments = legal()
    arguments["counts"] = arguments["counts"].fill_(2)
    arguments["indices"] = torch.tensor([0, 1], dtype=torch.int32).expand(1, 4, 2, 2).clone()
    arguments[name] = change(arguments.get(name))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op(**arguments, backend=backend)
    query = arguments["query"]
    if isinstance(query, torch.Tensor) and query.device.type == "cpu":
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            op.default(**arguments)
        if backend == "cpp":  # called by itself the kernel must still not leave its tensors
            with pytest.raises(RuntimeError, match=f"{name}|{message.split(':')[0]}"):
                torch.ops.sparse_attn.block_sparse_attention.cpp(**arguments)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("q_block", 16.5, "an integer"),
        ("sink", "all", "an integer"),
        ("window", None, "an integer"),
        ("scale", "x", "a number"),
    ],
)
def test_wrong_types_are_named(name, value, expected):
    with pytest.raises(TypeError, match=f"{name}: got {value!r}, expected {expected}"):
        op(**legal() | {name: value})


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("count", [5, -1])
def test_counts_without_capacity_are_refused(backend, count):
    query, key, value = inputs(Shape(Tq=64, Tk=64))
    indices = torch.zeros(1, 1, 1, 0, dtype=torch.int32)
    counts = torch.full((1, 1, 1), count, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="counts: .* larger than the capacity of indices, 0"):
        op(query, key, value, indices, counts, 64, 64, sink=9, backend=backend)


@pytest.mark.parametrize("overload", ["default", "cpp", "reference", "triton", "cuda"])
def test_opcheck(overload):
    shape = Shape(Tq=20, Tk=30, q_block=16, kv_block=16)
    dtype = torch.bfloat16 if overload == "cuda" else torch.float32
    args = (*inputs(shape, dtype), *index(shape), True, 3, 5, 0.2)
    opcheck(getattr(torch.ops.sparse_attn.block_sparse_attention, overload), args)


@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
def test_every_argument_reaches_the_kernel(backend):
    """A type that differs between schema and C++ is silent: each value must change the result."""
    shape = Shape(Tq=64, Tk=64, q_block=16, kv_block=16, share=0.3)
    half = backend == "cuda"
    query, key, value = inputs(shape, torch.float16 if half else torch.float32)
    base = dict(zip(("indices", "counts", "q_block", "kv_block"), index(shape), strict=True))
    runs = [{}, {"causal": False}, {"sink": 20}, {"window": 20}, {"scale": 0.9}]
    for options in runs:
        got, want = (
            call(op, b, query, key, value, **base, **options)[0] for b in (backend, "reference")
        )
        tolerance = {"rtol": 5e-3, "atol": 2e-3} if half else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(got, want, **tolerance)
    results = [call(op, backend, query, key, value, **base, **options)[0] for options in runs]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))

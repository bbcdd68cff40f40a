import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import sparse_attn
from sparse_attn.block_index import BlockIndex
from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.block_sparse_attention_backward import op
from tests.cases import (
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
    results = dense_in_dtype(*leaves, Lists(indices, counts, q_block, kv_block), *options)
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
    # dP - delta cancels where one key has a whole row: left is the rounding of two sums this large
    grad_out, _, query, key, _, out = (x if x is None else x.float() for x in args[:6])
    sums = (grad_out * out).abs().sum(-1).max().item()
    scale = args[-1] if args[-1] is not None else query.shape[3] ** -0.5
    left = [2**-23 * sums * abs(scale) * x.abs().max().item() for x in (key, query)] + [0]
    for name, g, e, d, x, rest in zip(NAMES, got, exact, dense, args[2:5], left, strict=True):
        assert g.shape == x.shape and g.dtype == dtype and g.isfinite().all(), name
        # rows without keys: NaN in autograd's gradients, which are then no measure
        assert_as_accurate(g, e, d if d.isfinite().all() else e.to(dtype), floor + rest)
    assert (got[0][args[6] == -torch.inf] == 0).all()


OPTIONS = [
    {},
    {"causal": False, "scale": 0.3, "lse": False},
    {"sink": 7, "window": 19, "scale": -0.1},
]


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(Tq=130, Tk=200, Hq=4, Hkv=2, Hi=4, q_block=64, kv_block=64),
        Shape(Tq=150, Tk=150, Hi=1, q_block=128, kv_block=128, D=128, Dv=128, share=1.0),
        Shape(Tq=1, Tk=500, Hq=8, Hkv=2, Hi=2, q_block=1, kv_block=16, share=0.3),
        Shape(Tq=33, Tk=90, Hi=2, q_block=17, kv_block=1, share=0.1, D=32, Dv=32, B=2),
        Shape(Tq=50, Tk=31, D=40, Dv=24, Hi=1, q_block=16, kv_block=17),
        Shape(Tq=5, Tk=1, D=8, Dv=8, share=1.0),
        Shape(Tq=40, Tk=100, D=96, Dv=192, Hq=6, Hkv=2, Hi=2, q_block=33, kv_block=20),
    ],
    ids=str,
)
def test_parity(run, dtype, shape):
    options = OPTIONS
    if run == TRITON:  # the interpreter is slow: the dtypes share the options
        options = OPTIONS[DTYPES.index(dtype) :][:1]
    for chosen in options:
        check(run, shape, dtype, **chosen)


@pytest.mark.parametrize("run", RUNS, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_any_shape(run, data):
    pick = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    longest = 40 if run == TRITON else 140
    length = lambda: data.draw(st.integers(1, longest))  # noqa: E731
    kv_heads, group = pick(1, 2), pick(1, 2, 3)
    shape = Shape(
        B=pick(1, 2), Hkv=kv_heads, Hq=kv_heads * group, Hi=pick(1, kv_heads, kv_heads * group),
        Tq=length(), Tk=length(), D=pick(8, 32, 64, 72), Dv=pick(8, 32, 64, 80),
        q_block=data.draw(st.integers(1, 128)), kv_block=data.draw(st.integers(1, 128)),
        share=pick(0.0, 0.2, 1.0),
    )  # fmt: skip
    check(
        run, shape, pick(*DTYPES), causal=pick(True, False), sink=pick(0, 1, 40, 500),
        window=pick(0, 1, 33, 500), scale=pick(None, 0.0, 0.3), lse=pick(True, False),
    )  # fmt: skip


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_no_block_and_dense(run):
    shape = Shape(Tq=100, Tk=110, Hi=1)
    empty = Lists(torch.empty(1, 1, 2, 0, dtype=torch.int32),
                       torch.zeros(1, 1, 2, dtype=torch.int32), 64, 64)  # fmt: skip
    for options in ({}, {"sink": 110}, {"causal": False, "window": 9}):
        check(run, shape, torch.bfloat16, listed=empty, **options)
    if run != TRITON:
        check(
            run,
            Shape(Tq=30, Tk=400, Hq=4, Hi=1),
            torch.float32,
            listed=None,
            sink=400,
            causal=False,
        )


@pytest.mark.parametrize("causal, sink, window, scale",
                         [(True, 1, 0, None), (True, 2, 3, 0.4), (False, 1, 4, -0.3)])  # fmt: skip
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gradcheck(heads, causal, sink, window, scale):
    """The reference in float64, through autograd of the default overload, lse included."""
    shape = Shape(B=2, Hq=4, Hkv=2, Hi=heads, Tq=5, Tk=8, D=3, Dv=2, q_block=2, kv_block=3)
    leaves = [x.double().requires_grad_() for x in inputs(shape)]
    args = (*index(shape), causal, sink, window, scale)
    assert torch.autograd.gradcheck(lambda *x: attend.default(*x, *args), leaves)


@pytest.mark.parametrize("backend", ["cpp", "reference", "triton"])
def test_autograd_calls_the_same_backend(backend, monkeypatch):
    shape = Shape(Tq=20, Tk=30, Hi=1, q_block=16, kv_block=16)
    leaves = [x.requires_grad_() for x in inputs(shape, torch.bfloat16)]
    listed = index(replace(shape, share=1.0))
    chosen = []
    monkeypatch.setattr(type(op), "select", spy(type(op).select, chosen))
    out, lse = attend(*leaves, *listed, backend=backend)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    assert chosen == [("block_sparse_attention", backend), (op.name, backend)]
    want = op(grad_out, grad_lse, *leaves, out, lse, *listed, backend=backend)
    assert all(map(torch.equal, grads, want))


@pytest.mark.parametrize("forced", ["cpp", "reference"])
def test_a_forced_backend_without_a_gradient_leaves_it_to_another(forced, monkeypatch):
    shape = Shape(Tq=20, Tk=30, Hi=1, q_block=16, kv_block=16)
    listed = index(replace(shape, share=1.0))
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", forced)
    monkeypatch.setattr(op, "impls", [row for row in op.impls if row.backend != forced])
    chosen = []
    monkeypatch.setattr(type(op), "select", spy(type(op).select, chosen))
    query, *others = inputs(shape)
    attend(query.requires_grad_(), *others, *listed)[0].sum().backward()
    other = {"cpp": "reference", "reference": "cpp"}[forced]
    assert chosen == [("block_sparse_attention", forced), (op.name, other)]
    assert query.grad.abs().max() > 0


def spy(select, chosen):
    def wrapped(self, args, backend=None):
        row = select(self, args, backend)
        chosen.append((self.name, row.backend))
        return row

    return wrapped


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_require_a_gradient(wanted):
    shape = Shape(Tq=40, Tk=50)
    tensors, listed = inputs(shape), index(replace(shape, share=1.0))
    for i in wanted:
        tensors[i].requires_grad_()
    out, lse = attend(*tensors, *listed)
    out.sum().backward()  # an expanded gradient, no stride of it is 1
    grads = op(torch.ones_like(out), None, *tensors, out, lse, *listed)
    for i, (x, grad) in enumerate(zip(tensors, grads, strict=True)):
        assert (x.grad is not None) == (i in wanted)
        assert x.grad is None or torch.equal(x.grad, grad)


def test_only_lse_has_a_gradient():
    shape = Shape(Tq=40, Tk=50)
    leaves, listed = [x.requires_grad_() for x in inputs(shape)], index(replace(shape, share=1.0))
    attend(*leaves, *listed)[1].sum().backward()
    want = [x.detach().double().requires_grad_() for x in leaves]
    attend(*want, *listed)[1].sum().backward()
    for x, y in zip(leaves, want, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-5)
    assert (leaves[2].grad == 0).all() and leaves[0].grad.abs().max() > 0


@pytest.mark.parametrize("run", RUNS[1:], ids=str)
def test_strides_and_determinism(run):
    shape = Shape(B=2, Tq=40, Tk=64, Hq=4, Hkv=2, Hi=4, q_block=32, kv_block=32)
    args = arguments(run, shape, torch.bfloat16, index(shape))
    one = call(op, run, *args)
    assert all(map(torch.equal, one, call(op, run, *args)))
    contiguous = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in args]
    assert all(map(torch.equal, one, call(op, run, *contiguous)))
    last = [x.mT.contiguous().mT for x in args[:6] if x.dim() == 4]
    strange = (last[0], args[1], *last[1:], *args[6:])
    assert all(map(torch.equal, one, call(op, run, *strange)))


def test_threads_do_not_change_the_result():
    shape = Shape(Tq=300, Tk=300, Hq=4, Hkv=2, Hi=2)
    args = arguments(("cpp", None), shape, torch.bfloat16, index(shape), sink=3, window=40)
    before = torch.get_num_threads()
    one = op(*args)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, one, op(*args)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_extreme_logits(backend):
    """Logits of about +-1e4: no overflow, no NaN."""
    query, key, value = inputs(Shape(Tq=40, Tk=50, Hi=1))
    query, key = query.sign() * 12, key.sign() * 12
    listed = BlockIndex.full(40, 50, 64, 64).blocks
    args = (query, key, value, *listed, True, 0, 0, 1.0)
    out, lse = call(attend, backend, *args)
    assert lse.abs().max() > 3000
    args = (torch.randn_like(out), None, query, key, value, out, lse, *args[3:])
    exact = op(*double(args), backend="reference")
    for got, want in zip(call(op, backend, *args), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.triton
def test_a_list_out_of_order_stays_inside_the_tensors():
    """Undefined values, but no access outside: the interpreter would crash, and so would a GPU."""
    shape = Shape(Tq=40, Tk=60, Hi=1, q_block=16, kv_block=16)
    wrong = torch.tensor([3, -9, 2**31 - 1, 0], dtype=torch.int32).expand(1, 1, 3, 4).contiguous()
    query, key, value = inputs(shape)
    out, lse = torch.randn_like(query), torch.zeros(1, 2, 40)
    for counts in (4, 2**30, -5):
        listed = Lists(wrong, torch.full((1, 1, 3), counts, dtype=torch.int32), 16, 16)
        grads = call(op, TRITON, out, None, query, key, value, out, lse, *listed, sink=3)
        assert all(x.isfinite().all() for x in grads)


ARGUMENTS = ("grad_out", "grad_lse", "query", "key", "value", "out", "lse", "indices", "counts",
             "q_block", "kv_block", "causal", "sink", "window", "scale")  # fmt: skip


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_every_argument_reaches_the_kernel(backend):
    """A type that differs between schema and C++ is silent: each value must change the result."""
    shape = Shape(Tq=40, Tk=48, q_block=16, kv_block=16, share=0.3)
    args = arguments(backend, shape, torch.float32, index(shape))
    base = dict(zip(ARGUMENTS, args, strict=True))
    changes = [{}, {"causal": False}, {"sink": 20}, {"window": 20}, {"scale": 0.2},
               {"grad_lse": None}, {"out": -base["out"]}, {"lse": base["lse"] + 1}]  # fmt: skip
    results = []
    for change in changes:
        got, want = (call(op, b, **base | change) for b in (backend, "reference"))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        results.append(got[0])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))


BAD = [
    ("grad_out", lambda x: x.half(), "grad_out: dtype"),
    ("grad_out", lambda x: x[:, :, :5], "grad_out: shape"),
    ("grad_out", lambda x: x[0], "grad_out: expected 4 dimensions"),
    ("grad_lse", lambda x: x.half(), "grad_lse: expected dtype"),
    ("grad_lse", lambda x: x[:, :1], "grad_lse: shape"),
    ("query", lambda x: x[:, :3], "query: 3 heads"),
    ("key", lambda x: x[..., :8], "key: head_dim"),
    ("value", lambda x: x[..., :8], "grad_out: shape"),
    ("out", lambda x: x[..., :8], "out: shape"),
    ("lse", lambda x: x.double(), "lse: expected dtype"),
    ("lse", lambda x: x.to("meta"), "lse: device"),
    ("lse", lambda x: x[:, :, :1], "lse: shape"),
    ("indices", lambda x: x - 5, "indices: row"),
    ("counts", lambda x: x + 9, "counts: .*larger than the capacity"),
    ("q_block", lambda x: 0, "q_block: got 0"),
    ("sink", lambda x: -1, "sink: got -1"),
    ("scale", lambda x: float("nan"), "scale: got nan"),
]


@pytest.mark.parametrize("backend", ["cpp", "reference", "triton"])
@pytest.mark.parametrize("name, change, message", BAD, ids=[f"{n}-{m}" for n, _, m in BAD])
def test_bad_input(backend, name, change, message):
    if backend == "triton" and message.startswith(("indices: row", "counts: .*")):
        pytest.skip("a GPU kernel does not check the contents of an index")
    shape = Shape(Tq=20, Tk=40, Hq=4, Hkv=2, Hi=4, q_block=16, kv_block=16, share=1.0)
    args = arguments("cpp", shape, torch.float32, index(shape))
    base = dict(zip(ARGUMENTS, args, strict=True))
    base[name] = change(base[name])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op(**base, backend=backend)
    if backend == "cpp" and "device" not in message:
        # called by itself the kernel must still not leave its tensors
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.ops.sparse_attn.block_sparse_attention_backward.cpp(**base)


@pytest.mark.parametrize("overload", ["default", "cpp", "reference", "triton"])
def test_opcheck(overload):
    shape = Shape(Tq=20, Tk=30, q_block=16, kv_block=16)
    args = arguments("cpp", shape, torch.float32, index(shape), sink=3, window=5, scale=0.2)
    backward = getattr(torch.ops.sparse_attn.block_sparse_attention_backward, overload)
    opcheck(backward, args)
    leaves = [x.detach().requires_grad_() for x in args[2:5]]
    forward = getattr(torch.ops.sparse_attn.block_sparse_attention, overload)
    opcheck(forward, (*leaves, *args[7:]))


def test_no_second_derivative():
    query, key, value = (x.requires_grad_() for x in inputs(Shape(Tq=8, Tk=8)))
    out, _ = attend(query, key, value, *index(Shape(Tq=8, Tk=8)))
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_compile_and_autocast():
    """A model with projections: compiled whole and under autocast, the gradients are the same."""

    def loss(weight, x):
        with torch.autocast("cpu", torch.bfloat16):
            query, key, value = (x @ weight).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
            out = sparse_attn.attention(query, key, value, "flex_prefill", fallback=False)
            assert out.dtype == torch.bfloat16
        return out.float().square().mean()

    weight = torch.randn(16, 192, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for length in (150, 211):
        x = torch.randn(1, length, 16)
        grads = [torch.autograd.grad(f(weight, x), weight)[0] for f in (loss, compiled)]
        assert grads[0].abs().max() > 0
        torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("method", ["dense", "flex_prefill"])
def test_fine_tuning(method):
    """A loss goes down through sparse attention: recall of the token after the last same one."""
    torch.manual_seed(0)
    x = torch.randn(1, 200, 32)
    target = x.roll(1, 1)
    weight = torch.nn.Parameter(torch.randn(32, 4 * 32) * 0.2)
    config = sparse_attn.FlexPrefill(min_budget=32, block_size=32)
    chosen = config if method == "flex_prefill" else method
    optimiser = torch.optim.Adam([weight], 0.02)
    losses = []
    for _ in range(25):
        query, key, value, gate = (x @ weight).unflatten(-1, (4, 2, 16)).permute(2, 0, 3, 1, 4)
        out = sparse_attn.attention(query, key, value, chosen, fallback=False)
        loss = ((out + gate).transpose(1, 2).flatten(2) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0], losses[::8]


def test_transpose():
    shape = Shape(B=2, Hq=4, Hi=4, Tq=100, Tk=90, q_block=7, kv_block=9)
    listed = BlockIndex(*index(shape))
    offsets, rows = listed.transpose(90)
    mask = listed.to_mask(90)
    assert offsets.shape == (2, 4, 11) and rows.dtype == offsets.dtype == torch.int32
    for b, h, j in itertools.product(range(2), range(4), range(10)):
        found = rows[b, h, offsets[b, h, j] : offsets[b, h, j + 1]]
        assert found.tolist() == mask[b, h, :, j].nonzero().flatten().tolist()
    none = BlockIndex(torch.empty(1, 1, 3, 0, dtype=torch.int32),
                      torch.zeros(1, 1, 3, dtype=torch.int32), 64, 64)  # fmt: skip
    assert (none.transpose(90)[0] == 0).all()


def test_transpose_reads_nothing_on_the_host():
    with FakeTensorMode():  # raises where a value is read
        counts = torch.empty(1, 2, 4, dtype=torch.int32)
        listed = BlockIndex(counts.new_empty(1, 2, 4, 5), counts, 64, 64)
        offsets, rows = listed.transpose(300)
        assert offsets.shape == (1, 2, 6) and rows.shape == (1, 2, 20)
        with pytest.raises(DataDependentOutputException):
            int(counts.max())

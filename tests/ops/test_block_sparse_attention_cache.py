"""block_table and kv_lengths of `block_sparse_attention`: the same keys, elsewhere in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn.block_index import BlockIndex
from sparse_attn.ops.attention import op as attention
from sparse_attn.ops.block_sparse_attention import op
from tests.cases import (
    CUDA,
    DTYPES,
    FLOOR,
    GARBAGE,
    RUNS,
    TRITON,
    Shape,
    assert_as_accurate,
    call,
    index,
    inputs,
    opcheck,
)
from tests.ops.cases_block_sparse_attention import paged, spare
from tests.ops.test_block_sparse_attention import dense_in_dtype


def of_sequence(listed, b, n_keys):
    """The index of one sequence, without blocks beyond its keys."""
    blocks = -(-n_keys // listed.kv_block)
    place = torch.arange(listed.indices.shape[-1])
    counts = ((place < listed.counts[b, ..., None]) & (listed.indices[b] < blocks)).sum(-1)
    return listed._replace(indices=listed.indices[b : b + 1], counts=counts[None].int())


def expected(function, query, key, value, listed, lengths, *options):
    """A contiguous attention, sequence by sequence, with the keys that each has."""
    results = []
    for b, n in enumerate(lengths.tolist()):
        one = [x[b : b + 1] for x in (query, key, value)]
        if n == 0:
            out = one[0].new_zeros(*one[0].shape[:3], value.shape[3])
            results.append((out, out.new_full(out.shape[:3], -torch.inf)))
        else:
            keys = (x[:, :, :n] for x in one[1:])
            results.append(function(one[0], *keys, of_sequence(listed, b, n), *options))
    return [torch.cat(x) for x in zip(*results, strict=True)]


def check(run, shape, dtype, lengths, page_size, causal=True, sink=0, window=0, scale=None):
    query, key, value = inputs(shape, dtype)
    listed, lengths = index(shape), torch.tensor(lengths, dtype=torch.int32)
    options = (causal, sink, window, scale)
    whole = query, key, value, listed, lengths, *options
    exact, exact_lse = expected(
        lambda q, k, v, i, *o: op.default(q.double(), k.double(), v.double(), *i, *o), *whole
    )
    dense, dense_lse = expected(dense_in_dtype, *whole)
    if page_size is None:
        cache = spare(key, lengths), spare(value, lengths), None
    else:
        cache = paged(key, value, lengths, page_size, tokens_first=bool(page_size & 0x50))
    out, lse = call(op, run, query, *cache[:2], *listed, *options, cache[2], lengths)
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen) and (lse[~seen] == -torch.inf).all()
    assert (out[~seen] == 0).all()
    assert_as_accurate(out, exact, dense, FLOOR[dtype])
    if seen.any():
        floor = 5e-7 if dtype == torch.float32 else 1e-5
        assert_as_accurate(lse[seen], exact_lse[seen], dense_lse[seen], floor)


CASES = {  # shape with Tk the capacity, lengths, page_size (None: contiguous, with room to spare)
    "decode, pages of 16": (
        Shape(B=3, Tq=1, Tk=1024, Hq=8, Hkv=2, Hi=2, q_block=1, kv_block=16, share=0.6),
        (1000, 1, 333), 16,
    ),
    "decode, one long": (
        Shape(B=2, Tq=1, Tk=9216, Hq=4, Hkv=2, Hi=1, q_block=1, kv_block=64, D=40, Dv=24),
        (9001, 17), 128,
    ),
    "chunk, longer than a sequence": (
        Shape(B=4, Tq=70, Tk=256, Hq=4, Hkv=2, Hi=4, q_block=32, kv_block=64, D=80, Dv=72),
        (256, 69, 33, 0), 32,
    ),
    "prefill, pages of 64": (
        Shape(B=2, Tq=150, Tk=384, Hq=2, Hkv=1, Hi=1, q_block=128, kv_block=128, share=0.7),
        (301, 384), 64,
    ),
    "prefill, pages of 16": (
        Shape(B=2, Tq=130, Tk=192, Hq=4, Hkv=1, Hi=1, q_block=48, kv_block=17, D=96, Dv=128),
        (191, 131), 16,
    ),
    "room to spare": (
        Shape(B=3, Tq=40, Tk=333, Hq=4, Hkv=2, Hi=2, q_block=16, kv_block=16, D=64, Dv=64),
        (300, 7, 0), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("run", [*RUNS, *CUDA], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parity(run, case):
    shape, lengths, page_size = CASES[case]
    half = DTYPES[1:] if run[1] in (0, 2) else DTYPES[:0:-1]  # by turns, as the executor is slow
    dtypes = {"cpp": DTYPES, "cuda": half[:1]}
    for dtype in dtypes.get(run[0], DTYPES[::2]):
        check(run, shape, dtype, lengths, page_size)
        check(run, shape, dtype, lengths, page_size, sink=7, window=19, scale=-0.1)
    check(run, shape, DTYPES[1], lengths, page_size, causal=False, window=40, scale=0.3)


@pytest.mark.parametrize("run", CUDA, ids=str)
@settings(max_examples=5)
@given(data=st.data())
def test_any_cache_on_cuda(run, data):
    any_cache(run, data, DTYPES[1:])


@pytest.mark.parametrize("run", RUNS, ids=str)
@settings(max_examples=12)
@given(data=st.data())
def test_any_cache(run, data):
    any_cache(run, data, DTYPES)


def any_cache(run, data, dtypes):
    pick = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    kv_heads, group = pick(1, 2), pick(1, 2, 3)
    page_size = pick(16, 32, 64, 128, None)
    batch, most = pick(1, 2, 3), 200 if run == TRITON else 300
    room = data.draw(st.integers(1, most))
    capacity = room if page_size is None else -(-room // page_size) * page_size
    shape = Shape(
        B=batch, Hkv=kv_heads, Hq=kv_heads * group, Hi=pick(1, kv_heads, kv_heads * group),
        Tq=pick(1, 2, data.draw(st.integers(1, 140))), Tk=capacity, D=pick(8, 32, 64, 72),
        Dv=pick(8, 64, 80), q_block=data.draw(st.integers(1, 128)),
        kv_block=data.draw(st.integers(1, 128)), share=pick(0.0, 0.3, 1.0),
    )  # fmt: skip
    lengths = [data.draw(st.integers(0, capacity)) for _ in range(batch)]
    check(
        run, shape, pick(*dtypes), lengths, page_size, causal=pick(True, False),
        sink=pick(0, 1, 40, 500), window=pick(0, 1, 33, 500), scale=pick(None, 1.0),
    )  # fmt: skip


@pytest.mark.parametrize("run", [*RUNS, CUDA[0]], ids=str)
@pytest.mark.parametrize("queries", [1, 70])
def test_pages_change_no_bit(run, queries):
    """Kernels go through the keys in one order, wherever they lie; both layouts of a cache."""
    shape = Shape(B=2, Tq=queries, Tk=256, Hq=4, Hkv=2, Hi=2, q_block=min(queries, 32), kv_block=32)
    layouts = (True,) if run == TRITON else (True, False)  # the interpreter is slow
    for dtype in DTYPES[1 : 1 + len(layouts)]:
        query, key, value = inputs(shape, dtype)
        listed, lengths = index(shape), torch.tensor([201, 130], dtype=torch.int32)
        full = torch.full((2,), 256, dtype=torch.int32)
        plain = call(op, run, query, key, value, *listed, sink=3)
        for n in (lengths, full, None):
            one = call(op, run, query, key, value, *listed, sink=3, kv_lengths=n)
            if n is not lengths:
                assert torch.equal(one[0], plain[0]) and torch.equal(one[1], plain[1])
            for page_size in (16, 64):
                for tokens_first in layouts:
                    k, v, table = paged(key, value, full if n is None else n, page_size,
                                        tokens_first)  # fmt: skip
                    two = call(op, run, query, k, v, *listed, sink=3, block_table=table,
                               kv_lengths=n)  # fmt: skip
                    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("run", [TRITON, *CUDA], ids=str)
def test_a_wrong_table_stays_inside_the_cache(run):
    """Undefined values, but no read outside: interpreter and executor would tell."""
    shape = Shape(B=3, Tq=40, Tk=256, Hi=1, q_block=32, kv_block=32)
    query, key, value = inputs(shape, torch.bfloat16)
    full = torch.full((3,), 256, dtype=torch.int32)
    key, value, table = paged(key, value, full, 64)
    key, value = (torch.nan_to_num(x) for x in (key, value))
    table = GARBAGE[torch.arange(12) % 3].view(3, 4)
    for lengths in (None, full, GARBAGE):
        for options in ({}, {"sink": 3, "window": 40}, {"causal": False}):
            out, _ = call(op, run, query, key, value, *index(shape), **options,
                          block_table=table, kv_lengths=lengths)  # fmt: skip
            assert out.isfinite().all()


def counted(function):
    """The function compiled in one piece, and the list of the graphs it took."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend), graphs


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiles_to_one_graph(backend):
    """Other lengths, more pages and larger batches run the same graph."""
    model, graphs = counted(
        lambda q, k, v, table, lengths: sparse_attn.attention(
            q * 2, k, v, "dense", block_table=table, kv_lengths=lengths, backend=backend
        )
    )
    # no two sizes alike, which would count as one
    for batch, room, lengths in ((3, 224, (100, 33, 0)), (5, 288, (1, 190, 64, 288, 7))):
        shape = Shape(B=batch, Tq=11, Tk=room, Hq=4, Hkv=2)
        lengths = torch.tensor(lengths, dtype=torch.int32)
        query, key, value = inputs(shape)
        *cache, table = paged(key, value, lengths, 32)
        got = model(query, *cache, table, lengths)
        want = sparse_attn.attention(
            query * 2, *cache, "dense", block_table=table, kv_lengths=lengths, backend=backend
        )
        torch.testing.assert_close(got, want)
    assert len(graphs) == 1


def legal():
    shape = Shape(B=2, Tq=20, Tk=128, Hq=4, Hkv=2, Hi=1)
    lengths = torch.tensor([100, 33], dtype=torch.int32)
    query, key, value = inputs(shape)
    key, value, table = paged(key, value, lengths, 32)
    names = ("query", "key", "value", "indices", "counts", "q_block", "kv_block")
    call = dict(zip(names, (query, key, value, *index(shape)), strict=True))
    return call | {"block_table": table, "kv_lengths": lengths}


BAD = [
    ("key", lambda x: x[:, :, :24], "key: page_size is 24, expected one of"),
    ("key", lambda x: x.repeat(1, 1, 8, 1), "key: page_size is 256, expected one of"),
    ("key", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "key: strides"),
    ("value", lambda x: x[1:], "value: number of pages"),
    ("value", lambda x: x[:, :1], "value: number of heads"),
    ("value", lambda x: x[:, :, :16], "value: page_size is 16, expected 32"),
    ("block_table", lambda x: x.long(), "block_table: expected dtype int32"),
    ("block_table", lambda x: x[0], "block_table: expected 2 dimensions"),
    ("block_table", lambda x: x[:1], "block_table: batch size is 1"),
    ("block_table", lambda x: x[:, :0], "block_table: dimension pages is empty"),
    ("block_table", lambda x: x.to("meta"), "block_table: device"),
    ("block_table", lambda x: x[:, :3], "kv_lengths: .*100"),
    ("block_table", lambda x: x * 0 - 1, "block_table: .* in use"),
    ("block_table", lambda x: x + 99, "block_table: .* in use"),
    ("kv_lengths", lambda x: x.long(), "kv_lengths: expected dtype int32"),
    ("kv_lengths", lambda x: x[:1], "kv_lengths: batch size is 1"),
    ("kv_lengths", lambda x: x[:, None], "kv_lengths: expected 1 dimensions"),
    ("kv_lengths", lambda x: x.to("meta"), "kv_lengths: device"),
    ("kv_lengths", lambda x: x - 50, "kv_lengths: .*-17|kv_lengths: a value"),
    ("kv_lengths", lambda x: x + 29, "kv_lengths: .*129|kv_lengths: a value"),
]
CONTENTS = ("kv_lengths: .*", "block_table: .*")  # checked where they lie in the host's memory


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name, change, message", BAD, ids=[f"{n}-{m}" for n, _, m in BAD])
def test_bad_input(backend, name, change, message):
    arguments = legal()
    arguments["counts"] = arguments["counts"].clamp(max=1)
    if message == "kv_lengths: .*100":
        message = "kv_lengths: (the value at .0. is 100|a value is not in .0, 96.)"
    arguments[name] = change(arguments[name])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op(**arguments, backend=backend)
    if arguments[name].device.type != "cpu":  # PyTorch takes an overload of the other device
        return
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op.default(**arguments)
    if backend == "cpp":  # called by itself the kernel must still not leave its tensors
        with pytest.raises(RuntimeError, match="key|value|block_table|kv_lengths"):
            torch.ops.sparse_attn.block_sparse_attention.cpp(**arguments)


@pytest.mark.parametrize("overload", ["default", "cpp", "reference", "triton", "cuda"])
def test_opcheck(overload):
    args = legal()
    for name in ("query", "key", "value") if overload == "cuda" else ():
        args[name] = args[name].half()
    values = [args.pop(n) for n in ("query", "key", "value", "indices", "counts")]
    values = [*values, 64, 64, True, 3, 5, 0.2, args["block_table"], args["kv_lengths"]]
    opcheck(getattr(torch.ops.sparse_attn.block_sparse_attention, overload), values)


def test_there_is_no_gradient():
    for left_out in ("block_table", "kv_lengths"):
        arguments = legal()
        arguments[left_out] = None
        if left_out == "block_table":
            arguments["key"], arguments["value"] = inputs(Shape(B=2, Tk=128, Hkv=2))[1:]
        else:
            arguments["block_table"] = arguments["block_table"].clamp(0, 3)
        arguments["query"].requires_grad_()
        out, _ = op(**arguments)
        with pytest.raises(NotImplementedError, match="no gradient with block_table or kv_lengths"):
            out.sum().backward()


def test_attention_passes_a_cache_on():
    arguments = legal()
    listed = BlockIndex(*(arguments.pop(n) for n in ("indices", "counts", "q_block", "kv_block")))
    query, key, value = (arguments.pop(n) for n in ("query", "key", "value"))
    want = op(query, key, value, *listed.blocks, **arguments)[0]
    got = sparse_attn.attention(query, key, value, index=listed, **arguments)
    assert torch.equal(got, want)
    whole = BlockIndex.full(20, 128, 64, 64).expand(2)
    want = op(query, key, value, *whole.blocks, causal=False, **arguments)
    got, lse, stats = sparse_attn.attention(
        query, key, value, "dense", causal=False, return_lse=True, return_stats=True, **arguments
    )
    torch.testing.assert_close((got, lse), want)
    assert stats.density == 1
    again = attention(query, key, value, "dense", causal=False, **arguments)
    assert torch.equal(again[0], got) and torch.equal(again[1], lse)
    with pytest.raises(NotImplementedError, match="'flex_prefill' cannot serve .* 'dense'"):
        sparse_attn.attention(query, key, value, **arguments)
    with pytest.raises(NotImplementedError, match="return_stats: no density"):
        sparse_attn.attention(query, key, value, index=listed, return_stats=True, **arguments)

"""The selection pass: its definition pair by pair, every backend against the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import BlockIndex
from sparse_attn.ops._sale import group_of
from sparse_attn.ops.sale_estimate import op
from sparse_attn.ops.sale_quantize import op as quantize
from sparse_attn.reference import sale_estimate as reference
from sparse_attn.reference.sale_quantize import unpack
from tests.cases import CUDA, Shape, call, inputs, opcheck
from tests.cases import RUNS as ALL
from tests.ops.cases_sale_estimate import case

BACKENDS = ("reference", "cpp", "triton", "cuda")  # a backend that has a kernel adds its name
# in the executor an odd seed has the products of GPUs up to sm_89, an even one those of later ones
RUNS = [run for run in [*ALL, *CUDA[-2:]] if run[0] in BACKENDS]
KERNELS = [run for run in RUNS if run[0] != "reference"]


def regions(Tq, Tk, q_block, kv_block, local, sink):
    """(sink, local, seen) of each query block, in blocks, from the words of the documentation."""
    for start in range(0, Tq, q_block):
        first, last = Tk - Tq + start, Tk - Tq + min(start + q_block, Tq) - 1
        seen = last // kv_block + 1 if last >= 0 else 0
        own = max(first, 0) // kv_block
        begin = min(max(own - -(-local // kv_block) + 1, 0), seen)
        yield min(-(-sink // kv_block), begin), begin, seen


def lists(run, args, **options):
    """The index as a mask, after checking that it is legal and holds the reference region."""
    indices, counts = call(op, run, *args, **options)
    Tq, Tk = args[0].shape[2], args[2].shape[2]
    q_block, kv_block = options.get("q_block", 64), options.get("kv_block", 32)
    BlockIndex(indices, counts, q_block, kv_block).validate(Tq, Tk)
    behind = torch.arange(indices.shape[3]) >= counts[..., None]
    assert not indices[behind].any(), "zeros behind the lists"
    mask = BlockIndex(indices, counts, q_block, kv_block).to_mask(Tk)
    local, sink = options.get("local", 128), options.get("sink", 32)
    for m, (low, begin, seen) in enumerate(regions(Tq, Tk, q_block, kv_block, local, sink)):
        row = mask[:, :, m]
        assert row[..., :low].all() and row[..., begin:seen].all() and not row[..., seen:].any()
    return mask


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_definition_pair_by_pair(run):
    """In numpy's float32, one pair at a time; and the float form differs only at near ties."""
    args = case(Tq=40, Tk=150, D=16, Hq=2, spread=3.4)
    grid = {"q_block": 32, "kv_block": 16, "local": 16, "sink": 16}
    args = (*args[:2], *quantize(torch.randn(1, 1, 150, 16), None, "key", 16)[:2], *args[4:])
    mask = lists(run, args, **grid)
    f = np.float32
    q_step, k_step, bias, theta = (x.numpy() for x in (args[1], args[3], args[4], args[5]))
    a = (unpack(args[0])[0].double() @ unpack(args[2])[0].double().mT).numpy()
    chosen = total = 0
    for m, (low, begin, _) in enumerate(regions(40, 150, 32, 16, 16, 16)):
        for h in range(2):
            for block in range(low, begin):
                kept, nearest, best = False, np.inf, -np.inf
                for i in range(m * 32, min(m * 32 + 32, 40)):
                    for j in range(block * 16, block * 16 + 16):
                        sq = q_step[0, h, i // 16 * 8 + i % 8]
                        sk = k_step[0, 0, j // 16 * 4 + j % 8 // 2]
                        t = f(f(bias[0, h, j] * f(f(1) / sk)) * f(f(1) / sq))
                        n = np.int32(a[h, i, j]) + np.int32(np.rint(t))
                        x = f(f(sq * sk) * f(n))
                        kept |= bool(x > theta[0, h, i])
                        exact = float(sq) * float(sk) * a[h, i, j] + float(bias[0, h, j])
                        best = max(best, exact - theta[0, h, i])
                        nearest = min(nearest, abs(exact - theta[0, h, i]) - float(sq) * float(sk))
                assert mask[0, h, m, block] == kept
                assert nearest < 0 or kept == (best > 0), "the float form"
                chosen, total = chosen + kept, total + 1
    assert 0.2 < chosen / total < 0.8


def test_the_reference_takes_a_step_per_token():
    """Each token with the step of its group: the same lists. With larger ones: longer lists."""
    args = case(Tq=90, Tk=300, Hq=4, Hkv=2)
    each = list(args)
    for at, kind in ((1, "query"), (3, "key")):
        place = group_of(torch.arange(args[at - 1].shape[2]), kind, 32)
        each[at] = args[at][:, :, place]
    got, want = reference.sale_estimate(*each, per_token=True), reference.sale_estimate(*args)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    each[1] = each[1] * 4
    assert reference.sale_estimate(*each, per_token=True)[1].sum() > want[1].sum()


@pytest.mark.parametrize("run", KERNELS, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_kernel_equals_reference_bit_by_bit(run, data):
    pick = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    fast = run[0] == "cpp"
    Tk = data.draw(st.integers(1, 700 if fast else 260))
    Tq = pick(Tk, data.draw(st.integers(1, Tk)), min(Tk, 64), data.draw(st.integers(1, 300)))
    D = pick(8, 24, 64, 96, 128, 256, *((2, 6, 34, 700) if fast else ()))
    B, (Hq, Hkv) = pick(1, 2), pick((1, 1), (4, 2), (3, 1))
    grid = {
        "q_block": pick(16, 32, 64, 64, 64, 128), "kv_block": pick(16, 32, 32, 64),
        "local": pick(1, 32, 128, 100), "sink": pick(0, 32, 33),
    }  # fmt: skip
    args = case(Tq, Tk, D, Hq, Hkv, B, grid["kv_block"], pick(2.5, 3.4, 4.5), pick(0.0, 0.5, 20.0))
    want = op(*args, **grid, backend="reference")
    got = call(op, run, *args, **grid)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    lists(run, args, **grid)


@pytest.mark.parametrize("run", KERNELS, ids=str)
@pytest.mark.parametrize("D", [256, 1024])
def test_the_largest_products_do_not_overflow(run, D):
    """Every code 7 or -7: the largest sums there are, and bars on both sides of them."""
    if run[0] in ("triton", "cuda") and D > 256:
        pytest.skip("head_dim up to 256")
    shape = Shape(Tq=70, Tk=170, D=D)
    query, key = (torch.where(x > 0, 1.0, -1.0) for x in inputs(shape)[:2])
    query[:, 1] = query[:, 0]
    key[:, :, 70:80] = query[:, :1, 3:4]
    key[:, :, 40:50] = -query[:, :1, 3:4]
    zero = torch.zeros(1, 2, D)
    packed, step, _ = quantize(query, zero, "query", backend="reference")
    k_packed, k_step, _ = quantize(key, zero[:, :1], "key", backend="reference")
    for factor in (0.99, 1.01):
        theta = torch.full((1, 2, 70), float(D) * factor)
        args = (packed, step, k_packed, k_step, torch.zeros(1, 2, 170), theta)
        grid = {"local": 32, "sink": 32}
        mask = lists(run, args, **grid)
        want = BlockIndex(*op(*args, **grid, backend="reference"), 64, 32).to_mask(170)
        assert torch.equal(mask, want)
        assert mask[0, 0, 0, 2] == (factor < 1) and not mask[0, 0, 0, 1]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_planted_pair_is_found_wherever_it_lies(run):
    """Every (i mod 64, j mod 32), a block of keys of a head for each."""
    heads, D, middle = 32, 64, 68
    rows = torch.where(torch.randn(64, D) > 0, 1.0, -1.0)
    assert (rows @ rows.T).fill_diagonal_(0).max() < 44, "no row looks for another's key"
    i, blocks = torch.arange(64), 1 + torch.randperm(middle)[:64]  # four hold no pair
    key = torch.zeros(1, 1, 32 * (1 + middle) + 64, D)
    key[0, 0, 32 * blocks + i % 32] = rows
    query = torch.stack([rows.roll(h, 0) for h in range(heads)])[None]  # row (i + h) % 64 finds it
    want = torch.zeros(1 + middle + 2, dtype=torch.bool)
    want[0] = want[-2:] = want[blocks] = True  # the sink and the last blocks
    zero = torch.zeros(1, heads, D)
    packed, step, _ = quantize(query, zero, "query", backend="reference")
    k_packed, k_step, _ = quantize(key, zero[:, :1], "key", backend="reference")
    bias, theta = torch.zeros(1, heads, key.shape[2]), torch.full((1, heads, 64), 50.0)
    args = (packed, step, k_packed, k_step, bias, theta)
    mask = lists(run, args, local=32, sink=32)[0, :, 0]
    assert torch.equal(mask, want.expand_as(mask))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_strange_numbers(run):
    """NaN keeps: a step keeps its group's blocks, a bar its query block; zeros decide exactly."""
    args = [x.clone() for x in case(Tq=256, Tk=256, Hq=1, spread=50.0)]
    grid = {"local": 1, "sink": 0}
    middle = lambda: lists(run, args, **grid)[0, 0, 3, :6].tolist()  # noqa: E731
    assert middle() == [False] * 6
    args[3][0, 0, 4 * 2 + 1] = torch.nan  # a step of keys in block 2
    assert middle() == [False, False, True, False, False, False]
    args[3][0, 0, 4 * 2 + 1] = torch.inf
    args[4][0, 0, 32 * 4 + 7] = torch.nan  # the bias of a key in block 4
    args[3][0, 0, 9] = 1.0
    assert middle() == [False, False, False, False, True, False]
    args[4][0, 0, 32 * 4 + 7] = 1e30
    assert middle() == [False, False, False, False, True, False]
    args[4][0, 0, 32 * 4 + 7] = -1e30
    assert middle() == [False] * 6
    args[1][0, 0, 8 * 13 + 5] = torch.nan  # a step of queries in block 3
    assert middle() == [True] * 6
    args[1][0, 0, 8 * 13 + 5] = 0.0  # codes times nothing: the estimate is 0
    assert middle() == [False] * 6
    args[5][0, 0, 200 + 13] = -1e-30  # row 213 has group 5 of tile 13
    assert middle() == [True] * 6
    args[5][0, 0, 200 + 13] = -1e-40  # as 0
    assert middle() == [False] * 6
    for bar in (torch.nan, -torch.inf):
        args[5][0, 0, 200] = bar
        assert middle() == [True] * 6
    args[5][0, 0, 200] = torch.inf
    assert middle() == [False] * 6


@pytest.mark.parametrize("run", KERNELS, ids=str)
def test_long_rows(run):
    """More blocks than a word of any kernel's mask has bits, and words enough to share."""
    args = case(Tq=40, Tk=2300, D=32, Hq=1, kv_block=16, spread=4.0)
    grid = {"q_block": 32, "kv_block": 16, "local": 64}
    want = op(*args, **grid, backend="reference")
    assert 20 < want[1].max() < 120
    assert all(torch.equal(g, w) for g, w in zip(call(op, run, *args, **grid), want, strict=True))


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 130), (64, 127), (130, 131)], ids=str)
def test_no_bar_is_every_visible_block(run, shape):
    args = case(*shape)
    args = (*args[:5], torch.full_like(args[5], -torch.inf))
    mask = lists(run, args)
    want = BlockIndex.full(*shape, 64, 32).to_mask(shape[1])
    assert torch.equal(mask, want.expand_as(mask))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_batches_heads_strides_and_repeats(run):
    args = case(Tq=200, Tk=300, B=2, Hq=4, Hkv=2)
    both = call(op, run, *args)
    for x, y in zip(both, call(op, run, *args), strict=True):
        assert torch.equal(x, y)
    for b in range(2):
        one = call(op, run, *(x[b : b + 1] for x in args))
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(both, one, strict=True))
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args]
    assert all(torch.equal(x, y) for x, y in zip(both, call(op, run, *apart), strict=True))
    wide = [x.repeat_interleave(2, 1) if x.shape[1] == 2 else x for x in args]
    assert all(torch.equal(x, y) for x, y in zip(both, call(op, run, *wide), strict=True))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_chunk_is_the_suffix_of_the_whole_prompt(run):
    packed, step, *keys, bias, theta = case(Tq=400, Tk=400)
    whole = lists(run, (packed, step, *keys, bias, theta))
    part = (packed[:, :, 128:], step[:, :, 64:], *keys, bias, theta[:, :, 128:])
    assert torch.equal(lists(run, part), whole[:, :, 2:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query_packed": torch.zeros(1, 2, 70, 32)}, "query_packed: expected dtype uint8"),
        ({"key_packed": torch.zeros(1, 1, 70, 16, dtype=torch.uint8)}, "key_packed: bytes is 16"),
        ({"key_packed": torch.zeros(1, 3, 70, 32, dtype=torch.uint8)}, "expected a multiple"),
        ({"query_step": torch.zeros(1, 2, 70)}, r"query_step: shape is .*, expected \(1, 2, 40\)"),
        ({"key_step": torch.zeros(1, 1, 70)}, r"key_step: shape is .*, expected \(1, 1, 12\)"),
        ({"key_bias": torch.zeros(1, 1, 70)}, "key_bias: shape is"),
        ({"theta": torch.zeros(1, 2, 70).double()}, "theta: expected dtype float32"),
        ({"q_block": 48}, r"q_block: got 48, expected one of \(16, 32, 64, 128\)"),
        ({"kv_block": 128}, r"kv_block: got 128, expected one of \(16, 32, 64\)"),
        ({"local": 0}, "local: got 0, expected 1 or more"),
        ({"sink": -1}, "sink: got -1, expected 0 or more"),
    ],
)
def test_bad_input(change, message):
    names = ("query_packed", "query_step", "key_packed", "key_step", "key_bias", "theta")
    args = dict(zip(names, case(70, 70), strict=True))
    with pytest.raises((ValueError, TypeError), match=message):
        op(**{**args, **change})


@pytest.mark.parametrize("overload", ["default", *BACKENDS])
def test_opcheck(overload):
    opcheck(getattr(torch.ops.sparse_attn.sale_estimate, overload), (*case(70, 90), 32, 32, 20, 5))


def test_compiles_for_any_length():
    run = torch.compile(lambda *args: op(*args), fullgraph=True, dynamic=True)
    for shape in ((70, 70), (133, 200)):
        args = case(*shape)
        assert all(torch.equal(x, y) for x, y in zip(run(*args), op(*args), strict=True))

"""The tree search against its definition, on every backend."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.ops.hip_select import op
from sparse_attn.reference import hip_select as reference
from tests import hip, hip_official
from tests.cases import DTYPES, Shape, opcheck
from tests.cases import inputs as random_inputs

ORACLES = Path(__file__).parents[1] / "oracles" / "hip"
RUNS = hip.runs_of(op)
KERNELS = [run for run in RUNS if run[0] != "reference"]
brief, dtype_for = hip.brief, hip.dtype_for
BACKENDS = sorted({run[0] for run in RUNS})


def mask_of(query, key, run=("reference", None), **options):
    """[B, H', Mq, Nk] bool, after checking that the index is legal and as long as promised."""
    kv_block = options.get("kv_block", 2)
    heads = key.shape[1] if options.get("share_kv_heads") else query.shape[1]
    keep = -(-options.get("budget", 512) // kv_block)
    return hip.legal_mask(op, query, key, run, options, keep, heads, kv_block, exactly=True)


# ---- the published code ------------------------------------------------------------------------


def recorded(name):
    data = np.load(ORACLES / f"{name}.npz")
    query, key = (torch.from_numpy(data[x]).transpose(0, 1) for x in "qk")
    options = json.loads(str(data["params"]))
    names = ("mask_k", "bq", "bsq", "bk", "bsk", "sw", "sink")
    return query, key, {name: options[name] for name in names}, data


@pytest.mark.parametrize("file", sorted(x.stem for x in ORACLES.glob("v11_*.npz")))
def test_the_official_selection_with_its_quirks(file):
    query, key, options, data = recorded(file)
    chosen = hip_official.v11(query, key, **options)
    counts = torch.from_numpy(data["ks"]).flatten()
    want = torch.from_numpy(data["indices"]).flatten(0, 1)
    assert len(chosen) == len(counts) > 0
    for got, row, n in zip(chosen, want, counts, strict=True):
        assert torch.equal(got, row[:n].long())


@pytest.mark.parametrize("file", ["v11_prefill_512", "v11_decode_1000"])
def test_the_official_selection_without_its_quirks_is_the_reference(file):
    """The remaining difference of the two codes is none."""
    query, key, options, _ = recorded(file)
    chosen = hip_official.v11(query, key, **options, quirks=frozenset())
    n_blocks = -(-key.shape[1] // options["bk"])
    mask = mask_of(
        query[None], key[None], budget=options["mask_k"], q_block=options["bq"],
        kv_block=options["bk"], q_stride=options["bsq"], key_stride=options["bsk"],
        sink=options["sink"], window=options["sw"], branch=2,
    )  # fmt: skip
    for got, row in zip(chosen, mask.flatten(0, 2), strict=True):
        assert torch.equal(got // options["bk"], torch.arange(n_blocks)[row])


# ---- the definition ----------------------------------------------------------------------------


def any_options(data, length):
    """Any legal options for keys of about this length."""
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    pick = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    q_block, kv_block = pick(1, 3, 16, 33, 64), pick(1, 2, 3, 8)
    return {
        "budget": integer(1, length // 2), "q_block": q_block, "kv_block": kv_block,
        "q_stride": integer(1, 4), "key_stride": integer(1, 9),
        "sink": pick(0, 5, 16), "window": pick(0, 7, 32), "branch": pick(2, 4),
        "representative": pick("centre", "first"), "share_kv_heads": pick(False, True),
        "causal": pick(True, True, False), "scale": pick(None, 0.3, -1.0),
    }  # fmt: skip


@pytest.mark.parametrize("run", KERNELS or RUNS, ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_equals_the_reference_exactly_ties_included(run, data):
    hip.equals_the_reference_ties_included(mask_of, run, data, any_options, 120)


@pytest.mark.parametrize("run", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [False, True])
def test_equals_the_reference_where_no_score_nearly_ties(run, dtype, share):
    options = {"budget": 48, "q_block": 32, "sink": 5, "window": 20, "share_kv_heads": share}
    hip.equals_the_reference_but_near_ties(mask_of, reference, run, dtype, options, 1e-3, 16)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("branch, centre", [(2, "centre"), (4, "centre"), (2, "first")])
def test_no_block_is_out_of_reach(run, branch, centre):
    """Scores that rise along the keys lead to the very last blocks, falling ones to the first."""
    position = torch.linspace(0, 1, brief(run, 777, 333))
    key = torch.stack([position, 1 - position], 1)[None, None].repeat(1, 1, 1, 4)
    query = torch.zeros(1, 2, 5, 8)
    query[:, 0, :, ::2], query[:, 1, :, 1::2] = 1, 1
    query, key = query.to(dtype_for(run)), key.to(dtype_for(run))
    options = {"budget": 50, "q_block": 5, "sink": 6, "window": 11, "branch": branch,
               "representative": centre}  # fmt: skip
    want = mask_of(query, key, **options)
    if key.dtype == torch.float32:
        ends = want.int().argmax(-1).flatten().tolist()
        last = (len(position) - 1 - 11) // 2
        assert ends == [last - 24, 3] and (want.sum(-1) == 25).all()
    assert torch.equal(mask_of(query, key, run, **options), want)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_ties_go_to_the_lower_block(run):
    key = torch.ones(1, 1, 300, 16, dtype=dtype_for(run))
    query = torch.zeros(1, 1, 4, 16, dtype=dtype_for(run))
    query[:, :, 1] = -0.0
    mask = mask_of(query, key, run, budget=40, q_block=4, sink=10, window=30)
    assert torch.equal(torch.arange(150)[mask.flatten()], 5 + torch.arange(20))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_early_blocks_return_all_that_window_and_sink_leave(run):
    query, key, _ = random_inputs(Shape(Tq=200, Tk=200, Hq=2, Hkv=2), dtype_for(run))
    mask = mask_of(query, key, run, budget=64, q_block=16, sink=16, window=32)
    for m in range(13):
        last = min((m + 1) * 16, 200) - 1
        blocks = range(8, max(8, (last - 32) // 2 + 1))
        if len(blocks) <= 32:
            assert torch.equal(mask[0, 0, m].nonzero()[:, 0], torch.tensor(blocks).long())


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_search_and_window_leave_no_key_between_them(run):
    """With room for all, each query sees each key up to itself, whatever the sizes."""
    for *shape, q_block, kv_block, sink, window in (
        (70, 70, 64, 2, 16, 30), (33, 90, 5, 3, 4, 7), (1, 57, 1, 8, 3, 10), (90, 33, 16, 2, 0, 0),
        (20, 20, 7, 1, 50, 50), (40, 60, 128, 7, 9, 1),
    ):  # fmt: skip
        options = {"kv_block": kv_block, "budget": 1000, "q_stride": 1}
        options |= {"q_block": q_block, "sink": sink, "window": window}
        hip.sees_each_key_up_to_itself(mask_of, run, shape, kv_block, options)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_keys_of_the_window_and_later_do_not_vote(run):
    options = {"budget": 32, "q_block": 32, "window": 40}
    hip.ignores_keys_of_the_window_and_later(mask_of, run, options)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_each_query_votes_up_to_its_own_window(run):
    """Only one query likes keys 300 to 303, which a wider window takes out of its search."""
    query, key = (x.zero_() for x in hip.smooth_keys(Shape(Tq=32, Tk=400), dtype=dtype_for(run)))
    key[:, :, 300:304, 0] = 1
    query[:, :, 1, 0] = 9  # position 369
    for window, found in ((60, True), (80, False)):
        options = {"budget": 200, "q_block": 32, "window": window, "sink": 0}
        mask = mask_of(query, key, run, **options)[0, 0, 0]
        assert mask[150].item() == mask[151].item() == found


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_ragged_block_asks_its_own_queries_only(run):
    query, key = hip.smooth_keys(Shape(Tq=70, Tk=500), dtype=dtype_for(run))
    options = {"budget": 24, "q_block": 64, "q_stride": 4, "window": 20}
    before = mask_of(query, key, run, **options)
    query[:, :, :64] = -9 * query[:, :, :64]
    after = mask_of(query, key, run, **options)
    assert torch.equal(before[:, :, 1], after[:, :, 1])
    assert not torch.equal(before[:, :, 0], after[:, :, 0])
    alone = mask_of(query[:, :, -6:], key, run, **options)
    assert torch.equal(after[:, :, 1:], alone)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_batches_strides_and_repeats(run):
    options = {"budget": 30, "q_block": 32, "window": 17}
    query, key, both = hip.knows_batches_strides_and_chunks(mask_of, run, options)
    expanded = mask_of(query, key.repeat_interleave(2, 1), run, **options)
    assert torch.equal(both, expanded)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4, -1e4])
def test_strange_numbers(run, value):
    options = {"budget": 20, "q_block": 16, "window": 9, "q_stride": 1}
    hip.passes_strange_numbers_over(mask_of, run, value, options)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("page_size", [None, 16, 32, 128])
def test_pages(run, page_size):
    options = {"budget": 20, "q_block": 16, "window": 10, "sink": 4}
    hip.reads_any_pages(mask_of, run, page_size, options)


@pytest.mark.parametrize("run", [r for r in KERNELS if r[0] != "cpp"], ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_wrong_cache_is_not_left(run, page_size):
    options = {"budget": 20, "q_block": 16, "window": 10, "sink": 4}
    hip.stays_in_a_wrong_cache(op, run, page_size, options, 48)


@pytest.mark.parametrize("run", KERNELS, ids=str)
def test_every_argument_reaches_the_kernel(run):
    base = {"budget": 48, "q_block": 32, "kv_block": 4, "q_stride": 2, "key_stride": 1, "sink": 8,
            "window": 24}  # fmt: skip
    changes = (
        {"budget": 56}, {"q_block": 16}, {"kv_block": 3}, {"q_stride": 8}, {"key_stride": 3},
        {"sink": 60}, {"window": 120}, {"representative": "first"}, {"branch": 2},
        {"share_kv_heads": True}, {"causal": False}, {"scale": -1.0},
    )  # fmt: skip
    hip.every_argument_reaches(mask_of, run, base, changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU decides the order of its threads")
def test_the_order_of_threads_does_not_show():
    hip.ignores_the_order_of_threads(op, {"budget": 30, "q_block": 32, "window": 17})


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_choice(threads):
    hip.ignores_the_number_of_threads(op, threads, {"budget": 64})


# ---- the operator ------------------------------------------------------------------------------

PAGES = torch.zeros(3, 2, 16, 64)
BAD = [
    ({"budget": 0}, "budget: got 0, expected 1 or more"),
    ({"q_block": 129}, "q_block: got 129, expected 1 to 128"),
    ({"kv_block": 0}, "kv_block: got 0, expected 1 to 128"),
    ({"q_stride": 0}, "q_stride: got 0, expected 1 to 128"),
    ({"key_stride": 129}, "key_stride: got 129, expected 1 to 128"),
    ({"sink": -1}, "sink: got -1"),
    ({"window": -1}, "window: got -1"),
    ({"representative": "last"}, "representative: got 'last'"),
    ({"branch": 3}, "branch: got 3"),
    ({"scale": float("inf")}, "scale: got inf"),
    ({"key": torch.randn(1, 2, 100, 32)}, "key: head_dim"),
    ({"key": torch.randn(1, 3, 100, 64)}, "query: 4 heads"),
    ({"key": torch.randn(1, 2, 0, 64)}, "key: dimension Tk is empty"),
    ({"query": torch.randn(4, 100, 64)}, "query: expected 4 dimensions"),
    ({"query": torch.ones(1, 4, 100, 64, dtype=torch.int32)}, "query: expected dtype"),
    ({"kv_lengths": torch.ones(2).int()}, "kv_lengths: batch size is 2, expected 1"),
    ({"key": PAGES, "block_table": torch.zeros(2, 3).int(), "kv_lengths": torch.ones(2).int()},
     "block_table: batch size is 2, expected 1"),
    ({"key": PAGES[:, :, :8], "block_table": torch.zeros(1, 3).int(),
      "kv_lengths": torch.ones(1).int()}, "key: page_size is 8, expected one of"),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input(backend, change, message):
    query, key = random_inputs(Shape(Tq=100, Tk=100, Hq=4, Hkv=2))[:2]
    arguments = {"query": query, "key": key} | change
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op(**arguments, backend=backend)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op.default(**arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 0}, "budget: got 0"),
        ({"q_block": 200}, "q_block: got 200"),
        ({"kv_block": 0}, "kv_block: got 0"),
        ({"q_stride": 0}, "q_stride: got 0"),
        ({"key_stride": -1}, "key_stride: got -1"),
        ({"sink": -1}, "sink: got -1"),
        ({"window": 2**40}, "window: got"),
        ({"representative": "last"}, "representative: got last"),
        ({"branch": 3}, "branch: got 3"),
        ({"scale": 1e300}, "scale: expected"),
        ({"kv_lengths": torch.tensor([101]).int()}, r"kv_lengths: the value at \[0\] is 101"),
        ({"kv_lengths": torch.tensor([-1]).int()}, r"kv_lengths: the value at \[0\] is -1"),
        ({"block_table": torch.zeros(2, 3).int()}, "block_table: expected int32"),
    ],
)
def test_the_cpu_kernel_refuses_by_itself(options, message):
    """A call of an overload passes no other check."""
    query, key = random_inputs(Shape(Tq=100, Tk=100))[:2]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_attn.hip_select.cpp(query, key, **options)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("page, length, message", hip.NO_PAGES)
def test_no_page_is_read_that_is_not_there(backend, page, length, message):
    hip.refuses_a_page_that_is_not_there(op, backend, page, length, message)


@pytest.mark.parametrize("overload", ["default", *BACKENDS])
def test_opcheck(overload):
    query, key = random_inputs(Shape(Tq=50, Tk=70, Hq=4, Hkv=2), torch.bfloat16)[:2]
    options = (20, 16, 4, 2, 2, 5, 9, "first", 4, True, True, 0.2)
    target = getattr(torch.ops.sparse_attn.hip_select, overload)
    opcheck(target, (query, key, *options))
    pages, table, lengths = hip.paged(key, 16, [61])
    opcheck(target, (query, pages, *options, table, lengths))


def test_compiles_for_any_length():
    """One graph for all lengths; results as without compilation."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k: op(q, k, budget=32, window=20), fullgraph=True, dynamic=True, backend="eager"
    )
    for length in (200, 333):
        query, key = hip.smooth_keys(Shape(Tq=length, Tk=length))
        got, want = compiled(query, key), op(query, key, budget=32, window=20)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_no_silent_loss_of_gradient():
    query, key = random_inputs(Shape(Tq=50, Tk=50))[:2]
    assert not any(x.requires_grad for x in op(query.requires_grad_(), key))

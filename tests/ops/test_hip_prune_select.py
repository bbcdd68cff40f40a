"""The pruning stages against their definition, on every backend."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.ops.hip_prune_select import op
from sparse_attn.reference import hip_prune_select as reference
from tests import hip, hip_official
from tests.cases import DTYPES, Shape, opcheck
from tests.cases import inputs as random_inputs

ORACLES = Path(__file__).parents[1] / "oracles" / "hip"
RUNS = hip.runs_of(op)
KERNELS = [run for run in RUNS if run[0] != "reference"]
BACKENDS = sorted({run[0] for run in RUNS})
brief, dtype_for = hip.brief, hip.dtype_for
STAGES = {"chunks": [64, 32, 8], "keeps": [512, 256, 64], "q_strides": [4, 2, 1]}


def mask_of(query, key, run=("reference", None), **options):
    """[B, H', Mq, Nk] bool, after checking that the index is legal and as long as promised."""
    kv_block = options["chunks"][-1]
    merge = options.get("merge_heads", "none")
    heads = {"none": query.shape[1], "group": key.shape[1], "all": 1}[merge]
    keep = -(-options["keeps"][-1] // kv_block)
    return hip.legal_mask(op, query, key, run, options, keep, heads, kv_block, exactly=False)


@pytest.mark.parametrize("file", sorted(x.stem for x in ORACLES.glob("v12_*.npz")))
def test_the_official_selection_with_its_quirks(file):
    data = np.load(ORACLES / f"{file}.npz")
    query, key = (torch.from_numpy(data[x]).transpose(0, 1) for x in "qk")
    options = json.loads(str(data["params"]))
    got = hip_official.v12(
        query, key, **{x: options[x] for x in ("stages", "second_stage_k", "sw", "sink")}
    )
    want = torch.from_numpy(np.unpackbits(data["eff_mask"], axis=-1)).bool()[..., : key.shape[1]]
    assert want.any() and torch.equal(got, want)


def any_options(data, length):
    """Any legal options, whatever the length."""
    pick = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    chunks = pick([64, 16, 8], [32, 4], [24, 12, 12], [9, 3], [40], [16, 1], [5], [20, 10])
    q_block = pick(1, 3, 16, 64)
    return {
        "chunks": chunks, "keeps": [integer(1, 40) * chunks[-1] for _ in chunks],
        "q_strides": [integer(1, 4) for _ in chunks], "q_block": q_block,
        "sink": pick(0, 5, 16), "window": pick(0, 7, 32), "causal": pick(True, True, False),
        "representative": pick("centre", "first"), "merge_heads": pick("none", "group", "all"),
        "scale": pick(None, 0.3, -1.0),
    }  # fmt: skip


@pytest.mark.parametrize("run", KERNELS or RUNS, ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_equals_the_reference_exactly_ties_included(run, data):
    hip.equals_the_reference_ties_included(mask_of, run, data, any_options, 150)


@pytest.mark.parametrize("run", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge", ["none", "group", "all"])
def test_equals_the_reference_where_no_score_nearly_ties(run, dtype, merge):
    # descents of one chunk may take the other half; what the choice sees of it is a score
    options = {"chunks": [32, 8], "keeps": [160, 48], "q_strides": [2, 1], "q_block": 32,
               "sink": 5, "window": 20, "merge_heads": merge}  # fmt: skip
    hip.equals_the_reference_but_near_ties(mask_of, reference, run, dtype, options, 1e-2, 64)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("merge", ["none", "group", "all"])
def test_merged_heads_share_what_any_of_them_likes_most(run, merge):
    """Each head likes one place of its own; room for the places of all."""
    query = torch.eye(4, 16)[None, :, None].repeat(1, 1, 8, 1)
    key = torch.zeros(1, 2, 500, 16)
    places = [100, 180, 260, 340]
    for h, place in enumerate(places):
        key[:, h // 2, place - 12 : place + 12, h] = 1
        key[:, h // 2, place, h] = 4
    query, key = query.to(dtype_for(run)), key.to(dtype_for(run))
    options = {"chunks": [16, 8], "keeps": [64, 32], "q_strides": [1, 1], "q_block": 8,
               "window": 30, "sink": 0, "merge_heads": merge}  # fmt: skip
    mask = mask_of(query, key, run, **options)[0, :, 0]
    group = 4 // mask.shape[0]
    for h, place in enumerate(places):
        assert mask[h // group, place // 8]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_room_for_all_keeps_all(run):
    """With the sink and the window each query sees each key up to itself."""
    for *shape, q_block, chunks, sink, window in (
        (70, 70, 64, [32, 8], 16, 30), (33, 90, 5, [9, 3], 4, 7), (1, 57, 1, [8], 3, 10),
        (90, 33, 16, [64, 2], 0, 0), (20, 20, 7, [4], 50, 50),
    ):  # fmt: skip
        stages = len(chunks)
        options = {"chunks": chunks, "keeps": [1000] * stages, "q_strides": [1] * stages}
        options |= {"q_block": q_block, "sink": sink, "window": window}
        hip.sees_each_key_up_to_itself(mask_of, run, shape, chunks[-1], options)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_ties_go_to_the_lower_chunk(run):
    key = torch.ones(1, 1, 300, 16, dtype=dtype_for(run))
    query = torch.zeros(1, 1, 4, 16, dtype=dtype_for(run))
    query[:, :, 1] = -0.0
    options = {"chunks": [16, 4], "keeps": [96, 40], "q_strides": [1, 1], "q_block": 4}
    mask = mask_of(query, key, run, **options, sink=9, window=30)
    assert torch.equal(torch.arange(75)[mask.flatten()], 2 + torch.arange(10))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_keys_of_the_window_and_later_do_not_vote(run):
    options = STAGES | {"keeps": [256, 96, 32], "q_block": 32, "window": 40, "sink": 16}
    hip.ignores_keys_of_the_window_and_later(mask_of, run, options)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_batches_strides_and_repeats(run):
    options = STAGES | {"q_block": 32, "window": 17, "keeps": [256, 96, 32], "sink": 8}
    hip.knows_batches_strides_and_chunks(mask_of, run, options)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_strange_numbers(run, value):
    options = STAGES | {"keeps": [192, 64, 16], "q_block": 16, "window": 9, "sink": 0}
    hip.passes_strange_numbers_over(mask_of, run, value, options)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("page_size", [None, 16, 32, 128])
def test_pages(run, page_size):
    options = STAGES | {"keeps": [192, 64, 16], "q_block": 16, "window": 10, "sink": 4}
    hip.reads_any_pages(mask_of, run, page_size, options)


@pytest.mark.parametrize("run", [r for r in KERNELS if r[0] != "cpp"], ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_wrong_cache_is_not_left(run, page_size):
    options = STAGES | {"keeps": [64, 32, 16], "q_block": 16, "window": 10, "sink": 4}
    hip.stays_in_a_wrong_cache(op, run, page_size, options, 12)


@pytest.mark.parametrize("run", KERNELS, ids=str)
def test_every_argument_reaches_the_kernel(run):
    base = STAGES | {"keeps": [256, 96, 32], "q_block": 32, "sink": 8, "window": 24}
    changes = (
        {"chunks": [32, 16, 4]}, {"keeps": [256, 64, 40]}, {"q_block": 16},
        {"q_strides": [8, 8, 8]}, {"sink": 60}, {"window": 120}, {"representative": "first"},
        {"merge_heads": "group"}, {"merge_heads": "all"}, {"causal": False}, {"scale": -1.0},
    )  # fmt: skip
    hip.every_argument_reaches(mask_of, run, base, changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU decides the order of its threads")
def test_the_order_of_threads_does_not_show():
    options = STAGES | {"keeps": [192, 64, 32], "q_block": 32, "window": 17}
    hip.ignores_the_order_of_threads(op, options)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_choice(threads):
    hip.ignores_the_number_of_threads(op, threads, STAGES)


BAD = [
    ({"chunks": []}, "chunks: got \\[\\], expected one integer per stage"),
    (
        {"keeps": [8, 8]},
        "chunks, keeps, q_strides: expected .* per stage in each, got 3, 2 and 3",
    ),
    ({"q_strides": [1]}, "one integer per stage in each, got 3, 3 and 1"),
    ({"chunks": [64, 48, 8]}, "chunks\\[1\\]: got 48, expected 1 to 4096 that divides"),
    ({"chunks": [256, 256, 256]}, "chunks\\[-1\\]: got 256, expected 1 to 128"),
    ({"keeps": [512, 0, 8]}, "keeps\\[1\\]: got 0"),
    ({"q_strides": [1, 129, 1]}, "q_strides\\[1\\]: got 129, expected 1 to 128"),
    ({"q_block": 129}, "q_block: got 129"),
    ({"sink": -1}, "sink: got -1"),
    ({"window": -1}, "window: got -1"),
    ({"representative": "last"}, "representative: got 'last'"),
    ({"merge_heads": "some"}, "merge_heads: got 'some'"),
    ({"scale": float("nan")}, "scale: got nan"),
    ({"key": torch.randn(1, 2, 100, 32)}, "key: head_dim"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input(backend, change, message):
    query, key = random_inputs(Shape(Tq=100, Tk=100, Hq=4, Hkv=2))[:2]
    arguments = {"query": query, "key": key} | STAGES | change
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op(**arguments, backend=backend)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op.default(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunks": []}, "chunks: expected one size per stage"),
        ({"keeps": [8]}, "expected one integer per stage"),
        ({"chunks": [64, 48, 8]}, r"chunks\[1\]: got 48"),
        ({"chunks": [256, 256, 256]}, r"chunks\[-1\]: got 256"),
        ({"keeps": [512, 0, 8]}, r"keeps\[1\]: got 0"),
        ({"q_strides": [1, 1, 0]}, r"q_strides\[2\]: got 0"),
        ({"merge_heads": "some"}, "merge_heads: got some"),
        ({"window": -1}, "window: got -1"),
    ],
)
def test_the_cpu_kernel_refuses_by_itself(change, message):
    """A call of an overload passes no other check."""
    query, key = random_inputs(Shape(Tq=100, Tk=100))[:2]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_attn.hip_prune_select.cpp(query, key, **(STAGES | change))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("page, length, message", hip.NO_PAGES)
def test_no_page_is_read_that_is_not_there(backend, page, length, message):
    hip.refuses_a_page_that_is_not_there(op, backend, page, length, message, **STAGES)


@pytest.mark.parametrize("overload", ["default", *BACKENDS])
def test_opcheck(overload):
    query, key = random_inputs(Shape(Tq=50, Tk=70, Hq=4, Hkv=2), torch.bfloat16)[:2]
    args = (query, key, [16, 4], [32, 8], [2, 1], 16, 5, 9, "first", "group", True, 0.2)
    opcheck(getattr(torch.ops.sparse_attn.hip_prune_select, overload), args)


def test_compiles_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k: op(q, k, [32, 8], [128, 32], [1, 1], window=20, sink=8), fullgraph=True,
        dynamic=True, backend="eager",
    )  # fmt: skip
    for length in (200, 333):
        query, key = hip.smooth_keys(Shape(Tq=length, Tk=length))
        want = op(query, key, [32, 8], [128, 32], [1, 1], window=20, sink=8)
        assert all(torch.equal(x, y) for x, y in zip(compiled(query, key), want, strict=True))


def test_no_silent_loss_of_gradient():
    query, key = random_inputs(Shape(Tq=50, Tk=50))[:2]
    assert not any(x.requires_grad for x in op(query.requires_grad_(), key, **STAGES))

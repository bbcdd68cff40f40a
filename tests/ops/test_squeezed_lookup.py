"""The lookup against the published code's recorded scores and masks, and what the page promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.ops.squeezed_lookup import op
from sparse_attn.reference.squeezed_attend import check_runs, token_mask
from sparse_attn.reference.squeezed_lookup import cluster_scores, keep
from tests.cases import CUDA, DTYPES, call, opcheck
from tests.squeezed_cases import (
    FLAT,
    HIERARCHICAL,
    RECORDED,
    Case,
    dtype_for,
    in_float64,
    lookup_inputs,
    recorded,
    recorded_lookup,
    runs_for,
)

RUNS = runs_for(op)
REFERENCE = RUNS[0]


def mask_of(run, args):
    """Which tokens of the sorted context are kept, [B, H', Sc], after checks of the runs."""
    starts, sums, counts, tokens = call(op, run, *args)
    query, centroids, offsets, shared = args[0], args[1], args[3], args[-2]
    heads = centroids.shape[1] if shared else query.shape[1]
    assert starts.shape == sums.shape == (query.shape[0], heads, (centroids.shape[2] + 1) // 2)
    assert counts.shape == tokens.shape == starts.shape[:2]
    assert all(x.dtype == torch.int32 for x in (starts, sums, counts, tokens))
    n = int(offsets[..., -1].max())
    check_runs(starts, sums, counts, n)
    later = torch.arange(1, starts.shape[-1]) < counts[..., None]
    gap = (
        starts[..., 1:] - starts[..., :-1] - sums.diff(dim=-1, prepend=sums[..., :1] * 0)[..., :-1]
    )
    assert (gap[later] > 0).all(), "runs that touch are one"
    mask = token_mask(starts, sums, counts, n)
    assert torch.equal(mask.sum(-1, dtype=torch.int32), tokens)
    return mask


# ---- the published code ------------------------------------------------------------------------


@pytest.mark.parametrize("case", RECORDED, ids=lambda c: "-".join(map(str, c[1:])))
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_equals_the_recorded_masks(run, case):
    file, prefix, layer, mode, quantile = case
    if run[0] == "cuda" and prefix == "f32":
        pytest.skip("cuda: served in float16 and bfloat16")
    z, half = recorded(file), prefix == "f16"
    args, order = recorded_lookup(*case, torch.float16 if half else torch.float32)
    mask = mask_of(run, args)[0]
    name = f"{prefix}_l{layer}_{mode}_p{quantile}"
    want = torch.from_numpy(z[f"{name}_mask"])
    n, labels = order.shape[1], torch.from_numpy(z[f"l{layer}_labels"]).long()
    score = torch.from_numpy(z[f"{name}_score"])[:, :-1].gather(1, labels).double()
    near = (score / float(z[f"tau_{quantile}"]) - 1).abs() < (1e-2 if half else 1e-4)
    got = torch.zeros_like(mask).scatter_(1, order, mask)
    assert ((got == want[:, :n]) | near).all() and near.float().mean() < 0.1
    assert want[:, n:].all()  # the window, which the lookup knows nothing of


@pytest.mark.parametrize(
    "case", RECORDED[:12] + RECORDED[-2:], ids=lambda c: "-".join(map(str, c[1:]))
)
def test_reference_scores_are_the_recorded_ones(case):
    file, prefix, layer, mode, quantile = case
    args, _ = recorded_lookup(*case, torch.float32)
    want = torch.from_numpy(recorded(file)[f"{prefix}_l{layer}_{mode}_p{quantile}_score"])[:, :-1]
    if file == FLAT:
        got = cluster_scores(args[0], args[1], args[2])[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)
        return
    z = recorded(file)
    parents = keep(cluster_scores(args[0], args[5], args[6]), args[6], args[8])[0]
    by_key = torch.from_numpy(z["l0_l1_of_key"]).long()
    want_parents = torch.from_numpy(z[f"{prefix}_l{layer}_{mode}_p{quantile}_mask_l1"])
    assert torch.equal(parents.gather(1, by_key), want_parents[:, : by_key.shape[1]])


def test_both_files_keep_different_numbers_of_keys_per_head():
    for file in (FLAT, HIERARCHICAL):
        kept = recorded(file)["f32_l0_prefill_p0.9_mask"].sum(1)
        assert len(set(kept.tolist())) == 4


# ---- kernels against the reference -------------------------------------------------------------

CASES = [
    Case(),
    Case(Tq=1),
    Case(Tq=1, K1=7, quantile=0.6),
    Case(B=2, C=2, Tq=5, K1=9, K=70, quantile=0.5),
    Case(B=3, C=1, Tq=1, Hq=8, K=129, D=128),
    Case(Tq=2, shared=True, Hq=6),
    Case(Tq=1, shared=True, K1=5),
    Case(Tq=1, shared=True, Hq=2),  # one row per decision: the log domain
    Case(Tq=70, K=33, D=40, quantile=0.5),
    Case(Tq=1, K=1, largest=5),
    Case(Tq=17, K=2, largest=1, D=96),
    Case(B=2, C=1, Tq=1, K=300, D=64, quantile=0.9, spread=4.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_kernel_equals_reference(run, case):
    for dtype in DTYPES if run[0] == "cpp" else [dtype_for(run)]:
        args = lookup_inputs(case, dtype)
        want = mask_of(REFERENCE, in_float64(args))
        got = mask_of(run, args)
        assert torch.equal(got, want)
        if case.K > 2:
            assert 0 < want.sum() < want.numel()


@pytest.mark.parametrize("case", CASES[3:7], ids=str)
@pytest.mark.parametrize("run", CUDA[:-1], ids=str)
def test_the_order_of_threads_does_not_show(run, case):
    args = lookup_inputs(case, torch.float16)
    want = call(op, CUDA[-1], *args)
    assert all(torch.equal(x, y) for x, y in zip(call(op, run, *args), want, strict=True))


@settings(max_examples=12)
@given(
    data=st.data(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 150), st.sampled_from([8, 20, 64, 100])),
)
@pytest.mark.parametrize("run", RUNS[1:] or RUNS, ids=str)
def test_shapes(run, data, heads, sizes):
    K1 = data.draw(st.integers(0, 8))
    batch = data.draw(st.integers(1, 2))
    case = Case(
        B=batch, C=data.draw(st.sampled_from([1, batch])), Hq=heads[0], Hkv=heads[1],
        Tq=sizes[0], K=sizes[1], K1=K1, D=sizes[2] if run[0] != "cuda" else 64,
        shared=data.draw(st.booleans()), quantile=data.draw(st.sampled_from([0.0, 0.3, 0.9])),
    )  # fmt: skip
    args = lookup_inputs(case, dtype_for(run))
    assert torch.equal(mask_of(run, args), mask_of(REFERENCE, in_float64(args)))


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 4])
@pytest.mark.parametrize("K1", [0, 6])
def test_thresholds_at_the_ends(run, Tq, K1):
    """0 or less keeps all that is not empty, also where scores underflow; infinity nothing."""
    args = lookup_inputs(Case(Tq=Tq, K1=K1, spread=60.0), dtype_for(run))
    n = args[3][..., -1]
    for value in (0.0, -1.0, torch.nan):
        args[4] = torch.tensor(value)
        args[8] = args[8] if args[8] is None else torch.tensor(value)
        mask = mask_of(run, args)
        assert torch.equal(mask.sum(-1), n.repeat_interleave(2, 1).long())
    args[4] = torch.tensor(torch.inf)
    assert not mask_of(run, args).any()


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 3])
def test_a_score_at_the_threshold_is_dropped(run, Tq):
    """One cluster of one key: its score is exactly 1, whatever the query is."""
    dtype = dtype_for(run)
    args = [torch.randn(1, 1, Tq, 64).to(dtype), torch.randn(1, 1, 1, 64).to(dtype),
            torch.zeros(1, 1, 1), torch.tensor([[[0, 1]]], dtype=torch.int32)]  # fmt: skip
    rest = [None, None, None, None, False, None]
    assert not mask_of(run, [*args, torch.tensor(1.0), *rest]).any()
    assert mask_of(run, [*args, torch.tensor(0.99999), *rest]).all()


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 5])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores(run, Tq, size):
    """Scores of +-1e4 overflow nowhere: the cluster on top takes all."""
    dtype = dtype_for(run)
    query = torch.zeros(1, 2, Tq, 64, dtype=dtype)
    query[..., 0] = size / 100
    centroids = torch.zeros(1, 1, 5, 64, dtype=dtype)
    centroids[0, 0, :, 0] = torch.tensor([100.0, 50.0, 90.0, -100.0, 0.0])
    counts = torch.tensor([[[2.0, 1.0, 1.0, 3.0, 0.0]]])
    offsets = torch.tensor([[[0, 2, 3, 4, 7, 7]]], dtype=torch.int32)
    args = [query, centroids, counts.log(), offsets, torch.tensor(0.01)]
    mask = mask_of(run, [*args, None, None, None, None, False, 1.0])
    kept = [0, 1] if size > 0 else [4, 5, 6]
    assert all(mask[0, h].nonzero().flatten().tolist() == kept for h in range(2))


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 5])
@pytest.mark.parametrize("junk", [0.0, torch.nan, torch.inf, 1e30])
def test_an_empty_cluster_may_hold_anything(run, Tq, junk):
    """The published code gives NaN where real scores lie far below the 0 of an empty cluster."""
    dtype = dtype_for(run)
    query = torch.ones(1, 1, Tq, 64, dtype=dtype)
    centroids = torch.full((1, 1, 9, 64), -3.0, dtype=dtype)
    centroids[0, 0, :, 0] -= torch.arange(9)
    counts = torch.ones(1, 1, 9)
    counts[..., [0, 3, 8]] = 0
    offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()
    args = [query, centroids, counts.log(), offsets, torch.tensor(0.1)]
    args += [None, None, None, None, False, 1.0]
    want = mask_of(run, args)
    centroids[counts == 0] = junk
    assert torch.equal(mask_of(run, args), want) and 0 < want.sum() < 6


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("Tq", [1, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_keep_everything(run, Tq, value):
    args = lookup_inputs(Case(B=2, Tq=Tq), dtype_for(run))
    want = mask_of(run, args)
    args[0] = args[0].clone()
    args[0][1, 2, -1, 0] = value
    args[1] = args[1].clone()
    args[1][..., 0] = args[1][..., 0].abs()
    args[1][:, :, 0] = args[1][:, :, 0].abs() + 1
    mask = mask_of(run, args)
    assert mask[1, 2, : args[3][0, 1, -1]].all()
    assert not mask[1, 0].all() and want.shape == mask.shape


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_batches_strides_and_repeats(run):
    args = lookup_inputs(Case(B=3, C=1, Tq=3, K=50), dtype_for(run))
    whole = mask_of(run, args)
    assert torch.equal(whole, mask_of(run, args))
    for b in range(3):
        alone = [args[0][b : b + 1].contiguous(), *args[1:]]
        assert torch.equal(mask_of(run, alone)[0], whole[b])
    wide = [args[0].contiguous(), args[1].repeat(3, 1, 1, 1).transpose(2, 3).contiguous().mT]
    wide += [args[2].expand(3, -1, -1), args[3].expand(3, -1, -1), *args[4:]]
    assert torch.equal(mask_of(run, wide), whole)


# ---- the operator ------------------------------------------------------------------------------

BAD = [
    (0, lambda x: x[0], "query: expected 4 dimensions"),
    (0, lambda x: x.int(), "query: expected dtype"),
    (0, lambda x: x[:, :3], "query: 3 heads"),
    (1, lambda x: x[..., :-1], "centroids: head_dim"),
    (1, lambda x: x.repeat(3, 1, 1, 1), "centroids: batch size is 3, expected 2 as in query, or 1"),
    (1, lambda x: x.double(), "centroids: dtype"),
    (2, lambda x: x.double(), "log_counts: expected dtype"),
    (2, lambda x: x[..., 1:], "log_counts: shape"),
    (3, lambda x: x.long(), "offsets: expected dtype"),
    (3, lambda x: x[..., 1:], "offsets: shape"),
    (4, lambda x: x[None], "threshold: expected 0 dimensions"),
    (4, lambda x: x.double(), "threshold: expected dtype"),
    (5, lambda x: None, "coarse_centroids: got None"),
    (6, lambda x: x.half(), "coarse_log_counts: expected dtype"),
    (7, lambda x: x[..., 1:], "children: shape"),
    (8, lambda x: None, "coarse_threshold: got None"),
    (10, lambda x: float("inf"), "scale: got inf"),
]


@pytest.mark.parametrize("backend", [run[0] for run in RUNS if run[1] in (None, 3, "portable")])
@pytest.mark.parametrize("at, change, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input(backend, at, change, message):
    args = lookup_inputs(Case(B=2, K1=4))
    args[at] = change(args[at])
    with pytest.raises((ValueError, TypeError), match=message):
        op(*args, backend=backend)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        op.default(*args)


@pytest.mark.parametrize("backend", sorted({run[0] for run in RUNS} & {"cpp", "reference"}))
@pytest.mark.parametrize("at, name", [(3, "offsets"), (7, "children")])
@pytest.mark.parametrize("place, value", [(0, 1), (2, 10**6), (-1, -5)])
def test_illegal_lists_are_refused_on_the_cpu(backend, at, name, place, value):
    args = lookup_inputs(Case(B=2, K=90, K1=4))
    op(*args, backend=backend)
    args[at][0, 1, place] = value
    with pytest.raises(RuntimeError, match=f"{name}: rows must ascend from 0"):
        op(*args, backend=backend)


@pytest.mark.parametrize("overload", ["default", *sorted({run[0] for run in RUNS})])
@pytest.mark.parametrize("K1", [0, 4])
def test_opcheck(overload, K1):
    args = lookup_inputs(Case(B=2, K1=K1, shared=K1 > 0), torch.bfloat16)
    args[-1] = 0.2
    opcheck(getattr(torch.ops.sparse_attn.squeezed_lookup, overload), args)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_argument_reaches_the_kernel(run):
    args = lookup_inputs(Case(Tq=4, K=60, K1=7, quantile=0.5), dtype_for(run))
    changes = [{}, {8: args[8] * 1.3}, {4: args[4] * 1.5}, {9: True}, {10: 0.5},
               {5: None, 6: None, 7: None, 8: None}]  # fmt: skip
    found = []
    for change in changes:
        changed = [change.get(i, x) if i in change else x for i, x in enumerate(args)]
        mask = mask_of(run, changed)
        want = mask_of(REFERENCE, changed)
        assert (mask != want).float().mean() < 0.02
        found.append(int(mask.sum()) + 10000 * mask.shape[1])
    assert len(set(found)) == len(found), found


def test_compiles_whole_and_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, dynamic=True, backend="eager")
    for K, Tq in ((40, 3), (55, 4)):
        args = lookup_inputs(Case(K=K, Tq=Tq))
        want = op(*args)
        got = compiled(*args)
        assert torch.equal(got[2], want[2]) and torch.equal(got[3], want[3])


def test_no_silent_loss_of_gradient():
    args = lookup_inputs(Case())
    args[0] = args[0].detach().requires_grad_()
    assert not any(x.requires_grad for x in op(*args))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("Tq", [1, 200])
def test_threads_do_not_change_the_choice(threads, Tq):
    args = lookup_inputs(Case(Tq=Tq, K=700, K1=20), torch.bfloat16)
    before = torch.get_num_threads()
    want = op(*args)
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(want, op(*args), strict=True))
    finally:
        torch.set_num_threads(before)

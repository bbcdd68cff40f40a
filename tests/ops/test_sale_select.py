"""The three steps of SALE's selection in one call, and what it promises of the exact scores."""

from typing import NamedTuple

import pytest
import torch

from bench.inputs import gen
from sparse_attn import BlockIndex
from sparse_attn.ops import _sale as sale
from sparse_attn.ops.sale_estimate import op as estimate
from sparse_attn.ops.sale_quantize import op as quantize
from sparse_attn.ops.sale_select import op
from sparse_attn.ops.sale_threshold import _run as threshold_of
from sparse_attn.ops.sale_threshold import op as threshold_op
from sparse_attn.reference.sale_estimate import sale_estimate
from sparse_attn.reference.sale_quantize import sale_quantize, unpack
from tests.cases import CUDA, Shape, call, inputs, opcheck
from tests.cases import RUNS as ALL
from tests.ops.test_sale_estimate import BACKENDS, regions

RUNS = [run for run in [*ALL, CUDA[-1]] if run[0] in BACKENDS]


def brief(run, length, short):
    """A length, or a shorter one for the interpreter and the executor, which are slow."""
    return short if run[0] in ("triton", "cuda") else length


def structured(kind, length, dtype=torch.bfloat16):
    """query, key, value of bench/inputs.py as [1, H, T, D]."""
    return tuple(torch.from_numpy(x).transpose(1, 2).to(dtype) for x in gen(7, length, kind))


def mask_of(run, query, key, tau, **options):
    threshold = torch.full((query.shape[1],), tau) if isinstance(tau, float) else tau
    indices, counts = call(op, run, query, key, threshold, **options)
    BlockIndex(indices, counts, 64, 32).validate(query.shape[2], key.shape[2])
    return BlockIndex(indices, counts, 64, 32).to_mask(key.shape[2])


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_is_the_three_steps(run):
    dtype = torch.bfloat16 if run[0] == "cuda" else torch.float32
    query, key, _ = inputs(Shape(B=2, Hq=4, Hkv=2, Tq=100, Tk=230), dtype, spread=3.0)
    threshold, frozen = torch.tensor([0.01, 0.1, 0.0, 1.0]), torch.randn(2, 2, 64)
    for mean, scale in ((None, None), (frozen, 0.2), (None, -0.2)):
        got = call(op, run, query, key, threshold, 32, 16, 40, 16, False, True, scale, mean)
        q, c = (-query, -scale) if scale and scale < 0 else (query, scale)
        q_codes, q_step, q_mean = call(quantize, run, q, None, "query")
        k_codes, k_step, k_mean = call(quantize, run, key, mean, "key", 16)
        (theta,) = call(threshold_op, run, q, key, k_mean, threshold, 32, 16, 40, 16, True, c)
        bias = sale.dots(key, k_mean, q_mean.unflatten(1, (2, 2)))
        args = (q_codes, q_step, k_codes, k_step, bias, theta, 32, 16, 40, 16)
        for x, y in zip(got, call(estimate, run, *args), strict=True):
            assert torch.equal(x, y)


def scores_and_bound(query, key, key_mean=None, groups_of=("query", "key")):
    """Estimated and exact q . k', float64 [Hq, Tq, Tk], and the proven bound of their difference.

    docs/methods/sale.md: |x - q . k'| <= s_q / 2 * |k'|_1 + s_k / 2 * |s_q q4|_1 + s_q s_k / 2, and
    float32's rounding.
    """
    q4, q_step, q_mean = sale_quantize(query, None, groups_of[0])
    k4, k_step, k_mean = sale_quantize(key, key_mean, groups_of[1])
    groups = query.shape[1] // key.shape[1]
    bias = sale.dots(key, k_mean, q_mean.unflatten(1, (-1, groups)))[0].double()
    place = lambda T, group: sale.group_of(torch.arange(T), group, 32)  # noqa: E731
    wide = lambda x: x[0].double().repeat_interleave(groups, 0)  # noqa: E731
    sq = q_step[0][:, place(query.shape[2], groups_of[0])].double()[..., None]
    sk = wide(k_step)[:, place(key.shape[2], groups_of[1])][:, None]
    codes_q, codes_k = unpack(q4)[0].double(), wide(unpack(k4))
    centred = wide(key) - wide(k_mean)[:, None]
    exact = query[0].double() @ centred.mT
    a = codes_q @ codes_k.mT
    unit = sq * sk
    estimated = unit * (a + torch.round(bias[:, None] / unit))
    bound = sq / 2 * centred.abs().sum(-1)[:, None] + sk / 2 * (sq * codes_q.abs().sum(-1, True))
    rounding = 2.0**-20 * (
        unit * a.abs() + bias.abs()[:, None] + query[0].double().abs() @ centred.abs().mT
    )
    return estimated, exact, bound + unit / 2 + rounding


class Margins(NamedTuple):
    """By how much the best pair of a block exceeds its bar: float64 [Hq, Mq, Nk], middle only.

    Elsewhere 0, no choice. Of the estimate, and by the proven bound at least and at most.
    """

    estimate: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor


def margins(query, key, tau, key_mean=None):
    estimated, exact, bound = scores_and_bound(query, key, key_mean)
    Tq, Tk = exact.shape[1:]
    mean = key.float().mean(2) if key_mean is None else key_mean
    threshold = torch.full((query.shape[1],), tau)
    theta = threshold_op(query, key, mean, threshold, backend="reference")[0].double()[..., None]
    middle = torch.zeros(-(-Tq // 64), -(-Tk // 32), dtype=torch.bool)
    for m, (low, begin, _) in enumerate(regions(Tq, Tk, 64, 32, 128, 32)):
        middle[m, low:begin] = True

    def best(x):
        x = torch.nn.functional.pad(x - theta, (0, -Tk % 32, 0, -Tq % 64), value=-torch.inf)
        x = x.unflatten(2, (-1, 32)).unflatten(1, (-1, 64)).amax((2, 4))
        return torch.where(middle, x, 0.0)

    return Margins(best(estimated), best(exact - bound), best(exact + bound))


TIE = 2e-3  # rounding of a bar and of a score, in units of scores of some tens


def assert_follows(mask, margin):
    """A block is kept where its estimate exceeds the bar, ties aside, which are few."""
    clear = margin.estimate.abs() > TIE
    assert torch.equal(mask[0][clear], margin.estimate[clear] > 0)
    assert clear.sum() > 0.99 * (margin.estimate != 0).sum()


@pytest.mark.parametrize("groups_of", [("query", "key"), ("token", "token")], ids=str)
@pytest.mark.parametrize("kind", ["mixed", "sharp", "flat", "peaky"])
def test_error_bound(kind, groups_of):
    query, key, _ = structured(kind, 900, torch.float32)
    for offset in (0.0, 2.0):  # a mean of the queries and of the keys
        shift = offset * torch.randn(2, 64)
        moved = query + shift[0], key + shift[1]
        estimated, exact, bound = scores_and_bound(*moved, groups_of=groups_of)
        assert ((estimated - exact).abs() <= bound).all()
        assert (estimated - exact).abs().mean() < 0.25 * exact.abs().mean()


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "peaky"])
def test_what_is_left_out_is_unimportant_by_the_bound(run, kind):
    """No pair outside the list exceeds its bar by more than the proven error of its estimate."""
    length = brief(run, 800, 420)
    query, key, _ = structured(kind, length)
    tau = 0.02
    mask = mask_of(run, query, key, tau)[0]
    estimated, exact, bound = scores_and_bound(query, key)
    threshold = torch.full((4,), tau)
    mean = key.float().mean(2)
    theta = threshold_op(query, key, mean, threshold, backend="reference")[0].double()[..., None]
    tokens = mask.repeat_interleave(64, 1)[:, :length].repeat_interleave(32, 2)[..., :length]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    left_out = seen & ~tokens
    slack = 1e-3 + 1e-5 * theta.abs()  # theta is rounded too
    assert (exact - theta - bound - slack)[left_out].max() <= 0
    assert 0.05 < tokens[:, seen].float().mean() < 0.95
    kept = (exact - theta + bound + slack).masked_fill(~seen, -torch.inf)
    pad = torch.nn.functional.pad(kept, (0, -length % 32, 0, -length % 64), value=-torch.inf)
    best = pad.unflatten(2, (-1, 32)).unflatten(1, (-1, 64)).amax((2, 4))
    for m, (low, begin, _) in enumerate(regions(length, length, 64, 32, 128, 32)):
        chosen = mask[:, m, low:begin]
        assert (best[:, m, low:begin][chosen] >= 0).all(), "nothing is kept without a reason"


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_tau_zero_is_every_visible_block(run):
    for shape in ((300, 300), (70, 301), (1, 64)):
        query, key, _ = inputs(Shape(Tq=shape[0], Tk=shape[1]), torch.bfloat16)
        want = BlockIndex.full(*shape, 64, 32).to_mask(shape[1])
        for tau in (0.0, 9e-6):
            assert torch.equal(mask_of(run, query, key, tau), want.expand(1, 2, -1, -1))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_constant_added_to_keys_or_queries(run):
    """To keys: nothing changes. To queries: importance does, and the estimate follows it."""
    length = brief(run, 1000, 420)
    query, key, _ = structured("mixed", length, torch.float32)
    key = torch.round(key * 16) / 16  # with the constant below 8 bits: every sum is exact
    constant = torch.round(torch.randn(64) * 4) / 4
    assert (key.abs().amax() + constant.abs().amax()) < 16
    if run[0] == "cuda":
        query, key = query.bfloat16(), key.bfloat16()
    moved_key = key + constant.to(key)
    plain, shifted = mask_of(run, query, key, 0.02), mask_of(run, query, moved_key, 0.02)
    of_plain, of_shifted = margins(query, key, 0.02), margins(query, moved_key, 0.02)
    assert_follows(plain, of_plain)
    assert_follows(shifted, of_shifted)
    change = (of_plain.estimate - of_shifted.estimate).abs()  # a mean rounds, a code follows
    clear = of_plain.estimate.abs() > TIE + change
    assert torch.equal(plain[0][clear], shifted[0][clear])
    assert (~clear & (of_plain.estimate != 0)).float().mean() < 0.01
    assert 0.1 < plain.float().mean() < 0.5
    # a constant c added to all queries adds c . k' to every score: as if that were a bias of keys
    moved = query + 0.5 * constant.to(query)
    estimated, exact, bound = scores_and_bound(moved, key)
    assert ((estimated - exact).abs() <= bound).all()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_shared_lists_are_the_union_over_a_group(run):
    query, key, _ = structured("mixed", brief(run, 1000, 300))
    each, shared = (mask_of(run, query, key, 0.02, share_kv_heads=s) for s in (False, True))
    assert torch.equal(shared, each.unflatten(1, (2, 2)).any(2))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_chunk_with_frozen_means_chooses_alike(run):
    """A chunk of queries has a mean of its own: near ties may differ, the rest may not."""
    length = brief(run, 1500, 400)
    query, key, _ = structured("mixed", length)
    frozen = key[:, :, : length // 2].float().mean(2)
    part = query[:, :, 128:]
    masks, found = [], []
    for q, mean in ((query, frozen), (part, frozen), (part, None)):
        masks.append(mask_of(run, q, key, 0.02, key_mean=mean))
        found.append(margins(q, key, 0.02, mean))
        assert_follows(masks[-1], found[-1])
    masks[0], found[0] = masks[0][:, :, 2:], Margins(*(x[:, 2:] for x in found[0]))
    for i, j in ((0, 1), (1, 2)):  # any constant is as good as the mean
        above = (found[i].least > TIE) & (found[j].least > TIE)
        below = (found[i].most < -TIE) & (found[j].most < -TIE)
        assert above.any() and below.any()
        assert masks[i][0][above].all() and masks[j][0][above].all()
        assert not masks[i][0][below].any() and not masks[j][0][below].any()


@pytest.mark.parametrize("kind", ["mixed", "sharp"])
def test_the_published_reference_region(kind):
    """Its 4 to 7 local blocks and its middle of whole fours; it hardly moves what is chosen."""
    query, key, _ = structured(kind, 1500, torch.float32)
    place = (1500, 1500, 64, 32, 128, 32)
    ours, theirs = (sale.grid(*place, "cpu", official=o) for o in (False, True))
    n, L = theirs.seen, theirs.seen - theirs.local
    whole = n > 7
    assert set(L[whole].tolist()) == {5, 6, 7} and ((n - 1 - L)[whole] % 4 == 0).all()
    k_mean, threshold = key.mean(2), torch.full((4,), 0.004)
    q_codes, q_step, q_mean = sale_quantize(query, None, "query")
    k_codes, k_step, _ = sale_quantize(key, k_mean, "key")
    bias = sale.dots(key, k_mean, q_mean.unflatten(1, (2, 2)))
    masks = []
    for official in (False, True):
        bar = (query, key, k_mean, threshold, *place[2:], True, None, official)
        theta = threshold_of("reference", *bar)
        codes = (q_codes, q_step, k_codes, k_step, bias, theta, *place[2:])
        lists = sale_estimate(*codes, official=official)
        masks.append(BlockIndex(*lists, 64, 32).to_mask(1500)[0])
    assert torch.equal(masks[0], mask_of(("reference", None), query, key, 0.004)[0])
    block = torch.arange(masks[0].shape[2])
    own = (block >= theirs.local[:, None]) & (block < n[:, None])
    assert masks[1][:, own].all() and masks[1][..., 0].all()
    middle = (block > 0) & (block < torch.minimum(ours.local, theirs.local)[:, None])
    kept = [mask[:, middle].float().mean() for mask in masks]
    differ = (masks[0] != masks[1])[:, middle].float().mean()
    assert 0.2 < kept[1] <= kept[0] < 0.8 and 0 < differ < 0.05


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_chunk_with_both_means_chooses_the_same(run):
    query, key, _ = structured("mixed", brief(run, 700, 270))
    means = {"key_mean": key[:, :, :128].float().mean(2),
             "query_mean": query[:, :, :128].float().mean(2)}  # fmt: skip
    whole = mask_of(run, query, key, 0.02, **means)
    assert torch.equal(mask_of(run, query[:, :, 128:], key, 0.02, **means), whole[:, :, 2:])
    means["query_mean"] = -means["query_mean"]  # a scale below 0 turns queries and their mean
    scale = -(query.shape[3] ** -0.5)
    assert torch.equal(mask_of(run, -query, key, 0.02, scale=scale, **means), whole)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_nan_is_kept(run):
    dtype = torch.bfloat16 if run[0] == "cuda" else torch.float32
    query, key, _ = inputs(Shape(Tq=300, Tk=300), dtype)
    key[:, :, 50] = torch.nan
    want = BlockIndex.full(300, 300, 64, 32).to_mask(300)
    assert torch.equal(mask_of(run, query, key, 0.5), want.expand(1, 2, -1, -1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"threshold": torch.ones(3)}, "threshold: number of heads is 3, expected 2"),
        ({"share_kv_heads": 1}, "share_kv_heads: got 1, expected True or False"),
        ({"kv_block": 8}, "kv_block: got 8, expected one of"),
        ({"causal": False}, "causal: SALE is defined for causal prefill"),
        ({"scale": float("inf")}, "scale: got inf, expected a number"),
        ({"key_mean": torch.zeros(1, 1, 32)}, "key_mean: shape is"),
        ({"query_mean": torch.zeros(1, 1, 64)}, r"query_mean: shape is .* expected \(1, 2, 64\)"),
        ({"local": 1.5}, "local: got 1.5, expected an integer"),
    ],
)
def test_bad_input(change, message):
    query, key, _ = inputs(Shape())
    with pytest.raises((ValueError, TypeError), match=message):
        op(**{"query": query, "key": key, "threshold": torch.ones(2), **change})


@pytest.mark.parametrize("overload", ["default", *(b for b in BACKENDS if b != "cuda")])
def test_opcheck(overload):
    query, key, _ = inputs(Shape(Tq=60, Tk=90), torch.bfloat16)
    args = (query, key, torch.full((2,), 0.1), 32, 16, 20, 5, True)
    args = (*args, True, None, *(torch.zeros(1, h, 64) for h in (1, 2)))
    opcheck(getattr(torch.ops.sparse_attn.sale_select, overload), args)


def test_compiles_for_any_length():
    run = torch.compile(lambda *args: op(*args), fullgraph=True, dynamic=True)
    for Tq, Tk in ((70, 70), (133, 200)):
        args = (*inputs(Shape(Tq=Tq, Tk=Tk))[:2], torch.full((2,), 0.3))
        assert all(torch.equal(x, y) for x, y in zip(run(*args), op(*args), strict=True))

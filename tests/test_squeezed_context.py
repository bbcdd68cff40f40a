"""The offline stage: clusters, thresholds, files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_attn.ops.squeezed_lookup import op
from sparse_attn.reference.squeezed_attend import token_mask
from sparse_attn.reference.squeezed_lookup import cluster_scores
from sparse_attn.squeezed import SqueezedContext
from sparse_attn.squeezed import kmeans as module
from sparse_attn.squeezed.calibrate import threshold_of, weighted_quantile
from sparse_attn.squeezed.kmeans import kmeans, segmented, split_giants, sums_by_label
from sparse_attn.squeezed.pages import moved
from tests.squeezed_cases import FLAT, HIERARCHICAL, recorded


def topics(heads, n, dim=32, count=12, seed=0):
    """Keys around a few directions, of different lengths: there is something to cluster."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(heads, count, dim, generator=g)
    which = torch.randint(count, (heads, n), generator=g)
    keys = centres.gather(1, which[..., None].expand(-1, -1, dim))
    keys = keys + 0.4 * torch.randn(heads, n, dim, generator=g)
    return keys * (0.5 + torch.rand(heads, n, 1, generator=g))


def tensors(n=700, layers=2, Hq=4, Hkv=2, dim=32, window=20, dtype=torch.float32, spread=2.0):
    keys = [topics(Hkv, n, dim, seed=i)[None].to(dtype) for i in range(layers)]
    values = [torch.randn(1, Hkv, n, dim).to(dtype) for _ in range(layers)]
    queries = [
        (spread * topics(Hq, window, dim, seed=9 + i))[None].to(dtype) for i in range(layers)
    ]
    return keys, values, queries


def build(*args, **options):
    given = {"window": 20, "progress": False, "iterations": 8} | options
    return SqueezedContext.build(*args, **given)


# ---- K-means -----------------------------------------------------------------------------------


def objective(x, labels, k):
    sums, counts = sums_by_label(x, labels, k)
    means = sums / counts.clamp(min=1)[..., None]
    return (x - means.gather(1, labels[..., None].expand_as(x))).square().sum((1, 2))


def test_kmeans_is_seeded_batched_and_better_than_its_start():
    x = F.normalize(topics(3, 900), dim=-1)
    run = lambda n, part=slice(None): kmeans(  # noqa: E731
        x[part], 45, n, torch.Generator().manual_seed(3)
    )
    one, again, short = run(20), run(20), run(1)
    assert torch.equal(one, again)
    assert (objective(x, one, 45) < objective(x, short, 45)).all()
    assert all(len(row.unique()) == 45 for row in one)


def test_the_objective_is_that_of_scikit_learn():
    """Recorded: KMeans(75, n_init=1, random_state=0) of scikit-learn 1.9.1, until it converged."""
    x = F.normalize(topics(1, 1500), dim=-1)
    for seed in range(3):
        labels = kmeans(x, 75, 20, torch.Generator().manual_seed(seed))
        assert objective(x, labels, 75).item() < 1.02 * 196.8015


def test_the_start_holds_few_scores_at_once(monkeypatch):
    """Distances are computed by parts of the rows, and are the same."""
    x, centres = torch.randn(2, 300, 16), torch.randn(2, 10, 16)
    half, sizes, whole = x.square().sum(-1) / 2, [], torch.baddbmm
    want = torch.cdist(x.double(), centres.double()).square().amin(-1) / 2

    def watched(*args, **options):
        out = whole(*args, **options)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, "baddbmm", watched)
    monkeypatch.setattr(module, "SCORES", 1000)
    got = module.distances(x, half, centres)
    assert len(sizes) == 6 and max(sizes) <= 1000
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["copies", "zeros", "one", "more clusters than keys"])
def test_kmeans_in_corners(case):
    x = F.normalize(topics(2, 60), dim=-1)
    k = 1 if case == "one" else 20
    if case == "copies":
        x = x[:, :3].repeat(1, 20, 1)
    if case == "zeros":
        x = torch.zeros_like(x)
    if case == "more clusters than keys":
        x = x[:, :7]
    labels = kmeans(x, k, 5, torch.Generator().manual_seed(0))
    assert labels.shape == x.shape[:2] and labels.min() >= 0 and labels.max() < k
    if case == "copies":
        assert objective(x, labels, k).max() < 1e-6


def test_segments_share_the_clusters_out():
    x = F.normalize(topics(2, 1000), dim=-1)
    labels, k = segmented(x, 50, 256, 5, torch.Generator().manual_seed(0))
    assert k == 50 and labels.max() < 50
    for i in range(4):
        part = labels[:, i * 250 : (i + 1) * 250]
        assert 12 * i <= part.min() and part.max() <= 13 * (i + 1)


def test_giants_are_split():
    """One direction takes two thirds of the keys, half of them copies of one key."""
    x = topics(2, 600)
    x[:, :200] = x[:, :1]
    x[:, 200:400] = x[:, :1] + 0.05 * torch.randn(2, 200, 32)
    x = F.normalize(x, dim=-1)
    labels = kmeans(x, 10, 10, torch.Generator().manual_seed(0))
    assert max(torch.bincount(row).max() for row in labels) > 240
    split, k = split_giants(x, labels, 10, 2.0, torch.Generator().manual_seed(0))
    counts = torch.stack([torch.bincount(row, minlength=k) for row in split])
    assert counts.max() <= 120 and k == counts.shape[1] <= 22
    for row, new in zip(labels, split, strict=True):  # only giants changed
        small = torch.bincount(row, minlength=10)[row] <= 120
        assert torch.equal(row[small], new[small])


# ---- the published code ------------------------------------------------------------------------


def recorded_scores(file):
    z = recorded(file)
    for layer in range(int(z["L"])):
        query = torch.from_numpy(z[f"l{layer}_q_obs"])[None].double()
        centroids = torch.from_numpy(z[f"l{layer}_centroids"])[None].double()
        counts = torch.from_numpy(z[f"l{layer}_counts"]).long()
        yield cluster_scores(query, centroids, counts.double().log()[None])[0], counts


def test_scores_and_thresholds_are_the_recorded_ones():
    z = recorded(FLAT)
    scores, counts = zip(*recorded_scores(FLAT), strict=True)
    for layer, x in enumerate(scores):
        want = torch.from_numpy(z[f"l{layer}_offline_score_ref64"])
        torch.testing.assert_close(x, want, rtol=1e-6, atol=0)
    for q in (0.5, 0.7, 0.8, 0.9):
        assert threshold_of(scores, counts, q, "fine") == pytest.approx(
            float(z[f"tau_{q}"]), rel=1e-6
        )


def test_thresholds_of_two_levels_are_the_recorded_ones():
    z = recorded(HIERARCHICAL)
    ((scores, counts),) = recorded_scores(HIERARCHICAL)
    parent = torch.from_numpy(z["l0_l1_of_l2"]).long()
    below = torch.zeros(4, 40, dtype=torch.long).scatter_add(1, parent, counts)
    coarse = torch.from_numpy(z["l0_l1_centroids"])[None].double()
    query = torch.from_numpy(z["l0_q_obs"])[None].double()
    above = cluster_scores(query, coarse, below.double().log()[None])[0]
    for q in (0.5, 0.7, 0.8, 0.9):
        for name, s, n in (("tau", scores, counts), ("tau1", above, below)):
            want = float(z[f"{name}_{q}"])
            assert threshold_of([s], [n], q, "x") == pytest.approx(want, rel=1e-6)


def test_raw_means_are_the_recorded_centroids():
    z = recorded(FLAT)
    keys = torch.from_numpy(z["l0_k"])[:, : int(z["S"]) - int(z["W"])]
    sums, counts = sums_by_label(keys, torch.from_numpy(z["l0_labels"])[:2].long(), int(z["K"]))
    assert torch.equal(counts, torch.from_numpy(z["l0_counts"])[:2].long())
    want = torch.from_numpy(z["l0_centroids"])[:2]
    torch.testing.assert_close(sums / counts[..., None], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q", [0.0, 0.31, 0.5, 0.9, 1.0])
def test_weighted_quantile_is_the_quantile_of_the_repeated_values(q):
    values, weights = torch.rand(50, dtype=torch.float64), torch.randint(0, 5, (50,))
    got = weighted_quantile([values[:20], values[20:]], [weights[:20], weights[20:]], q)
    assert got == pytest.approx(np.quantile(values.repeat_interleave(weights).numpy(), q))


# ---- a context ---------------------------------------------------------------------------------

OPTIONS = [
    {}, {"coarse": 0.01}, {"shared": True}, {"segment": 200}, {"split_above": None},
    {"coarse": 0.02, "shared": True, "segment": 300, "clusters": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_build(options):
    keys, values, queries = tensors()
    context = build(keys, values, queries, **options)
    assert context.length == 700 and len(context.layers) == 2
    for layer, key, value in zip(context.layers, keys, values, strict=True):
        for name, x in (("key", key), ("value", value)):
            at = layer.order.long()[..., None].expand(-1, -1, -1, 32)
            assert torch.equal(getattr(layer, name), x[:, :, :680].gather(2, at))
            assert torch.equal(getattr(layer, f"window_{name}"), x[:, :, 680:])
        assert torch.equal(layer.order.sort(-1).values[0, 0], torch.arange(680, dtype=torch.int32))
        sizes = layer.offsets.diff(dim=-1)
        assert torch.equal(layer.log_counts.exp().round().int(), sizes)
        ends = layer.offsets[0, 0].tolist()
        for j in (0, len(ends) // 2):
            members = layer.key[0, 0, ends[j] : ends[j + 1]]
            if len(members):
                torch.testing.assert_close(layer.centroids[0, 0, j], members.mean(0))
        assert layer.scores.shape[0] == (2 if options.get("shared") else 4)
        if "coarse" in options:
            assert layer.children[0, :, -1].tolist() == [layer.centroids.shape[2]] * 2
            below = layer.offsets.gather(-1, layer.children.long()).diff(dim=-1)
            assert torch.equal(layer.coarse_log_counts.exp().round().int(), below)
            one = slice(*layer.children[0, 1, 2:4].tolist())
            filled = sizes[0, 1, one] > 0
            mean = layer.centroids[0, 1, one][filled].mean(0)
            torch.testing.assert_close(layer.coarse_centroids[0, 1, 2], mean)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_the_calibration_queries_keep_what_was_asked_for(options, sparsity):
    """Over all layers and heads together; one head alone keeps more or less."""
    keys, values, queries = tensors(layers=3)
    context = build(keys, values, queries, sparsity=sparsity, **options)
    if "coarse" in options:  # the fine threshold was calibrated without a coarse level
        context = context.with_sparsity(sparsity, 0.0)
    shares = []
    for layer, query in zip(context.layers, queries, strict=True):
        nothing = query.new_zeros(1, 2, 0, 32)
        *_, tokens = layer.attention(query, nothing, nothing)
        shares.append(tokens / 680)
    mean = torch.cat(shares).mean().item()
    assert mean == pytest.approx(1 - sparsity, abs=0.03)
    if sparsity:
        assert torch.cat(shares).std() > 0.01


def test_another_sparsity_clusters_nothing_again():
    context = build(*tensors(), sparsity=0.5)
    other = context.with_sparsity(0.9)
    assert other.threshold > context.threshold and other.parameters.sparsity == 0.9
    assert other.layers[0].key is context.layers[0].key
    assert other.threshold == build(*tensors(), sparsity=0.9).threshold


def test_a_context_may_be_tiny():
    context = build(*tensors(n=21), clusters=0.05)
    layer = context.layers[0]
    assert layer.key.shape[2] == 1 and layer.centroids.shape[2] == 1
    assert layer.offsets.tolist() == [[[0, 1], [0, 1]]]


def test_zero_and_repeated_keys():
    keys, values, queries = tensors()
    keys[0][:, :, :300] = 0
    keys[1][:, :, 5:] = keys[1][:, :, 5:6]
    for options in ({}, {"coarse": 0.01}):
        context = build(keys, values, queries, **options)
        out, _, _ = context.layers[0].attention(
            queries[0], keys[0][:, :, 680:], values[0][:, :, 680:]
        )
        assert out.isfinite().all()


def test_keys_are_clustered_by_direction():
    """Not by length, though it differs a thousandfold."""
    direction = torch.arange(200) % 2
    keys = F.one_hot(direction, 32).float() + 0.01 * torch.randn(200, 32)
    keys = (keys * 10.0 ** torch.randint(-1, 3, (200, 1)))[None, None]
    context = build([keys], [keys], [keys[:, :, -20:]], clusters=2 / 180, split_above=None)
    layer = context.layers[0]
    sorted_so = direction[layer.order[0, 0].long()]
    assert layer.offsets.tolist() == [[[0, 90, 180]]]
    assert (sorted_so[:90] == sorted_so[0]).all() and (sorted_so[90:] == 1 - sorted_so[0]).all()


@pytest.mark.parametrize("options", [{}, {"coarse": 0.01, "coarse_sparsity": 0.5}], ids=str)
def test_a_threshold_that_underflows_does_not_keep_everything(options):
    """Most keys have a calibration score of 0 in float32; a threshold of 0 is for sparsity 0."""
    keys, values, queries = tensors(n=1500)
    queries = [q * 1e5 for q in queries]
    context = build(keys, values, queries, sparsity=0.8, **options)
    nothing = queries[0].new_zeros(1, 2, 0, 32)
    for layer, query in zip(context.layers, queries, strict=True):
        assert 0 < layer.threshold < 1e-37
        if options:
            assert layer.coarse_threshold > 0
        *_, tokens = layer.attention(query, nothing, nothing)
        assert 0 < tokens.max() < 0.25 * 1480
    context = context.with_sparsity(0.0)
    *_, tokens = context.layers[0].attention(queries[0], nothing, nothing)
    assert (tokens == 1480).all() and context.threshold == 0


@pytest.mark.parametrize("factor", [11.0, 12.0, 1000.0])
def test_large_scores_have_a_threshold(factor):
    """The published code saves NaN from a score of 89 on and then drops the whole context."""
    keys, values, queries = tensors()
    context = build(keys, values, [q * factor for q in queries])
    assert 0 < context.threshold < 1


def test_float16_overflows_neither():
    keys, values, queries = tensors(dtype=torch.float16)
    context = build([k * 300 for k in keys], values, [q * 300 for q in queries])
    assert 0 < context.threshold <= 1
    assert context.layers[0].centroids.dtype == torch.float16


@pytest.mark.parametrize("where", ["keys", "queries"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_threshold_that_is_not_finite_is_an_error(where, value):
    keys, values, queries = tensors()
    (keys if where == "keys" else queries)[1][0, 1, 3, 0] = value
    with pytest.raises(ValueError, match="scores of layer 1 are not finite"):
        build(keys, values, queries)


BAD = [
    ({"clusters": 0}, "clusters: got 0"),
    ({"clusters": 1.5}, "clusters: got 1.5"),
    ({"coarse": 0.05}, "coarse: got 0.05, expected above 0 and less than clusters"),
    ({"window": 0}, "window: got 0"),
    ({"sparsity": 1.0}, "sparsity: got 1.0"),
    ({"coarse_sparsity": -0.1}, "coarse_sparsity: got -0.1"),
    ({"segment": 0}, "segment: got 0"),
    ({"iterations": 0}, "iterations: got 0"),
    ({"split_above": 0.5}, "split_above: got 0.5"),
    ({"seed": 1.5}, "seed: got 1.5"),
    ({"scale": float("nan")}, "scale: got nan"),
    ({"window": 19}, "queries\\[0\\]: 20 queries, expected window, 19"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[m for _, m in BAD])
def test_bad_parameters(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(*tensors(), **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda k, v, q: (k[:1], v, q), "got 1, 2 and 2 layers"),
        (lambda k, v, q: ([x[:, :, :20] for x in k], [x[:, :, :20] for x in v], q), "20 tokens"),
        (lambda k, v, q: ([x.repeat(2, 1, 1, 1) for x in k], v, q), "batch size is 2, expected 1"),
        (lambda k, v, q: (k, [x[..., 1:, :] for x in v], q), "values\\[0\\]: heads and length"),
        (lambda k, v, q: (k, v, [x[..., 1:] for x in q]), "queries\\[0\\]: head_dim"),
        (lambda k, v, q: (k, v, [x.half() for x in q]), "queries\\[0\\]: dtype"),
        (lambda k, v, q: (k, v, [x[:, :3] for x in q]), "query: 3 heads"),
    ],
)
def test_bad_tensors(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(*change(*tensors()))


def test_kept_tokens_of_a_layer_are_whole_clusters():
    context = build(*tensors(), coarse=0.01, sparsity=0.7)
    layer = context.layers[0]
    query = topics(4, 1, seed=4)[None] * 2
    mask = token_mask(*op(query, *layer.lookup)[:3], 680)[0]
    kept = F.pad(mask.cumsum(-1), (1, 0))
    ends = layer.offsets[0].repeat_interleave(2, 0).long()
    inside = kept.gather(-1, ends).diff(dim=-1)
    size = ends.diff(dim=-1)
    assert ((inside == 0) | (inside == size)).all() and 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("options", [{}, {"coarse": 0.02}], ids=str)
def test_what_is_kept_lies_in_few_runs(options):
    """Fewer than if the clusters stood in any other order."""
    context = build(*tensors(n=3000), clusters=0.1, sparsity=0.8, segment=1000, **options)
    layer = context.layers[0]
    query = 2 * topics(4, 1, seed=4)[None]
    runs = op(query, *layer.lookup)[2][0]
    mask = token_mask(*op(query, *layer.lookup)[:3], 2980)[0]
    sizes = layer.offsets[0].diff(dim=-1).repeat_interleave(2, 0)
    for head in range(4):
        filled = sizes[head] > 0
        first = layer.offsets[0, head // 2, :-1][filled].long()
        kept = mask[head, first]
        shuffled = kept[torch.randperm(len(kept))]
        other = shuffled & ~F.pad(shuffled, (1, 0))[:-1]
        assert 0 < runs[head] < 0.8 * other.sum()


@pytest.mark.parametrize("shape", [(1, 2, 3, 8), (1, 2, 2**13 + 1, 128), (1, 2, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_pages_hold_the_same(shape, dtype):
    x = torch.randn(shape).to(dtype)
    got = moved(x)
    assert got.is_contiguous() and got.dtype == dtype and torch.equal(got, x)
    got.zero_()
    del x
    assert (got == 0).all()


def test_it_is_printed_in_one_line():
    context = build(*tensors())
    shown = repr(context)
    assert shown.startswith("SqueezedContext(fingerprint=None, layers=") and "length=" in shown
    assert "key=float32[1, " in repr(context.layers[0])
    assert all("tensor(" not in x and "\n" not in x for x in (shown, repr(context.layers[0])))

import pytest
import torch

import sparse_attn
from sparse_attn import BlockIndex, FlexPrefill
from tests.ops.test_flex_prefill_select import structured


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("kind", ["mixed", "sharp"])
def test_full_budget_equals_dense(backend, kind):
    query, key, value = structured(kind, 1000)
    run = lambda m: sparse_attn.attention(  # noqa: E731
        query, key, value, m, backend=backend, fallback=False
    )
    torch.testing.assert_close(run(FlexPrefill(gamma=1.0)), run("dense"), rtol=1e-5, atol=1e-5)


def kept_mass(query, key, config):
    """Attention mass kept and share of blocks computed, means over heads and rows."""
    n = key.shape[2]
    index = sparse_attn.select(query, key, config)
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    scores = (scores / query.shape[3] ** 0.5).masked_fill(
        torch.ones(n, n).triu(1).bool(), -torch.inf
    )
    block = config.block_size
    tokens = index.to_mask(n).repeat_interleave(block, 2)[:, :, :n].repeat_interleave(block, 3)
    return (scores.softmax(-1) * tokens[..., :n]).sum(-1).mean().item(), index.density(n, n)


def test_keeps_more_mass_than_the_official_variant_on_peaked_heads():
    """At equal density: the official curve is read off between its two nearest gammas."""
    query, key, _ = structured("sharp", 4096)
    mass, density = kept_mass(query, key, FlexPrefill(gamma=0.8, min_budget=0))
    rivals = [
        kept_mass(query, key, FlexPrefill(gamma=g, min_budget=0, variant="official"))
        for g in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    ]
    assert any(d >= density for _, d in rivals)
    assert mass > max(m for m, d in rivals if d <= density * 1.05)


@pytest.mark.parametrize("kind", ["sharp", "mixed"])
def test_keeps_nine_tenths_of_what_the_best_blocks_hold(kind):
    """Against the exact best selection of equal size: of each head as many blocks, the heaviest."""
    query, key, _ = structured(kind, 4096)
    config = FlexPrefill(gamma=0.9, min_budget=0)
    mask = sparse_attn.select(query, key, config).to_mask(4096)
    assert 0 < mask.sum() < 0.8 * BlockIndex.full(4096, 4096).counts.sum() * mask.shape[1]
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    later = torch.ones(4096, 4096).triu(1).bool()
    weights = (scores / query.shape[3] ** 0.5).masked_fill(later, -torch.inf).softmax(-1)
    mass = weights.unflatten(-1, (-1, 128)).sum(-1).unflatten(-2, (-1, 128)).sum(-2)
    kept = best = 0.0
    for of_head, chosen in zip(mass[0].flatten(1), mask[0].flatten(1), strict=True):
        kept += of_head[chosen].sum().item()
        best += of_head.topk(int(chosen.sum())).values.sum().item()
    assert kept >= 0.9 * best, f"{kept / best:.3f}"


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("gamma", -1, "more than 0"),
        ("gamma", "a", "a number"),
        ("gamma", None, "a number"),
        ("tau", "x", "a number"),
        ("min_budget", "a", "an integer"),
        ("min_budget", 1.5, "an integer"),
        ("min_budget", 2**64, r"0 to 2\*\*63 - 1"),
        ("max_budget", 1.5, "an integer"),
        ("max_budget", 2**64, r"1 to 2\*\*63 - 1"),
        ("block_size", "64", "an integer"),
        ("block_size", 64.0, "an integer"),
        ("block_size", True, "an integer"),
    ],
)
def test_config_checks_itself(name, value, expected):
    with pytest.raises(
        (ValueError, TypeError), match=f"{name}: got {value!r}, expected {expected}"
    ):
        FlexPrefill(**{name: value})


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        FlexPrefill().gamma = 1
    assert FlexPrefill.name == "flex_prefill"

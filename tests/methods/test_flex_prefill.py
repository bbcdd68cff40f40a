import pytest
import torch

import sparse_attn
from sparse_attn import FlexPrefill
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


def test_config_checks_itself():
    with pytest.raises(ValueError, match="gamma"):
        FlexPrefill(gamma=-1)
    with pytest.raises(AttributeError):
        FlexPrefill().gamma = 1
    assert FlexPrefill.name == "flex_prefill"

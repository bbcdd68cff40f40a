"""Attention mass kept, against a whole score matrix."""

import pytest
import torch

from sparse_attn import BlockIndex, mass
from sparse_attn.methods.dense import Dense
from sparse_attn.reference.block_sparse_attention import block_mask
from tests.cases import Shape, index, inputs


def whole(query, key, chosen):
    """(weights, mask) [B, Hq, Tq, Tk] in float64."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(groups, 1).mT * query.shape[3] ** -0.5
    i, j = n_keys - n_queries + torch.arange(n_queries)[:, None], torch.arange(n_keys)
    listed = block_mask(*chosen[:2], -(-n_keys // chosen.kv_block))
    listed = listed.repeat_interleave(chosen.q_block, 2)[:, :, :n_queries]
    listed = listed.repeat_interleave(chosen.kv_block, 3)[..., :n_keys]
    listed = listed.repeat_interleave(query.shape[1] // listed.shape[1], 1)
    mask = (listed | (j < chosen.sink) | (j > i - chosen.window)) & (j <= i)
    return scores.masked_fill(j > i, -torch.inf).softmax(-1), mask


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("sink, window", [(0, 0), (5, 9)])
def test_kept(heads, sink, window, monkeypatch):
    monkeypatch.setattr(mass, "SCORES", 7 * 2 * 4 * 70)  # seven queries at a time
    shape = Shape(B=2, Hq=4, Hkv=2, Tq=50, Tk=70, D=16, Hi=heads, q_block=16, kv_block=8)
    query, key, _ = inputs(shape)
    chosen = BlockIndex(*index(shape), sink, window)
    got_mass, got_pairs = mass.kept(query, key, chosen)
    weights, mask = whole(query, key, chosen)
    want = (weights * mask).sum(-1).mean((0, 2))
    torch.testing.assert_close(got_mass.double(), want, atol=1e-6, rtol=0)
    pairs = mask.sum((2, 3)).double().mean(0) / sum(range(21, 71))
    torch.testing.assert_close(got_pairs.double(), pairs, atol=1e-6, rtol=0)
    cells, part = mass.cells(query, key, chosen, size=64)  # one query each, a key or two
    assert cells.shape == (4, 50, 64)
    column = torch.arange(70) * 64 // 70
    for got, x in ((cells, weights), (part, weights * mask)):
        want = torch.zeros(4, 50, 64).double().index_add_(2, column, x[0])
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)


def test_a_grid_of_long_prompts():
    query, key, _ = inputs(Shape(Tq=300, Tk=300, D=16))
    blocks = torch.zeros(1, 1, 19, 19, dtype=torch.bool)
    whole, none = mass.cells(query, key, BlockIndex.from_mask(blocks, 16, 16), size=32)
    assert whole.shape == none.shape == (2, 32, 32) and none.max() == 0
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 32))
    whole, all_of_it = mass.cells(query, key, Dense().select(query, key), size=32)
    assert torch.equal(whole, all_of_it)
    share, pairs = mass.kept(query, key, Dense().select(query, key))
    torch.testing.assert_close(share, torch.ones(2))
    assert torch.equal(pairs, torch.ones(2))


def test_rows_are_a_sample_of_long_prompts(monkeypatch):
    query, key, _ = inputs(Shape(Tq=200, Tk=200, D=16))
    chosen = BlockIndex.full(200, 200, 16, 16)
    monkeypatch.setattr(mass, "ROWS", 7)
    share, pairs = mass.kept(query, key, chosen)
    torch.testing.assert_close(share, torch.ones(2))
    torch.testing.assert_close(pairs, torch.ones(2))

import pytest
import torch

import sparse_attn
from bench.inputs import locality
from sparse_attn import InfiniteHiP
from tests import hip
from tests.cases import Shape
from tests.methods.test_hip import best, kept, mass_per_key, run

SMALL = {"chunks": (64, 32, 8), "keeps": (4096, 2048, 1024), "q_strides": (4, 4, 1), "sink": 64,
         "window": 256}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("n_queries, n_keys", [(130, 300), (1, 200), (5, 3)], ids=str)
@pytest.mark.parametrize("merge", ["none", "group", "all"])
def test_room_for_all_is_dense_attention(backend, n_queries, n_keys, merge):
    query, key = hip.smooth_keys(Shape(B=2, Hq=4, Hkv=2, Tq=n_queries, Tk=n_keys))
    value = torch.randn_like(key)
    config = InfiniteHiP((16, 4), (400, 400), (1, 1), sink=10, window=20, merge_heads=merge)
    got = run(query, key, value, config, backend=backend)
    want = run(query, key, value, "dense", backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# of the attention mass, how much less than the best choice of as many blocks is found with heads
# apart and merged, 0.002 to 0.003 more than measured. 4 is less than the step at which the first
# stage's 64 tokens are judged: much is missed, also of what the published search kept on inputs of
# this kind, 0.94 and 0.85. The queries of a block look for the same: strides do not show here
MISSED = {4: (0.170, 0.199), 16: (0.004, 0.037), 64: (0.002, 0.035)}


@pytest.mark.parametrize("length", MISSED)
def test_recall_on_keys_that_are_alike(length):
    """Near the best choice of blocks where neighbours are alike over more than a chunk's step."""
    found = {"none": 0.0, "all": 0.0}
    possible = 0.0
    for seed in range(4):
        query, key = (torch.from_numpy(x).transpose(1, 2) for x in locality(seed, 8192, length))
        near, far = mass_per_key(query, key)
        possible += best(near, far, 1024, 8) / 4
        for merge in found:
            index = InfiniteHiP(**SMALL, merge_heads=merge).select(query, key)
            found[merge] += kept(near, far, index) / 4
    apart, merged = MISSED[length]
    assert found["none"] >= possible - apart, (found, possible)
    assert found["all"] >= possible - merged, (found, possible)
    assert found["all"] <= found["none"] <= possible


def test_lists_are_legal_and_as_long_as_the_budget():
    query, key = hip.smooth_keys(Shape(Hq=4, Hkv=2, Tq=100, Tk=3000))
    for merge, heads in (("none", 4), ("group", 2), ("all", 1)):
        index = InfiniteHiP(**SMALL, merge_heads=merge).select(query, key)
        index.validate(100, 3000)
        assert index.indices.shape == (1, heads, 2, 128)
        assert index.kv_block == 8 and (index.sink, index.window) == (64, 256)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"chunks": (256, 48, 8)}, "chunks\\[1\\]: got 48"),
        ({"chunks": (256, 32)}, "one integer per stage in each, got 2, 3 and 3"),
        ({"keeps": (1, 2, 0)}, "keeps\\[2\\]: got 0"),
        ({"q_strides": (1, 1, 200)}, "q_strides\\[2\\]: got 200, expected 1 to 128"),
        ({"merge_heads": "kv"}, "merge_heads: got 'kv', expected one of"),
    ],
)
def test_config_checks_itself(change, expected):
    with pytest.raises(ValueError, match=expected):
        InfiniteHiP(**change)


def test_lists_become_tuples():
    config = InfiniteHiP([64, 8], [512, 128], [2, 1])
    assert config == InfiniteHiP((64, 8), (512, 128), (2, 1))
    assert len({config, InfiniteHiP((64, 8), (512, 128), (2, 1))}) == 1


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        InfiniteHiP().sink = 1
    assert InfiniteHiP.name == "infinite_hip" and sparse_attn.InfiniteHiP is InfiniteHiP

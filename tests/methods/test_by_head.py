"""An option with a value for each query head chooses for each head what its value alone would."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn import FlexPrefill, HiP, InfiniteHiP, Sale
from sparse_attn.methods.hip import HiPState
from tests import hip
from tests.cases import Shape

CONFIGS = {
    "flex_prefill": (
        FlexPrefill(min_budget=0, block_size=16),
        (0.3, 0.6, 0.9, 1.0),
    ),
    "hip": (HiP(kv_block=4, sink=8, window=24), (8, 33, 64, 500)),
    "infinite_hip": (
        InfiniteHiP((16, 4), (64, 16), (2, 1), sink=8, window=24),
        ((64, 16), (128, 32), (96, 64), (512, 512)),
    ),
}
BACKENDS = ["cpp", "reference"]


def tensors(**sizes):
    query, key = hip.smooth_keys(Shape(**{"B": 2, "Hq": 4, "Hkv": 2, "D": 32} | sizes))
    return query, key, torch.randn_like(key)


def with_values(name, picks):
    """The config with the values picked, and one config for each head."""
    config, values = CONFIGS[name]
    chosen = [values[i] for i in picks]
    alone = [replace(config, **{config.by_head: value}) for value in chosen]
    return replace(config, **{config.by_head: chosen}), alone


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8)
@given(
    picks=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    kv_heads=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 150),
    earlier=st.integers(0, 90),
    many=st.sampled_from([100, 1024]),
)
def test_each_head_chooses_by_its_own_value(name, backend, picks, kv_heads, tokens, earlier, many):
    """Alone, as in calls of many queries, or of what all heads chose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_attn.methods._by_head.MANY", many)
        check_each(*with_values(name, picks), backend, kv_heads, tokens, earlier)


def check_each(config, alone, backend, kv_heads, tokens, earlier):
    query, key, value = tensors(Hkv=kv_heads, Tq=tokens, Tk=tokens + earlier)
    options = {"backend": backend, "fallback": False}
    got, lse = sparse_attn.attention(query, key, value, config, return_lse=True, **options)
    index = sparse_attn.select(query, key, config, backend=backend)
    for head, own in enumerate(alone):
        want = sparse_attn.select(query, key, own, backend=backend)
        counts = index.counts[:, head]
        assert torch.equal(counts, want.counts[:, head])
        assert index[2:] == want[2:]  # blocks, sink and window
        width = min(index.indices.shape[-1], want.indices.shape[-1])
        listed = torch.arange(width) < counts[..., None]
        assert int(counts.max()) <= width
        ours, theirs = (i.indices[:, head, :, :width] for i in (index, want))
        assert torch.equal(ours[listed], theirs[listed])
        expected = sparse_attn.attention(query, key, value, own, return_lse=True, **options)
        torch.testing.assert_close(got[:, head], expected[0][:, head])
        torch.testing.assert_close(lse[:, head], expected[1][:, head])


@pytest.mark.parametrize("name", CONFIGS)
def test_values_matter(name):
    """The heads with the larger value keep more."""
    query, key, _ = tensors(Tq=300, Tk=300)
    index = sparse_attn.select(query, key, with_values(name, (0, 3, 0, 3))[0])
    kept = index.counts.sum((0, 2))
    assert (kept[[1, 3]] > 1.2 * kept[[0, 2]]).all()


def test_pages():
    query, key, _ = tensors(Tq=1, Tk=256)
    config, _ = with_values("hip", (0, 2, 1, 0))
    pages = key.unflatten(2, (8, 32)).transpose(1, 2).flatten(0, 1)
    table = torch.arange(16, dtype=torch.int32).view(2, 8)
    lengths = torch.tensor([256, 200], dtype=torch.int32)
    index = sparse_attn.select(query, pages, config, block_table=table, kv_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        want = sparse_attn.select(query[b : b + 1], key[b : b + 1, :, :n], config)
        assert torch.equal(index.counts[b], want.counts[0])
        for h in range(4):
            count = int(want.counts[0, h, 0])
            assert torch.equal(index.indices[b, h, 0, :count], want.indices[0, h, 0, :count])


def test_a_state_with_budgets_by_head():
    query, key, value = tensors(Tq=1, Tk=400)
    config, _ = with_values("hip", (0, 1, 2, 3))
    state = HiPState(config, refresh=1)
    out, _ = state.attention(query, key, value)
    want = sparse_attn.attention(query, key, value, config, fallback=False)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_in_one_graph(name):
    query, key, value = tensors(Tq=130, Tk=130)
    config, _ = with_values(name, (0, 2, 1, 0))

    def call(query, key, value):
        return sparse_attn.attention(query, key, value, config, fallback=False)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), call(query, key, value))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlexPrefill(gamma=()), "^gamma: got no value, expected one, or one per"),
        (lambda: FlexPrefill(gamma=(0.9, -1)), "^gamma: got -1, expected more than 0"),
        (lambda: HiP(budget=[]), "^budget: got no value, expected one, or one per query"),
        (lambda: HiP(budget=(64, 0)), "^budget: got 0"),
        (lambda: HiP(budget=(64, 64), share_kv_heads=True), "^budget: .* share_kv_heads=False"),
        (lambda: InfiniteHiP(keeps=[(4096, 512, 64), (512, 64)]), "^chunks, keeps, q_strides: "),
        (lambda: InfiniteHiP(keeps=[(64, 64, 64)], merge_heads="all"), "^keeps: .* merge_heads='n"),
    ],
)
def test_what_is_no_legal_list(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def of_the_config(query, key, value, config):
    return config.select(query, key)


def of_a_state(query, key, value, config):
    return HiPState(config).attention(query, key, value)


@pytest.mark.parametrize("values", [(64,) * 3, (8, 9, 8, 9, 8), (8, 9, 8, 9, 10)], ids=str)
@pytest.mark.parametrize("call", [sparse_attn.attention, of_the_config, of_a_state])
def test_as_many_values_as_heads(values, call):
    query, key, value = tensors(Tq=130, Tk=130)
    message = f"budget: number of values is {len(values)}, expected 4 as in the heads of query"
    with pytest.raises(ValueError, match=message):
        call(query, key, value, HiP(budget=values))
    with pytest.raises(ValueError, match="^gamma: number of values is 3, expected 4"):
        FlexPrefill(gamma=(0.9, 0.8, 0.9)).select(query, key)


def test_pages_are_not_copied():
    """The keys that choose are the pool itself, whatever the number of queries."""
    seen = []

    class Watched(HiP):
        def selector(self, query, key, *rest):
            seen.append(key.data_ptr())
            return super().selector(query, key, *rest)

    query, key, _ = tensors(B=1, Tq=1100, Tk=1120)
    pages = key[0].unflatten(1, (35, 32)).transpose(0, 1).contiguous()
    table = torch.arange(35, dtype=torch.int32)[None]
    Watched(budget=(8, 8, 16, 16)).select(query, pages, block_table=table)
    assert seen == [pages.data_ptr()] * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_exported_for_any_length(name):
    config, _ = with_values(name, (0, 2, 1, 0))

    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return sparse_attn.attention(query, key, value, config, fallback=False)

    length = {2: torch.export.Dim("length", min=600, max=4096)}
    example = tensors(Tq=700, Tk=700)
    program = torch.export.export(Module(), example, dynamic_shapes=(length,) * 3).module()
    other = tensors(Tq=900, Tk=900)
    torch.testing.assert_close(program(*other), Module()(*other))


def test_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    assert FlexPrefill(gamma=numpy.float64(0.5)).gamma == 0.5
    assert HiP(budget=numpy.int64(64)).budget == 64
    with pytest.raises((TypeError, ValueError), match="^gamma: got array"):
        FlexPrefill(gamma=numpy.array([0.5, 0.6]))


def test_configs_with_lists_have_a_hash():
    assert hash(FlexPrefill(gamma=[0.9, 0.8])) == hash(FlexPrefill(gamma=(0.9, 0.8)))
    assert HiP(budget=[1, 2]) == HiP(budget=(1, 2)) != Sale(threshold=(1, 2))
    assert InfiniteHiP(keeps=[[64, 32, 16]]).keeps == ((64, 32, 16),)

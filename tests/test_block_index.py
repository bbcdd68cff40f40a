import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparse_attn import BlockIndex, attention
from tests.cases import Shape, index, inputs


@given(st.data())
def test_mask_round_trip(data):
    size = lambda: data.draw(st.integers(1, 9))  # noqa: E731
    mask = torch.rand(2, size(), size(), size()) < data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    made = BlockIndex.from_mask(mask, 16, 32)
    n_queries, n_keys = 16 * mask.shape[2], 32 * mask.shape[3]
    made.validate(n_queries, n_keys)
    assert torch.equal(made.to_mask(n_keys), mask)
    assert made.density(n_queries, n_keys, causal=False) == pytest.approx(mask.float().mean())


def test_max_blocks():
    mask = torch.tensor([[[[True, False, True]]]])
    assert BlockIndex.from_mask(mask, 1, 1, max_blocks=2).indices.tolist() == [[[[0, 2]]]]
    with pytest.raises(ValueError, match="max_blocks: got 1, but a row has 2"):
        BlockIndex.from_mask(mask, 1, 1, max_blocks=1)


def test_density_counts_visible_blocks_only():
    full = BlockIndex.full(300, 300, 128, 128)
    everything = BlockIndex.from_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), 128, 128)
    assert full.counts.tolist() == [[[1, 2, 3]]]
    assert full.density(300, 300) == everything.density(300, 300) == 1.0
    assert full.density(300, 300, causal=False) == pytest.approx(6 / 9)


@pytest.mark.parametrize("n_queries", [256, 128])
def test_compiled_flex_attention_agrees(n_queries):
    query, key, value = inputs(Shape(Tq=n_queries, Tk=256, Hq=2, Hkv=2))
    listed = index(Shape(Tq=n_queries, Tk=256, q_block=128, kv_block=128, share=0.6))
    listed.counts.clamp_(min=1)
    want = attention(query, key, value, index=listed)
    compiled = torch.compile(flex_attention)
    got = compiled(query, key, value, block_mask=listed.to_flex(n_queries, 256))
    seen = want.abs().sum(-1) > 0  # FlexAttention leaves rows without keys undefined
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-5)


def test_flex_round_trip():
    listed = index(Shape(Tq=300, Tk=400, q_block=64, kv_block=32))
    back = BlockIndex.from_flex(listed.to_flex(300, 400, causal=False))
    assert torch.equal(back.to_mask(400), listed.to_mask(400))
    assert (back.q_block, back.kv_block) == (64, 32)


@pytest.mark.parametrize(
    "backend", ["cpp", "reference", pytest.param("triton", marks=pytest.mark.triton)]
)
def test_one_index_serves_every_sequence(backend):
    """As FlexAttention's masks with B=None do."""
    query, key, value = inputs(Shape(B=3, Tq=100, Tk=100))
    mask = create_block_mask(lambda b, h, q, k: k <= q, None, None, 100, 100, "cpu", BLOCK_SIZE=32)
    listed = BlockIndex.from_flex(mask)
    assert listed.indices.shape[0] == 1
    got = attention(query, key, value, index=listed, backend=backend)
    torch.testing.assert_close(got, attention(query, key, value, "dense"), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="indices: batch size is 2, expected 3"):
        attention(query, key, value, index=listed.expand(2))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i._replace(indices=i.indices.long()), "indices: expected int32"),
        (lambda i: i._replace(q_block=0), "q_block: got 0"),
        (lambda i: i._replace(q_block=64.0), "q_block: got 64.0, expected an integer"),
        (lambda i: i._replace(counts=i.counts[:, :1, :1]), "counts: shape"),
        (lambda i: i._replace(q_block=16), "indices: 3 query blocks, expected 10"),
        (lambda i: i._replace(counts=i.counts + 9), "counts: a value is negative or larger"),
        (lambda i: i._replace(indices=i.indices + 7), "indices: rows must be ascending"),
    ],
)
def test_validate(change, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        change(BlockIndex.full(150, 150, 64, 64)).validate(150, 150)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: BlockIndex.from_mask(m, 0, 1), "q_block: got 0, expected 1 to 128"),
        (lambda m: BlockIndex.from_mask(m, 1, "1"), "kv_block: got '1', expected an integer"),
        (lambda m: BlockIndex.from_mask(m, 1, 1, max_blocks=-1), "max_blocks: got -1"),
        (lambda m: BlockIndex.full(64, 64, q_block=0), "q_block: got 0, expected 1 to 128"),
        (lambda m: BlockIndex.full(64, 64, 16, 16).to_mask(48), "n_keys: got 48, .* block 3 is"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(torch.ones(1, 1, 2, 2, dtype=torch.bool))


def test_crosses_torch_compile():
    query, key, value = inputs(Shape(Tq=64, Tk=64))

    @torch.compile(fullgraph=True)
    def run(q, k, v, listed):
        return attention(q, k, v, index=listed)

    listed = BlockIndex.full(64, 64, 32, 32)
    torch.testing.assert_close(run(query, key, value, listed), attention(query, key, value,
                                                                        index=listed))  # fmt: skip


def test_plot():
    figure = index(Shape(Tq=300, Tk=300, q_block=32, kv_block=32)).plot(300, 300)
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 2 and all("of blocks" in t for t in titles)


def test_plot_shows_positions():
    """A last block that reaches beyond the tokens is cut, not stretched."""
    axis = index(Shape(Tq=70, Tk=300, q_block=64, kv_block=128)).plot(70, 300).axes[0]
    assert axis.images[0].get_extent() == [0, 3 * 128, 230 + 2 * 64, 230]
    assert axis.get_xlim() == (0, 300) and axis.get_ylim() == (300, 230)

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from sparse_attn import BlockIndex, attention
from sparse_attn.mass import allowed
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


@given(st.data())
def test_density_is_counted_from_the_lists(data):
    """Exactly the share that a mask of all blocks has, for any lengths, sink and window."""
    draw = lambda most, least=1: data.draw(st.integers(least, most))  # noqa: E731
    n_queries, n_keys = draw(70), draw(70)
    q_block, kv_block, sink, window = draw(20), draw(20), draw(80, 0), draw(80, 0)
    shape = (draw(2), draw(2), -(-n_queries // q_block), -(-n_keys // kv_block))
    mask = torch.rand(shape) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    listed = BlockIndex.from_mask(mask, q_block, kv_block)._replace(sink=sink, window=window)
    for causal in (True, False):
        computed = listed.computed(n_queries, n_keys, causal)
        seen = BlockIndex.full(n_queries, n_keys, q_block, kv_block).counts.sum()
        visible = shape[0] * shape[1] * seen if causal else torch.tensor(mask.numel())
        want = computed.sum().item() / max(visible.item(), 1)
        assert listed.density(n_queries, n_keys, causal) == want


def test_density_takes_no_more_memory_than_the_lists():
    """32k tokens in blocks of 2: a mask of them has as many as pairs of blocks, 2^23 a head."""
    n = 2**15
    at = torch.arange(256, dtype=torch.int32).expand(1, 1, n // 64, 256)
    listed = BlockIndex(at, torch.full(at.shape[:3], 256, dtype=torch.int32), 64, 2, 16, 256)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        listed.density(n, n)
    assert max(largest) == at.numel()


@pytest.mark.parametrize("n_queries, sink, window", [(256, 0, 0), (128, 0, 0), (128, 20, 70)])
def test_compiled_flex_attention_agrees(n_queries, sink, window):
    query, key, value = inputs(Shape(Tq=n_queries, Tk=256, Hq=2, Hkv=2))
    listed = index(Shape(Tq=n_queries, Tk=256, q_block=128, kv_block=128, share=0.6))
    listed = BlockIndex(*listed, sink, window)
    listed.counts.clamp_(min=1)
    want = attention(query, key, value, index=listed)
    compiled = torch.compile(flex_attention)
    got = compiled(query, key, value, block_mask=listed.to_flex(n_queries, 256))
    seen = want.abs().sum(-1) > 0  # FlexAttention leaves rows without keys undefined
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-5)


def test_flex_round_trip():
    listed = BlockIndex(*index(Shape(Tq=300, Tk=400, q_block=64, kv_block=32)))
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
        (lambda i: i._replace(sink=-1), "sink: got -1, expected 0 or more"),
        (lambda i: i._replace(window=1.5), "window: got 1.5, expected an integer"),
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


# ---- sink and window ---------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("sink, window", [(0, 0), (0, 1), (9, 0), (20, 31), (0, 200), (200, 0)])
def test_sink_and_window_against_single_pairs(sink, window, heads, causal):
    """What is computed, its share, and what FlexAttention is told: odd lengths, Tq < Tk."""
    n_queries, n_keys, q_block, kv_block = 75, 133, 16, 8
    lists = index(Shape(B=2, Hi=heads, Tq=n_queries, Tk=n_keys, q_block=q_block,
                        kv_block=kv_block, share=0.2))  # fmt: skip
    listed = BlockIndex(*lists, sink, window)
    pairs = allowed(listed, torch.arange(n_queries), n_queries, n_keys, causal)

    def in_blocks(x):
        x = torch.nn.functional.pad(x, (0, -n_keys % kv_block, 0, -n_queries % q_block))
        return x.unflatten(3, (-1, kv_block)).unflatten(2, (-1, q_block)).any(5).any(3)

    computed = listed.computed(n_queries, n_keys, causal)
    assert torch.equal(computed, in_blocks(pairs))
    i = n_keys - n_queries + torch.arange(n_queries)
    visible = torch.arange(n_keys) <= i[:, None] if causal else torch.ones(n_queries, n_keys) > 0
    visible = in_blocks(visible[None, None]).sum() * 2 * heads
    share = listed.density(n_queries, n_keys, causal)
    assert share == pytest.approx((computed.sum() / visible).item())
    mask = listed.to_flex(n_queries, n_keys, causal)
    assert torch.equal(BlockIndex.from_flex(mask).to_mask(n_keys), computed)
    told = create_mask(mask.mask_mod, 2, 2, n_queries, n_keys, "cpu")
    told = (
        told
        & computed.repeat_interleave(q_block, 2).repeat_interleave(kv_block, 3)[
            :, :, :n_queries, :n_keys
        ]
    )
    assert torch.equal(told, pairs.expand(2, 2, -1, -1))


@pytest.mark.parametrize("method", ["to_mask", "transpose"])
@pytest.mark.parametrize("field", ["sink", "window"])
def test_blocks_cannot_express_a_sink_and_a_window(method, field):
    listed = BlockIndex.full(64, 64, 16, 16)
    other = listed._replace(**{field: 5})
    message = rf"{method}: .* {field} of 5 .*\(sink=0, window=0\)"
    with pytest.raises(NotImplementedError, match=message):
        getattr(other, method)(64)
    for got, want in zip(getattr(other._replace(sink=0, window=0), method)(64),
                         getattr(listed, method)(64), strict=True):  # fmt: skip
        assert torch.equal(got, want)


def test_an_index_of_one_sequence_keeps_its_sink_and_window():
    query, key, value = inputs(Shape(B=2, Tq=40, Tk=90))
    none = torch.zeros(1, 1, 3, 6, dtype=torch.bool)
    listed = BlockIndex.from_mask(none, 16, 16)._replace(sink=5, window=20)
    got = attention(query, key, value, index=listed)
    i, j = 50 + torch.arange(40)[:, None], torch.arange(90)
    seen = ((j < 5) | (j > i - 20)) & (j <= i)
    scores = (query @ key.mT / 8).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(got, scores.softmax(-1) @ value, rtol=1e-5, atol=1e-5)


def test_crosses_torch_compile():
    query, key, value = inputs(Shape(Tq=64, Tk=64))

    @torch.compile(fullgraph=True)
    def run(q, k, v, listed):
        return attention(q, k, v, index=listed)

    listed = BlockIndex.full(64, 64, 32, 32)
    torch.testing.assert_close(run(query, key, value, listed), attention(query, key, value,
                                                                        index=listed))  # fmt: skip


def test_plot():
    listed = index(Shape(Tq=300, Tk=300, q_block=32, kv_block=32))
    figure = BlockIndex(*listed).plot(300, 300)
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 2 and all("of blocks" in t for t in titles)


def test_plot_shows_positions():
    """A last block that reaches beyond the tokens is cut, not stretched."""
    listed = index(Shape(Tq=70, Tk=300, q_block=64, kv_block=128))
    axis = BlockIndex(*listed).plot(70, 300).axes[0]
    assert axis.images[0].get_extent() == [0, 3 * 128, 230 + 2 * 64, 230]
    assert axis.get_xlim() == (0, 300) and axis.get_ylim() == (300, 230)


def test_it_is_printed_as_shapes():
    index = BlockIndex.from_mask(torch.ones(1, 2, 3, 4, dtype=torch.bool), 64, 32)
    assert repr(index) == (
        "BlockIndex(indices=int32[1, 2, 3, 4], counts=int32[1, 2, 3], q_block=64, kv_block=32, "
        "sink=0, window=0)"
    )

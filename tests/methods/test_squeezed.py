import pytest
import torch

import sparse_attn
from sparse_attn import Squeezed
from sparse_attn.squeezed import SqueezedContext
from tests.test_squeezed_context import build, tensors

S = 700


def prepared(n_input=9, **options):
    """A context and a call behind it: query, key, value of the whole sequence."""
    keys, values, queries = tensors(layers=1)
    context = build(keys, values, queries, **options)
    more_keys, more_values, more = tensors(n=n_input, layers=1, window=n_input)
    key, value = torch.cat([keys[0], more_keys[0]], 2), torch.cat([values[0], more_values[0]], 2)
    return context, more[0], key, value


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("n_input", [1, 9, 150])
def test_threshold_0_equals_dense(backend, n_input):
    context, query, key, value = prepared(n_input, sparsity=0.0)
    run = lambda m: sparse_attn.attention(query, key, value, m, backend=backend)  # noqa: E731
    got = run(Squeezed(context.layers[0]))
    torch.testing.assert_close(got, run("dense"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"coarse": 0.01}, {"shared": True}], ids=str)
@pytest.mark.parametrize("n_input", [1, 9, 150])
def test_equals_the_sorted_context(n_input, options):
    """The index over the keys in their order and the kernel over the sorted ones agree."""
    context, query, key, value = prepared(n_input, sparsity=0.8, **options)
    layer = context.layers[0]
    index = sparse_attn.select(query, key, Squeezed(layer))
    index.validate(query.shape[2], key.shape[2])
    mask = index.to_mask(key.shape[2])
    assert mask[..., S - 20 :].all(), "window and input are always kept"
    out, stats = sparse_attn.attention(query, key, value, Squeezed(layer), return_stats=True)
    want, _, tokens = layer.attention(query, key[:, :, S - 20 :], value[:, :, S - 20 :])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(mask[:, :, 0, : S - 20].sum(-1), tokens.long())
    assert 0 < tokens.sum() < tokens.numel() * (S - 20) and stats.density < 1


def test_the_window_is_kept_however_long_the_input_is():
    """The published code drops it for inputs of more than 1 / threshold tokens."""
    context, query, key, value = prepared(800, sparsity=0.9)
    assert context.threshold > 1 / 800
    index = sparse_attn.select(query, key, Squeezed(context.layers[0]))
    assert index.to_mask(key.shape[2])[..., S - 20 : S].all()


def test_keeps_nearly_as_much_as_the_best_keys():
    """Attention mass over the context, against as many keys chosen with full knowledge."""
    context, query, key, _ = prepared(1, sparsity=0.7)
    index = sparse_attn.select(query, key, Squeezed(context.layers[0]))
    mask = index.to_mask(key.shape[2])[0, :, 0, : S - 20]
    scores = query[0] @ key[0].repeat_interleave(2, 0).mT / 32**0.5
    mass = scores.softmax(-1)[:, 0, : S - 20]
    kept = best = 0.0
    for p, m in zip(mass, mask, strict=True):
        kept += p[m].sum().item()
        best += p.topk(int(m.sum())).values.sum().item()
    assert kept > 0.8 * best > 0.1


def test_what_it_needs_is_said():
    context, query, key, value = prepared()
    layer = context.layers[0]
    with pytest.raises(NotImplementedError, match="squeezed.*needs a prepared context"):
        sparse_attn.attention(query, key, value, "squeezed")
    for method, args, message in (
        (Squeezed(layer), (query, key, value, False), "use causal=True"),
        (Squeezed(layer), (query, key[:, :, :705], value[:, :, :705], True), "has 700 tokens"),
        (Squeezed(layer), (query[:, :1], key[:, :1], value[:, :1], True), "KV heads 2, the keys"),
        (Squeezed(layer), tuple(x.half() for x in (query, key, value)) + (True,), "dtype"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            sparse_attn.attention(*args[:3], method, causal=args[3])
    assert "needs a prepared context" in sparse_attn.explain(query, key, value, "squeezed")
    text = sparse_attn.explain(query, key, value, Squeezed(layer))
    assert "squeezed_lookup:" in text and "cpp: used" in text
    with pytest.raises(TypeError, match="context: got SqueezedContext, expected a SqueezedLayer"):
        Squeezed(context)


def test_the_scale_of_the_call_is_the_contexts():
    """One scale for the choice and for the attention: another than the context's is refused."""
    context, query, key, value = prepared(sparsity=0.8, scale=0.5)
    layer = context.layers[0]
    run = lambda m, **o: sparse_attn.attention(query, key, value, m, **o)  # noqa: E731
    want, *_ = layer.attention(query, key[:, :, S - 20 :], value[:, :, S - 20 :])
    torch.testing.assert_close(run(Squeezed(layer), scale=0.5), want, rtol=1e-5, atol=1e-5)
    for scale in (None, 0.25):
        with pytest.raises(NotImplementedError, match="prepared with 0.5.*call it with scale=0.5"):
            run(Squeezed(layer), scale=scale)
    with pytest.raises(NotImplementedError, match="scale=0.5"):
        sparse_attn.select(query, key, Squeezed(layer))
    everything, *_ = prepared(sparsity=0.0, scale=0.5)
    got = run(Squeezed(everything.layers[0]), scale=0.5)
    assert got.isfinite().all() and not torch.equal(got, run("dense"))
    default = Squeezed(prepared()[0].layers[0])
    with pytest.raises(NotImplementedError, match="the call's scale is 0.5"):
        run(default, scale=0.5)
    run(default, scale=32**-0.5)


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        Squeezed().context = 1
    assert Squeezed.name == "squeezed" and sparse_attn.SqueezedContext is SqueezedContext

"""A small Llama through sparse_attn at full budget against transformers' own sdpa."""

import copy
from pathlib import Path

import pytest
import torch

from sparse_attn import FlexPrefill, api
from tests.cases import FLOOR, assert_as_accurate

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("sparse_attn.integrations.transformers")
masks = pytest.importorskip("sparse_attn.integrations.masks")

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model"
TOKENS = 40
LENGTHS = (TOKENS, 23)
EVERYTHING = FlexPrefill(gamma=1.0, tau=0.0, min_budget=1 << 20, block_size=16)


@pytest.fixture(scope="module", params=["dense", EVERYTHING], ids=["dense", "flex_prefill"])
def name(request):
    """A registered implementation that keeps every block."""
    integration.register(request.param, "full_budget", fallback=False)
    return "full_budget"


def config(**options):
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return {**sizes, **options}


@pytest.fixture
def model():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config())).eval()


@pytest.fixture
def ids():
    return torch.randint(1, 64, (2, TOKENS))


def padding(side):
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    hidden = slice(None, -LENGTHS[1]) if side == "left" else slice(LENGTHS[1], None)
    if side is not None:
        mask[1, hidden] = 0
    return mask


@torch.no_grad()
def logits(model, name, ids, **options):
    model.set_attn_implementation(name)
    return model(input_ids=ids, **options).logits


def assert_same_logits(model, name, run):
    """`run(model, name)` is as accurate as with sdpa, both against float64."""
    exact = run(copy.deepcopy(model).double(), "sdpa")
    assert_as_accurate(run(model, name), exact, run(model, "sdpa"), FLOOR[torch.float32])


def new_cache(kind, model):
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=64)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_logits(model, name, ids, side, tokens):
    real = padding(side)[:, :tokens] if side != "left" else padding(side)[:, -tokens:]
    given = None if side is None else real
    assert_same_logits(
        model, name, lambda m, n: logits(m, n, ids[:, :tokens], attention_mask=given)[real.bool()]
    )


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [TOKENS, 16, 11])  # 16, 11: some chunks are padding alone
def test_chunked_prefill(model, name, ids, side, cache, chunk):
    real = padding(side)

    def run(m, n):
        past, found = new_cache(cache, m), []
        for start in range(0, TOKENS, chunk):
            end = min(start + chunk, TOKENS)
            given = None if side is None else real[:, :end]
            part = ids[:, start:end]
            found.append(logits(m, n, part, attention_mask=given, past_key_values=past))
        return torch.cat(found, 1)[real.bool()]

    assert_same_logits(model, name, run)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_generate(model, name, ids, side, cache):
    def run(n):
        model.set_attn_implementation(n)
        return model.generate(
            ids, attention_mask=padding(side), max_new_tokens=12, do_sample=False,
            cache_implementation=cache, disable_compile=True,
        )  # fmt: skip

    want = run("sdpa")
    assert want.shape == (2, TOKENS + 12) and len(want[0, TOKENS:].unique()) > 3
    assert torch.equal(run(name), want)


def test_is_called_and_leaves_no_trace(model, ids):
    shapes = []

    def spy(query, key, value, layer, **options):
        shapes.append((tuple(query.shape), tuple(key.shape)))
        return api.attention(query, key, value, "dense", **options)

    before = logits(model, "sdpa", ids)
    integration.register_function(spy, "spy")
    logits(model, "spy", ids)
    assert shapes == [((2, 4, TOKENS, 16), (2, 2, TOKENS, 16))] * 2
    assert torch.equal(logits(model, "sdpa", ids), before)
    assert len(shapes) == 2


def test_padding_is_cut_off(model, ids):
    """A method never sees a padding token, which could win a block of its budget."""
    shapes = []

    def spy(query, key, value, layer, **options):
        shapes.append((query.shape[2], key.shape[2]))
        return api.attention(query, key, value, "dense", **options)

    integration.register_function(spy, "spy")
    logits(model, "spy", ids, attention_mask=padding("left"))
    assert shapes == [(n, n) for n in LENGTHS] * 2
    shapes.clear()
    logits(model, "spy", ids, attention_mask=padding("right"))
    whole, part = LENGTHS  # and the last query, with which `generate` goes on
    assert shapes == [(whole, whole), (part, part), (1, part)] * 2


def test_a_method_reaches_its_options(model, ids):
    """Less than the full budget changes the result: the method really runs."""
    small = FlexPrefill(gamma=0.1, min_budget=0, block_size=8)
    integration.register(small, "small_budget", fallback=False)
    difference = logits(model, "small_budget", ids) - logits(model, "sdpa", ids)
    assert difference.abs().max() > 0.1


def other_mask(which):
    """Masks [B, 1 or H, Tq, Tk] that are not causal with padding."""
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    causal = (j <= i)[None, None]
    if which == "bidirectional":
        return torch.ones_like(causal)
    if which == "window":
        return causal & (i - j < 8)
    if which == "prefix":
        return causal | (j < 9)
    if which == "hole":
        return causal & (j != 5)
    if which == "bias":
        return torch.where(causal, -0.01 * (i - j), -torch.inf)
    heads = causal.repeat(2, 4, 1, 1)
    heads[:, 1] &= i - j < 8
    return heads


@pytest.mark.parametrize("which", ["bidirectional", "window", "prefix", "hole", "bias", "heads"])
def test_other_masks_are_refused(model, name, ids, which):
    with pytest.raises(NotImplementedError, match="^attention_mask: "):
        logits(model, name, ids, attention_mask=other_mask(which))


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_bias_is_no_padding(model, name, ids, tokens):
    """Scores that differ from 0 by a little are seen: such keys are not left out."""
    mask = other_mask("bias")[:, :, -tokens:]
    past = transformers.DynamicCache(config=model.config)
    if tokens == 1:
        logits(model, "sdpa", ids[:, :-1], past_key_values=past)
    with pytest.raises(NotImplementedError, match="^attention_mask: a bias"):
        logits(model, name, ids[:, -tokens:], attention_mask=mask, past_key_values=past)


@pytest.mark.parametrize("additive", [False, True])
def test_one_query_sees_any_keys(model, name, ids, additive):
    """Holes between the keys of a sequence, as behind a prompt that is padded on the right."""
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[1, ..., 20:33] = False
    mask[1, ..., 3] = False

    def run(m, n):
        past, dtype = transformers.DynamicCache(config=m.config), next(m.parameters()).dtype
        logits(m, "sdpa", ids[:, :-1], past_key_values=past)
        given = mask
        if additive:
            given = torch.zeros(mask.shape, dtype=dtype)
            given = given.masked_fill(~mask, torch.finfo(dtype).min)
        return logits(m, n, ids[:, -1:], attention_mask=given, past_key_values=past)

    assert_same_logits(model, name, run)


def test_methods_by_layer_and_phase(model, ids, monkeypatch, tmp_path):
    calls, attention = [], api.attention

    def spy(query, key, value, config, **options):
        calls.append((query.shape[2], config))
        return attention(query, key, value, "dense", **options)

    monkeypatch.setattr(integration.api, "attention", spy)
    a, b, c, d = (FlexPrefill(gamma=gamma) for gamma in (0.5, 0.6, 0.7, 0.8))
    integration.register(a, "phases", layers={1: b}, decode=c, decode_layers={0: d})
    model.set_attn_implementation("phases")
    model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert calls == [(TOKENS, a), (TOKENS, b), (1, d), (1, c)]
    path = tmp_path / "file.json"
    path.write_text('{"method": "dense", "layers": {"1": {"method": "hip"}}}')
    integration.register(a, "phases", decode=str(path))
    calls.clear()
    model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert [config.name for _, config in calls] == ["flex_prefill"] * 2 + ["dense", "hip"]
    with pytest.raises(ValueError, match="^decode_layers: got layer -1"):
        integration.register(a, "phases", decode_layers={-1: d})
    integration.register(a, "phases", decode_layers={2: d})
    with pytest.raises(ValueError, match="given for layer 2, but the model has the layers 0 to 1"):
        model(input_ids=ids)


def test_additive_causal_mask_is_served(model, name, ids):
    allowed = padding("left")[:, None, None].bool() & torch.ones(TOKENS, TOKENS).tril().bool()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    real = padding("left").bool()
    assert_same_logits(
        model, name, lambda m, n: logits(m, n, ids, attention_mask=mask.to(m.dtype))[real]
    )


def test_layers_share_what_was_found_in_a_mask(model, name, ids, monkeypatch):
    calls, span = [], masks.span

    def spy(*args):
        calls.append(span(*args))
        return calls[-1]

    monkeypatch.setattr(masks, "span", spy)
    logits(model, name, ids, attention_mask=padding("left"))
    assert [c.keys for c in calls] == [slice(TOKENS - n, TOKENS) for n in LENGTHS]
    assert len(masks.KNOWN) == 0  # forgotten with the mask


def test_packed_sequences_are_refused(model, name, ids):
    positions = torch.cat([torch.arange(25), torch.arange(TOKENS - 25)])[None]
    with pytest.raises(NotImplementedError, match="packed sequences"):
        logits(model, name, ids, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("side", [None, "left"])
def test_scale_of_the_model_is_used(name, ids, side):
    options = transformers.GraniteConfig(**config(attention_multiplier=0.7))
    model = transformers.GraniteForCausalLM(options).eval()
    real = padding(side)
    assert_same_logits(
        model, name, lambda m, n: logits(m, n, ids, attention_mask=real)[real.bool()]
    )


def test_training_dropout_is_refused(name, ids):
    options = transformers.LlamaConfig(**config(attention_dropout=0.1))
    model = transformers.LlamaForCausalLM(options).train()
    with pytest.raises(NotImplementedError, match="^dropout: .*model.eval"):
        logits(model, name, ids)
    assert logits(model.eval(), name, ids).isfinite().all()


def test_gradients(model, name, ids):
    """Those of transformers' own attention, for every parameter."""
    grads = []
    for attention in ("sdpa", name):
        model.set_attn_implementation(attention)
        loss = model(input_ids=ids, labels=ids, attention_mask=padding("left")).loss
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("option", ["softcap", "position_bias", "s_aux", "cache"])
def test_what_changes_attention_is_refused(name, option):
    call = transformers.AttentionInterface()[name]
    x = torch.randn(1, 2, 8, 16)
    with pytest.raises(NotImplementedError, match=f"^{option}: "):
        call(torch.nn.Module(), x, x, x, None, **{option: 3.0})
    call(torch.nn.Module(), x, x, x, None, **{option: None})


def test_a_mask_without_causality_is_refused(name):
    call = transformers.AttentionInterface()[name]
    x = torch.randn(1, 2, 8, 16)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match="^attention_mask: served for causal"):
        call(torch.nn.Module(), x, x, x, mask, is_causal=False)


def test_demo_model(name):
    model = transformers.LlamaForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    ids = torch.tensor(list(Path(__file__).read_bytes()[:600]))[None]
    assert_same_logits(model, name, lambda m, n: logits(m, n, ids))
    loss = torch.nn.functional.cross_entropy(logits(model, name, ids)[0, :-1], ids[0, 1:])
    assert loss < 2.5  # nats per byte; chance is 5.5: the weights are the trained ones


def test_register_refuses_what_attention_would_not_take():
    with pytest.raises(ValueError, match="method: got 'flex'"):
        integration.register("flex", "refused")
    with pytest.raises(TypeError, match=r"register: got \['gamma'\].*FlexPrefill\(gamma=0.9\)"):
        integration.register("flex_prefill", "refused", gamma=0.9)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "of_somebody_else"])
def test_names_of_others_are_refused(name):
    from transformers import AttentionInterface

    before = AttentionInterface().get("sdpa")
    if name == "of_somebody_else":
        AttentionInterface.register(name, before)
    with pytest.raises(ValueError, match=f"^name: '{name}' belongs to"):
        integration.register("hip", name)
    assert AttentionInterface().get("sdpa") is before


def test_names_of_ours_may_be_given_again():
    """Those of `register_timed` and of the squeezed cache too."""
    from sparse_attn.probe import Probe, register_probe

    register_probe(Probe(None), "given_twice")
    integration.register("hip", "given_twice")
    integration.register("sale", "given_twice")

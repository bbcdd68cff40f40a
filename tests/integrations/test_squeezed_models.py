"""Which models and calls a prepared context serves, and what calibrates it."""

import copy
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
integration = pytest.importorskip("sparse_attn.integrations.squeezed")

import sparse_attn  # noqa: E402
from sparse_attn.integrations.squeezed_model import fingerprint, implementations  # noqa: E402
from sparse_attn.integrations.transformers import register  # noqa: E402
from sparse_attn.reference.squeezed_lookup import cluster_scores  # noqa: E402
from sparse_attn.squeezed import build  # noqa: E402
from tests.integrations.test_squeezed import (  # noqa: E402
    WINDOW,
    S,
    config,
    generate,
    ids,
    prepared,
)


@pytest.fixture
def model():
    return transformers.LlamaForCausalLM(config()).eval()


def like(name, **options):
    """A tiny model of another family, with the sizes of `config`."""
    sizes = config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "initializer_range", "pad_token_id",
             "bos_token_id", "eos_token_id")  # fmt: skip
    given = {n: sizes[n] for n in names} | options
    made = getattr(transformers, f"{name}Config")(**given)
    return getattr(transformers, f"{name}ForCausalLM")(made).eval()


def past(model, cache):
    return {integration.cache_argument(model): cache}


# ---- no attention but its own ------------------------------------------------------------------

ONLY = "to which only the attention implementation 'sparse_attn_squeezed' attends"


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "sparse_attn"])
@pytest.mark.parametrize("n_input", [1, 9])
def test_another_implementation_is_refused(model, implementation, n_input):
    """Switched after the cache was made: it would attend to the tail alone, in silence."""
    register("dense")
    text = ids(2, n_input)
    cache = sparse_attn.SqueezedCache(prepared(model, text), model)
    model.set_attn_implementation(implementation)
    with pytest.raises(NotImplementedError, match=ONLY):
        generate(model, text, cache)
    cache.reset()
    model.set_attn_implementation(integration.NAME)
    assert generate(model, text, cache).shape[1] == text.shape[1] + 12


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2"])
def test_attention_functions_can_do_nothing_with_the_keys(model, name):
    cache = sparse_attn.SqueezedCache(prepared(model, ids()), model)
    state = torch.randn(1, 2, 4, 16)
    key, value = cache.layers[0].update(state, state)
    assert key.shape == value.shape and key.dtype == torch.float32 and key.device.type == "cpu"
    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[name]
    with pytest.raises(NotImplementedError, match=ONLY):
        attend(model.model.layers[0].self_attn, torch.randn(1, 4, 4, 16), key, value, None)


def test_the_model_must_be_given(model):
    with pytest.raises(TypeError, match="model"):
        sparse_attn.SqueezedCache(prepared(model, ids()))


def test_assisted_decoding_is_refused(model):
    text = torch.cat([ids(1), ids(1)[:, :30]], 1)
    cache = sparse_attn.SqueezedCache(prepared(model, text), model)
    with pytest.raises(ValueError, match="requires a cache that can be cropped"):
        model.generate(text, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3,
                       **past(model, cache))  # fmt: skip


# ---- refused calls -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_input", [1, 9])
def test_generate_wants_the_ids_of_the_context_too(model, n_input):
    text = ids(2, n_input)
    cache = sparse_attn.SqueezedCache(prepared(model, text), model)
    with pytest.raises(ValueError, match="no token follows the 150 that the cache holds"):
        generate(model, text[:, S:], cache)


def test_a_padded_step_of_one_token_is_refused(model):
    text = ids(2)
    cache = sparse_attn.SqueezedCache(prepared(model, text), model)
    mask = torch.ones(2, S + 10, dtype=torch.long)
    mask[1, S + 5] = 0
    with torch.no_grad():
        model(text[:, S:], **past(model, cache))
        with pytest.raises(NotImplementedError, match="padding behind a prepared context"):
            model(text[:, :1], attention_mask=mask, **past(model, cache))


@pytest.mark.parametrize("shape", [(2, S), (1, 1, S), ()])
def test_a_context_is_one_text(model, shape):
    with pytest.raises(ValueError, match=r"ids: got shape .* expected \[S\] or \[1, S\]"):
        integration.prepare(model, torch.ones(shape, dtype=torch.long), window=WINDOW)


UNSERVED = {
    "Qwen3Next": (
        {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
         "num_hidden_layers": 4},
        "layers of type linear_attention",
    ),
    "Bloom": ({"n_layer": 2, "n_head": 4}, "BloomForCausalLM computes its attention itself"),
    "DeepseekV3": (
        {"num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "kv_lora_rank": 32,
         "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
         "first_k_dense_replace": 1},
        "layer 0 of the model does not cache the keys and values that it attends to",
    ),
    "Mistral": ({"sliding_window": 4096}, "a sliding window"),
    "Llama": ({"is_causal": False}, "attends in both directions"),
}  # fmt: skip


@pytest.mark.parametrize("family", UNSERVED)
def test_other_models_are_refused_before_the_work(family, monkeypatch):
    options, message = UNSERVED[family]
    other, lengths = like(family, **options), []
    before, forward = implementations(other.config), integration.decoder(other).forward

    def watched(input_ids, **given):
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **given)

    monkeypatch.setattr(integration.decoder(other), "forward", watched)
    with pytest.raises(NotImplementedError, match=message):
        prepared(other, ids())
    assert lengths in ([], [2])
    assert implementations(other.config) == before


def test_encoders_are_refused():
    sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1}
    other = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_heads=4))
    with pytest.raises(NotImplementedError, match="has an encoder"):
        prepared(other, ids())


def test_another_scale_than_the_prepared_one_is_refused(model):
    text = ids()
    cache = sparse_attn.SqueezedCache(prepared(model, text), model)
    model.model.layers[1].self_attn.scaling = 0.3
    with pytest.raises(NotImplementedError, match="scaling: got 0.3.* prepared with 0.25"):
        generate(model, text, cache)


# ---- the model, and what is left of it ---------------------------------------------------------


def test_the_fingerprint_knows_every_weight_and_the_configuration(model):
    want = fingerprint(model)
    for name, weight in model.model.named_parameters():
        before = weight.data.clone()
        weight.data += 0.1
        assert fingerprint(model) != want, name
        weight.data = before
    for name, x in (("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("attention_bias", True)):
        before = getattr(model.config, name)
        setattr(model.config, name, x)
        assert fingerprint(model) != want, name
        setattr(model.config, name, before)
    assert fingerprint(model) == want


def test_the_fingerprint_stays_where_keys_do(model, tmp_path):
    want = fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert fingerprint(loaded) == want
    model.set_attn_implementation("eager")
    model.config.pad_token_id, model.config.use_cache = 7, False
    assert fingerprint(model.to(torch.bfloat16)) == want


def test_a_vision_tower_keeps_its_implementation():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    both = transformers.LlavaConfig(vision_config=vision, text_config=config(), image_token_id=63)
    model = transformers.LlavaForConditionalGeneration(both).eval()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    before, text = implementations(model.config), ids().clamp(max=62)
    want = generate(model, text, None)
    context = prepared(model, text, sparsity=0.0)
    assert implementations(model.config) == before
    cache = sparse_attn.SqueezedCache(context, model)
    assert torch.equal(generate(model, text, cache), want)
    assert model.config.vision_config._attn_implementation == "eager"
    model.get_decoder().set_attn_implementation("sdpa")
    assert implementations(model.config) == before


def test_copies_share_the_context(model):
    text, more = ids(1), ids(1)
    more[:, :S] = text[:, :S]
    model.eval()
    cache = sparse_attn.SqueezedCache(prepared(model, text, sparsity=0.0), model)
    with torch.no_grad():
        model(text[:, S : S + 4], **past(model, cache))
    copied, length = copy.deepcopy(cache), cache.get_seq_length()
    assert copied.context is cache.context
    assert all(a.context is b.context for a, b in zip(copied.layers, cache.layers, strict=True))
    got = generate(model, text, copied)
    assert cache.get_seq_length() == length and cache.kept()[0].decode is None
    again = generate(model, text, cache)
    model.set_attn_implementation("sdpa")
    want = generate(model, text, None)
    assert torch.equal(got, want) and torch.equal(again, want)


def test_prepare_lets_go_of_a_layer_that_is_clustered(model, monkeypatch):
    whole, seen, alive = build.build_layer, [], []

    def watched(key, value, query, *args):
        alive.append(sum(x() is not None for x in seen))
        seen.extend(weakref.ref(x) for x in (key, value, query))
        return whole(key, value, query, *args)

    monkeypatch.setattr(build, "build_layer", watched)
    prepared(model, ids())
    assert alive == [0, 0] and len(seen) == 6


# ---- what is calibrated and reported -----------------------------------------------------------


def queries_of(model, text):
    """The queries of every layer, dense attention over the whole text."""
    found = []

    def attend(module, query, *args, **kwargs):
        found.append(query)
        return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, *args, **kwargs
        )

    transformers.AttentionInterface.register("hooked", attend)
    model.set_attn_implementation("hooked")
    with torch.no_grad():
        model(text)
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("chunk", [7, 64, 4096])
@pytest.mark.parametrize("family", ["Llama", "Granite"])
def test_the_scores_are_those_of_the_last_queries(family, chunk):
    """Whatever the chunks; Granite multiplies its scores by a number of its own."""
    model = like(family, **({"attention_multiplier": 0.5} if family == "Granite" else {}))
    text = ids(1)[:, :S]
    context = prepared(model, text, chunk=chunk)
    assert context.parameters.scale == (0.5 if family == "Granite" else None)
    for layer, query in zip(context.layers, queries_of(model, text), strict=True):
        want = cluster_scores(
            query[:, :, -WINDOW:], layer.centroids, layer.log_counts, False,
            0.5 if family == "Granite" else 0.25,
        )[0]  # fmt: skip
        torch.testing.assert_close(layer.scores, want, rtol=1e-3, atol=1e-6)


def test_a_scale_of_the_models_own_is_used():
    model, text = like("Granite", attention_multiplier=0.5), ids()
    want = generate(model, text, None)
    cache = sparse_attn.SqueezedCache(prepared(model, text, sparsity=0.0), model)
    assert torch.equal(generate(model, text, cache), want)


def test_what_is_kept_is_weighted_by_tokens(model):
    text = ids(1)
    cache = sparse_attn.SqueezedCache(prepared(model, text, sparsity=0.7), model)
    layer, shares, counts = cache.layers[0], [], (2, 7)
    for part in text[:, S:].split(counts, dim=1):
        with torch.no_grad():
            model(part, **past(model, cache))
        shares.append(layer.tokens.double().mean().item() / (S - WINDOW))
    assert abs(shares[0] - shares[1]) > 1e-3
    want = sum(x * n for x, n in zip(shares, counts, strict=True)) / sum(counts)
    assert layer.kept().prefill == pytest.approx(want)

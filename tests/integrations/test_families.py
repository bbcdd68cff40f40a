"""Small random models of each family against transformers' own sdpa: a full budget changes nothing.

Also methods per layer and per phase, and sliding windows.
"""

import copy

import pytest
import torch

from sparse_attn import Dense, FlexPrefill, api, settings
from sparse_attn.methods import METHODS
from tests.cases import FLOOR, assert_as_accurate

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("sparse_attn.integrations.transformers")

TOKENS = 36
WINDOW = 8  # of the layers that slide
LENGTHS = (TOKENS, 21)
EVERYTHING = FlexPrefill(gamma=1.0, tau=0.0, min_budget=1 << 20, block_size=16)
FULL_BUDGET = {  # options with which a method keeps everything
    "dense": {},
    "sale": {"threshold": 0.0, "min_length": 0},
    "hip": {"budget": 1 << 16, "sink": 0, "window": 0},
    "infinite_hip": {"keeps": (1 << 16,) * 3, "sink": 0, "window": 0},
}
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "initializer_range": 0.4, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
UNTIED = {"query_pre_attn_scalar": 5, "tie_word_embeddings": False}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
STRAIGHT = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {**MIXED, "use_sliding_window": True}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {**MIXED, **UNTIED, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3", {**MIXED, **UNTIED}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def build(family, **options):
    name, of_family = FAMILIES[family]
    stem = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{stem}Config")(**{**SIZES, **of_family, **options})
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if family == "mixtral":
        model.set_experts_implementation("eager")  # grouped products are not for float64
    if family == "gemma2":
        model._supports_sdpa = True  # true of it without a soft cap
    return model


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.fixture
def ids():
    return torch.randint(1, 48, (2, TOKENS))


@pytest.fixture(scope="module")
def name():
    integration.register(EVERYTHING, "family", fallback=False)
    return "family"


def padding(side):
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    hidden = slice(None, -LENGTHS[1]) if side == "left" else slice(LENGTHS[1], None)
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


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits(model, name, ids, side):
    real = torch.ones(2, TOKENS).bool() if side is None else padding(side).bool()
    given = None if side is None else padding(side)
    assert_same_logits(model, name, lambda m, n: logits(m, n, ids, attention_mask=given)[real])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_half_precision(name, ids, family, dtype):
    model, real = build(family, initializer_range=0.2).to(dtype), padding("left")
    exact = logits(copy.deepcopy(model).double(), "sdpa", ids, attention_mask=real)
    dense, got = (logits(model, n, ids, attention_mask=real) for n in ("sdpa", name))
    assert got.dtype == dtype
    real = real.bool()
    assert_as_accurate(got[real], exact[real], dense[real], FLOOR[dtype])


@pytest.mark.parametrize("method", [name for name in METHODS if name in FULL_BUDGET])
def test_every_method_at_its_full_budget(model, ids, method):
    integration.register(METHODS[method](**FULL_BUDGET[method]), "full", fallback=False)
    real = padding("left")
    assert_same_logits(
        model, "full", lambda m, n: logits(m, n, ids, attention_mask=real)[real.bool()]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_squeezed_at_its_full_budget(ids, family):
    """Threshold 0 behind a prepared context; windows are refused, which is said."""
    squeezed = pytest.importorskip("sparse_attn.integrations.squeezed")
    n, given = 24, {"window": 4, "clusters": 0.3, "sparsity": 0.0, "progress": False}
    if FAMILIES[family][1].get("sliding_window"):
        with pytest.raises(NotImplementedError, match="a sliding window: Squeezed Attention"):
            squeezed.prepare(build(family), ids[0, :n], **given)
    if family.startswith("gemma"):  # always has a window
        return
    model = build(family, **STRAIGHT)
    ids[:, :n] = ids[0, :n]
    context = squeezed.prepare(model, ids[0, :n], **given)

    def run(m, n_or_context):
        if n_or_context == "sdpa":
            return logits(m, "sdpa", ids)[:, n:]
        cache = squeezed.SqueezedCache(context, m)
        return logits(m, squeezed.NAME, ids[:, n:], **{squeezed.cache_argument(m): cache})

    assert_same_logits(model, "squeezed", run)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_in_batches_and_beams(model, name, ids, beams):
    def run(n):
        model.set_attn_implementation(n)
        return model.generate(
            ids[:, -20:], attention_mask=padding("left")[:, -20:], max_new_tokens=8,
            do_sample=False, num_beams=beams,
        )  # fmt: skip

    want = run("sdpa")
    assert len(want[:, 20:].unique()) > 3
    assert torch.equal(run(name), want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_chunks_with_sliding_windows(name, ids, family, cache, side):
    """Chunks longer and shorter than the window, single tokens, chunks of padding alone."""
    model, real = build(family), padding(side)

    def run(m, n):
        past = (
            transformers.DynamicCache(config=m.config)
            if cache == "dynamic"
            else transformers.StaticCache(config=m.config, max_cache_len=64)
        )
        found, start = [], 0
        for chunk in (13, 5, 1, 1, 16):
            end = start + chunk
            given = {"attention_mask": real[:, :end], "past_key_values": past}
            found.append(logits(m, n, ids[:, start:end], **given))
            start = end
        return torch.cat(found, 1)[real.bool()]

    assert_same_logits(model, name, run)


def test_a_window_is_not_left_to_the_method(ids):
    """Layers that slide are exact however little the method keeps, and it does not see them."""
    calls = []

    def spy(query, key, value, layer, **options):
        calls.append(layer)
        return api.attention(query, key, value, "dense", **options)

    integration.register_function(spy, "spy_window")
    model = build("gemma3")
    assert_same_logits(model, "spy_window", lambda m, n: logits(m, n, ids))
    assert calls == [1]
    assert_same_logits(model, "spy_window", lambda m, n: logits(m, n, ids[:, :WINDOW]))
    assert calls == [1, 0, 1]  # the window hides nothing yet


def test_a_soft_cap_is_refused(name, ids):
    model = build("gemma2", attn_logit_softcapping=50.0)
    with pytest.raises(NotImplementedError, match="^softcap: .*use 'eager'"):
        logits(model, name, ids)


@pytest.fixture
def used(monkeypatch):
    """Which config each call of `attention` got, with its number of queries."""
    calls, attention = [], api.attention

    def spy(query, key, value, method, **options):
        calls.append((method, query.shape[2]))
        return attention(query, key, value, method, **options)

    monkeypatch.setattr(api, "attention", spy)
    return calls


def test_methods_by_layer_and_phase(ids, used):
    model = build("llama")
    small = FlexPrefill(gamma=0.5, min_budget=16, block_size=16)
    integration.register(small, "phases", layers={1: EVERYTHING}, fallback=False)
    model.set_attn_implementation("phases")
    model.generate(ids, max_new_tokens=3, do_sample=False)
    prefill = [(small, TOKENS), (EVERYTHING, TOKENS)]
    assert used == prefill + [(Dense(), 1)] * 4
    used.clear()
    integration.register("dense", "phases", decode=EVERYTHING)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert used == [(Dense(), TOKENS)] * 2 + [(EVERYTHING, 1)] * 2


def test_a_file_of_methods_by_layer(ids, used, tmp_path):
    small = FlexPrefill(gamma=0.5, min_budget=16, block_size=16)
    settings.write(tmp_path / "mine.json", settings.Settings(small, {1: Dense()}))
    integration.register(tmp_path / "mine.json", "filed", fallback=False)
    logits(build("llama"), "filed", ids)
    integration.register(str(tmp_path / "mine.json"), "filed", layers={0: EVERYTHING})
    logits(build("llama"), "filed", ids)
    assert [config for config, _ in used] == [small, Dense(), EVERYTHING, Dense()]


def test_each_model_has_its_own_method(ids, used):
    integration.register("dense", "of_one")
    integration.register(EVERYTHING, "of_other", fallback=False)
    one, other = build("llama"), build("qwen3")
    one.set_attn_implementation("of_one")
    other.set_attn_implementation("of_other")
    with torch.no_grad():
        one(input_ids=ids), other(input_ids=ids), one(input_ids=ids)
    assert [config for config, _ in used] == [Dense()] * 2 + [EVERYTHING] * 2 + [Dense()] * 2


@pytest.mark.parametrize(
    "method", [name for name, m in METHODS.items() if not getattr(m, "needs_context", False)]
)
def test_defaults_on_a_short_prompt(ids, method):
    """Every method serves a short prompt, by itself or by its dense path."""
    integration.register(method, "short")
    model = build("llama")
    assert_same_logits(model, "short", lambda m, n: logits(m, n, ids))


def test_bad_layers_are_refused(ids):
    with pytest.raises(ValueError, match="layers: got layer -1, expected whole numbers from 0"):
        integration.register("dense", "bad", layers={-1: "dense"})
    with pytest.raises(ValueError, match="method: got 'flex'"):
        integration.register("dense", "bad", layers={0: "flex"})
    with pytest.raises(ValueError, match="method: got 'flex'"):
        integration.register("dense", "bad", decode="flex")
    integration.register("dense", "bad", layers={2: "dense"})
    with pytest.raises(ValueError, match="layers: .* layer 2, but the model has the layers 0 to 1"):
        logits(build("llama"), "bad", ids)


def test_switching_back_leaves_no_trace(ids, name):
    """Attributes, hooks, parameters and results are those of a model that was never switched."""

    def state(m):
        modules = [
            (n, type(x).__name__, sorted(vars(x)), x.forward.__func__, len(x._forward_hooks))
            for n, x in m.named_modules()
        ]
        return modules, {k: v.clone() for k, v in m.state_dict().items()}, m.config.to_dict()

    model, never = build("mistral"), build("mistral")
    want = logits(never, "sdpa", ids)
    before = state(never)
    logits(model, name, ids)
    assert torch.equal(logits(model, "sdpa", ids), want)
    after = state(model)
    assert after[0] == before[0] and after[2] == before[2]
    assert all(torch.equal(after[1][k], v) for k, v in before[1].items())
    assert after[1].keys() == before[1].keys()

"""`model.generate` over a prepared context, against dense generation."""

import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
integration = pytest.importorskip("sparse_attn.integrations.squeezed")

import sparse_attn  # noqa: E402
from sparse_attn.__main__ import main  # noqa: E402
from sparse_attn.squeezed import SqueezedContext  # noqa: E402
from tests.cases import assert_as_accurate  # noqa: E402

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model"
S, WINDOW = 150, 20


def config(**options):
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return transformers.LlamaConfig(**{**sizes, **options})


@pytest.fixture
def model():
    return transformers.LlamaForCausalLM(config()).eval()


def ids(batch=2, n_input=9):
    context = torch.randint(1, 64, (1, S)).expand(batch, -1)
    return torch.cat([context, torch.randint(1, 64, (batch, n_input))], 1)


def prepared(model, text, **options):
    given = {"window": WINDOW, "progress": False, "iterations": 5, "chunk": 64} | options
    return integration.prepare(model, text[0, :S], **given)


def generate(model, text, cache, n=12):
    argument = integration.cache_argument(model)
    return model.generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=n, do_sample=False,
        **{argument: cache},
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"coarse": 0.02}, {"shared": True}], ids=str)
@pytest.mark.parametrize("batch, n_input", [(1, 1), (1, 9), (3, 9)])
def test_threshold_0_generates_what_dense_attention_does(model, options, batch, n_input):
    text = ids(batch, n_input)
    want = generate(model, text, None)
    assert len(want[0, -12:].unique()) > 3
    context = prepared(model, text, sparsity=0.0, clusters=0.1, **options)
    assert model.config._attn_implementation == "sdpa"
    cache = sparse_attn.SqueezedCache(context, model)
    cache.check_ids(text)
    assert torch.equal(generate(model, text, cache), want)
    kept = cache.kept()
    assert len(kept) == 2
    for layer in kept:
        assert layer.decode == 1.0 and layer.per_head == [1.0] * (2 if options.get("shared") else 4)
        assert layer.prefill == (1.0 if n_input > 1 else None)


def test_what_is_kept_is_reported_per_layer(model):
    text = ids()
    context = prepared(model, text, sparsity=0.8)
    cache = sparse_attn.SqueezedCache(context, model)
    generate(model, text, cache)
    for layer in cache.kept():
        assert 0 < layer.prefill < 0.9 and 0 < layer.decode < 0.9 and len(layer.per_head) == 4
    assert len({x.decode for x in cache.kept()}) == 2
    cache.reset()
    assert cache.get_seq_length() == S and cache.kept()[0].decode is None


def test_a_turn_may_follow_a_turn(model):
    """The cache goes on behind what was generated, as a dynamic one does."""
    text = ids(1)
    want = generate(model, text, None)
    more = torch.cat([want, torch.randint(1, 64, (1, 7))], 1)
    want = generate(model, more, None)
    cache = sparse_attn.SqueezedCache(prepared(model, text, sparsity=0.0), model)
    first = generate(model, text, cache)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert torch.equal(generate(model, more, cache), want)


def test_a_token_costs_no_copy_of_the_tail(model):
    text = ids(1)
    cache = sparse_attn.SqueezedCache(prepared(model, text), model)
    generate(model, text, cache, n=2)
    layer, pointers = cache.layers[0], set()
    state = torch.randn(1, 2, 1, 16)
    for _ in range(1000):
        layer.update(state, state)
        pointers.add(layer.keys.data_ptr())
    assert len(pointers) <= 3


def test_beams_and_crops(model):
    text = ids(2)
    context = prepared(model, text, sparsity=0.0)
    cache = sparse_attn.SqueezedCache(context, model)
    argument = {integration.cache_argument(model): cache}
    got = model.generate(text, attention_mask=torch.ones_like(text), num_beams=3, max_new_tokens=6,
                         do_sample=False, **argument)  # fmt: skip
    model.set_attn_implementation("sdpa")
    want = model.generate(text, attention_mask=torch.ones_like(text), num_beams=3,
                          max_new_tokens=6, do_sample=False)  # fmt: skip
    assert torch.equal(got, want)
    length = cache.get_seq_length()
    cache.layers[0].crop(-3)
    assert cache.layers[0].get_seq_length() == length - 3
    for wrong in (-100, 3):
        with pytest.raises(ValueError, match=f"crop: got {wrong}.*cannot be cropped"):
            cache.layers[0].crop(wrong)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_the_demonstration_model(model_dtype, tmp_path):
    """Real keys, a file in between: threshold 0 gives dense attention's tokens."""
    big = transformers.LlamaForCausalLM.from_pretrained(DEMO_MODEL, dtype=model_dtype).eval()
    source = Path(sparse_attn.__file__).with_name("api.py").read_bytes()
    text = torch.tensor(list(source[:820]))[None]
    want = generate(big, text, None, n=10)
    context = integration.prepare(big, text[0, :800], progress=False, sparsity=0.0, iterations=4)
    context.save(tmp_path / "x")
    cache = sparse_attn.SqueezedCache(SqueezedContext.load(tmp_path / "x"), big)
    got = generate(big, text, cache, n=10)
    if model_dtype == torch.float32:  # bfloat16 rounds differently in another order of sums
        assert torch.equal(got, want)
    cache.reset()
    behind = text[:, 800:]
    with torch.no_grad():
        logits = big(behind, **{integration.cache_argument(big): cache}).logits
        big.set_attn_implementation("sdpa")
        dense = big(text).logits[:, 800:]
        exact = big.double()(text).logits[:, 800:]
        big.to(model_dtype)
    assert_as_accurate(logits, exact, dense, floor=1e-5)
    sparse = sparse_attn.SqueezedCache(context.with_sparsity(0.9), big)
    generate(big, text, sparse, n=10)
    shares = [x.decode for x in sparse.kept()]
    assert 0 < sum(shares) / 4 < 0.5 and len(set(shares)) == 4


def test_what_does_not_fit_is_said(model):
    text = ids()
    context = prepared(model, text)
    other = transformers.LlamaForCausalLM(config(num_hidden_layers=3))
    with pytest.raises(ValueError, match="has 2 layers, the model 3"):
        sparse_attn.SqueezedCache(context, other)
    other = transformers.LlamaForCausalLM(config(num_key_value_heads=4))
    with pytest.raises(ValueError, match="has 2 KV heads, the model 4"):
        sparse_attn.SqueezedCache(context, other)
    cache = sparse_attn.SqueezedCache(context, model)
    with pytest.raises(ValueError, match="do not begin with the 150 tokens"):
        cache.check_ids(text + 1)
    padded = torch.ones_like(text)
    padded[0, S : S + 3] = 0
    with pytest.raises(NotImplementedError, match="padding behind a prepared context"):
        model.generate(text, attention_mask=padded, max_new_tokens=2,
                       **{integration.cache_argument(model): cache})  # fmt: skip
    with pytest.raises(NotImplementedError, match="serves calls with a SqueezedCache"):
        model(text[:, :5], use_cache=False)
    half = model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="the context is torch.float32 on cpu, the model"):
        generate(half, text, sparse_attn.SqueezedCache(context, half))


def test_the_model_is_the_one_that_prepared(model, tmp_path):
    context = prepared(model, ids())
    context.save(tmp_path / "x")
    loaded = SqueezedContext.load(tmp_path / "x")
    assert loaded.fingerprint == context.fingerprint is not None
    integration.check_model(loaded, model)
    rope = {"rope_type": "default", "rope_theta": 5e5}
    turned = transformers.LlamaForCausalLM(config(rope_parameters=rope))
    turned.load_state_dict(model.state_dict())
    for other in (transformers.LlamaForCausalLM(config()), turned):
        with pytest.raises(ValueError, match="prepared by another model"):
            sparse_attn.SqueezedCache(loaded, other)


def test_the_mask_of_one_token_behind_the_context_is_read(model):
    text = ids(2, 1)
    cache = sparse_attn.SqueezedCache(prepared(model, text), model)
    padded = torch.ones_like(text)
    padded[1, :4] = 0
    with pytest.raises(NotImplementedError, match="padding behind a prepared context"):
        model.generate(text, attention_mask=padded, max_new_tokens=2,
                       **{integration.cache_argument(model): cache})  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 150}, "ids: 150 tokens, expected more than window, 150"),
        ({"sparsity": 1.0}, "sparsity: got 1.0"),
        ({"chunk": 0}, "chunk: got 0"),
        ({"scale": 0.5}, "layer 0 multiplies its scores by 0.25, the argument by 0.5"),
        ({}, "layer 1 multiplies its scores by 0.3, an earlier layer by 0.25"),
    ],
    ids=str,
)
def test_prepare_checks_before_it_computes(model, options, message):
    if not options:
        model.model.layers[1].self_attn.scaling = 0.3
    elif "scale" not in options:
        model.model.forward = None  # must not be called
    with pytest.raises((ValueError, NotImplementedError), match=message):
        prepared(model, ids(), **options)
    assert model.config._attn_implementation == "sdpa"


def test_prepare_holds_on_to_nothing(model):
    prepared(model, ids())
    known = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    assert known[integration.PREPARE] is integration.forward


def command(capsys, *words):
    main(["squeeze", *map(str, words)])
    return capsys.readouterr().out


def test_command_line(tmp_path, capsys):
    """Build, look, ask: on the demonstration model and a text of its own."""
    text, file, figure = tmp_path / "text.py", tmp_path / "text.sf", tmp_path / "kept.png"
    text.write_bytes(Path(sparse_attn.__file__).with_name("api.py").read_bytes()[:1000])
    options = ("--text", text, "--length", 900, "--iterations", 3, "--coarse", 0.01)
    assert "900 tokens in" in command(capsys, "build", file, *options)
    shown = command(capsys, "info", file)
    assert "length: 900" in shown and "coarse: 0.01" in shown and "model: model" in shown
    asked = command(capsys, "run", file, "--text", text, "--tokens", 3, "--figure", figure)
    assert "squeezed, " in asked and "dense, " in asked and "layer 3: input" in asked
    assert figure.stat().st_size < 100_000
    asked = command(capsys, "run", file, "--ask", "def ", "--tokens", 2, "--sparsity", 0)
    assert "nominal 100%" in asked and "layer 0: input 100.0%, generated 100.0%" in asked
    text.write_text("another text")
    with pytest.raises(SystemExit, match="--text: .*does not begin as the one"):
        command(capsys, "run", file, "--text", text)
    with pytest.raises(SystemExit, match="--ask: got an empty question"):
        command(capsys, "run", file, "--ask", "")


@pytest.mark.parametrize(
    "words, message",
    [
        (("info", "nowhere"), "nowhere: no such file"),
        (("run", "nowhere"), "nowhere: no such file"),
        (("build", "x", "--model", "nowhere"), "no config.json in nowhere"),
        (("build", "x", "--length", "300", "--sparsity", "1"), "sparsity: got 1.0"),
        (("build", "x", "--length", "100"), "100 tokens, expected more than window, 100"),
        (("build", "x", "--length", "0"), "--length: got 0, expected 1 or more"),
        (("run", "x", "--tokens", "0"), "--tokens: got 0, expected 1 or more"),
        (("build", "no/x"), "file: no folder .*no"),
        (("run", "x", "--figure", "no/x.png"), "--figure: no folder .*no"),
    ],
)
def test_command_line_errors(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["squeeze", *words])
    assert not list(tmp_path.iterdir())


def test_only_a_missing_module_asks_for_pip(tmp_path, monkeypatch):
    """A broken import of our own is no missing package; a missing one is said before the work."""
    words = ["squeeze", "run", str(tmp_path / "nowhere"), "--figure", str(tmp_path / "x.png")]
    monkeypatch.delattr("sparse_attn.plot.plot_kept")
    with pytest.raises(ImportError, match="plot_kept"):
        main(words)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="matplotlib.*pip install"):
        main(words)

import re

import pytest
import torch

import sparse_attn
from sparse_attn import METHODS, BlockIndex, FlexPrefill, HiP, InfiniteHiP, Sale, cpu_isa, crossover
from tests import hip
from tests.cases import Shape, inputs
from tests.ops.test_flex_prefill_select import structured


def test_index_can_be_reused():
    query, key, value = structured("sharp", 1500)
    index = sparse_attn.select(query, key, "flex_prefill")
    want = sparse_attn.attention(query, key, value, "flex_prefill", fallback=False)
    assert torch.equal(sparse_attn.attention(query, key, value, index=index), want)


EVERY = {
    "dense": "dense",
    "flex_prefill": FlexPrefill(block_size=32, min_budget=64, gamma=0.6),
    "sale": Sale(threshold=0.02),
    "hip": HiP(budget=64, q_block=32, window=50),
    "infinite_hip": InfiniteHiP((32, 8), (128, 64), (4, 1), 32, 20, 50, merge_heads="group"),
}


def test_every_method_by_its_name_alone_is_here():
    alone = {n for n, m in METHODS.items() if not getattr(m, "needs_context", False)}
    assert set(EVERY) == alone


@pytest.mark.parametrize("shape", [(301, 301), (77, 413), (1, 300)], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_selecting_first_is_the_same_call(name, shape):
    """Bit for bit, with GQA, odd lengths, Tq < Tk, and through torch.compile."""
    query, key, value = inputs(Shape(B=2, Hq=4, Hkv=2, Tq=shape[0], Tk=shape[1]))
    config = EVERY[name]

    def in_two_steps(q, k, v):
        return sparse_attn.attention(q, k, v, index=sparse_attn.select(q, k, config))

    index = sparse_attn.select(query, key, config)
    index.validate(*shape)
    want, stats = sparse_attn.attention(
        query, key, value, config, fallback=False, return_stats=True
    )
    assert torch.equal(in_two_steps(query, key, value), want)
    assert index.density(*shape) == stats.density
    if shape[0] == 77:
        compiled = torch.compile(in_two_steps, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query, key, value), want)
        graph = torch.compile(sparse_attn.select, fullgraph=True, backend="aot_eager")
        assert graph(query, key, config)[2:] == index[2:]


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("name", ["dense", "hip", "infinite_hip"])
def test_caches_in_select_and_explain(name, page_size):
    query, key, value = inputs(Shape(B=2, Hq=4, Hkv=2, Tq=40, Tk=304))
    key, table, lengths = hip.paged(key, page_size, [297, 130])
    value = hip.paged(value, page_size, [297, 130])[0]
    cache, config = {"block_table": table, "kv_lengths": lengths}, EVERY[name]
    index = sparse_attn.select(query, key, config, **cache)
    got = sparse_attn.attention(query, key, value, index=index, **cache)
    want = sparse_attn.attention(query, key, value, config, fallback=False, **cache)
    assert torch.equal(got, want)
    parts = parts_of(sparse_attn.explain(query, key, value, config, fallback=False, **cache))
    assert "cpp: used" in parts["block_sparse_attention"]
    assert (len(parts) == 1) == (name == "dense")
    text = sparse_attn.explain(query, key, value, index=index, **cache)
    assert "over the index given" in text and "cpp: used" in text
    text = sparse_attn.explain(query, key, value, "sale", **cache)
    assert "cannot serve this call: it selects from keys in one piece" in text
    with pytest.raises(NotImplementedError, match="'sale' cannot serve this call: it selects"):
        sparse_attn.select(query, key, "sale", **cache)


NO = torch.zeros(1, 3, 70, 64)
WRONG = [
    ({"key": NO}, ValueError, "query: 2 heads, expected a multiple of key's 3"),
    ({"key": NO[:, :1, :, :32]}, ValueError, "key: head_dim is 32, expected 64 as in query"),
    ({"key": [1]}, TypeError, "key: expected a tensor"),
    ({"scale": "big"}, TypeError, "scale: got 'big', expected a number"),
    ({"scale": float("nan")}, ValueError, "scale: got nan, expected a number"),
    ({"causal": 1}, TypeError, "causal: got 1, expected True or False"),
    ({"method": "flash"}, ValueError, "method: got 'flash', expected one of"),
    ({"method": 3}, TypeError, "method: got 3"),
    ({"method": Sale(threshold=[0.1])}, ValueError, "threshold: .* 2"),
    ({"backend": "x"}, ValueError, "backend: got 'x', expected one of"),
    ({"kv_lengths": torch.ones(2)}, TypeError, "kv_lengths: expected dtype int32"),
    ({"block_table": torch.ones(1, 9)}, ValueError, "key: page_size is 70"),
]


@pytest.mark.parametrize("change, error, message", WRONG, ids=[m for *_, m in WRONG])
def test_three_functions_refuse_alike(change, error, message):
    query, key, value = inputs(Shape())
    arguments = {"query": query, "key": key, "method": "hip"} | change
    for call in (sparse_attn.attention, sparse_attn.explain):
        with pytest.raises(error, match=message):
            call(value=value, fallback=False, **arguments)
    with pytest.raises(error, match=message):
        sparse_attn.select(**arguments)


def test_heads_and_tokens_in_the_wrong_order():
    query, key, value = (torch.randn(1, 300, heads, 32) for heads in (8, 2, 2))
    longer = torch.randn(1, 400, 8, 32)  # a chunk, or a mistake: no multiple of the keys' 300
    for call in (
        lambda q: sparse_attn.attention(q, key, value),
        lambda q: sparse_attn.explain(q, key, value),
        lambda q: sparse_attn.select(q, key),
    ):
        for wrong in (query, longer):
            with pytest.raises(ValueError, match=r"query: .* expected|first queries .*") as error:
                call(wrong)
            assert "transpose(1, 2) what is [B, T, H, D]" in str(error.value)
    with pytest.raises(ValueError) as error:  # three heads are no layout
        sparse_attn.attention(*inputs(Shape(Hq=3, Hkv=2)))
    assert "transpose" not in str(error.value)


def test_statistics_in_a_whole_graph():
    query, key, value = inputs(Shape())
    run = lambda *x: sparse_attn.attention(*x, "hip", return_stats=True)  # noqa: E731
    with pytest.raises(Exception, match="return_stats=True reads the index on the host"):
        torch.compile(run, fullgraph=True, backend="eager")(query, key, value)


def test_fallback_is_reported_and_can_be_refused():
    query, key, value = inputs(Shape(Tq=300, Tk=300))
    out, lse, stats = sparse_attn.attention(query, key, value, return_lse=True, return_stats=True)
    assert stats.density == 1.0 and "dense is faster below" in stats.fallback
    assert lse.shape == query.shape[:3]
    assert torch.equal(out, sparse_attn.attention(query, key, value, "dense"))
    stats = sparse_attn.attention(query, key, value, fallback=False, return_stats=True)[1]
    assert stats.fallback is None and stats.method == "flex_prefill"
    assert "takes the dense path" in sparse_attn.explain(query, key, value)
    assert "takes the dense path" not in sparse_attn.explain(query, key, value, fallback=False)


@pytest.mark.parametrize("sink, window", [(0, 1), (40, 0), (20, 100), (0, 300), (299, 1)])
def test_density_counts_sink_and_window(sink, window):
    n, block = 300, 16
    none = torch.zeros(1, 1, -(-n // block), -(-n // block), dtype=torch.bool)
    index = BlockIndex.from_mask(none, block, block)._replace(sink=sink, window=window)
    i = torch.arange(n)
    seen = (i < sink) | (i > i[:, None] - window)
    blocks = [
        torch.nn.functional.pad(x.tril(), (0, -n % block, 0, -n % block))
        .unflatten(1, (-1, block))
        .unflatten(0, (-1, block))
        .any(3)
        .any(1)
        for x in (seen, torch.ones(n, n, dtype=torch.bool))
    ]
    want = blocks[0].sum().item() / blocks[1].sum().item()
    assert index.density(n, n) == pytest.approx(want)
    assert (want == 1) == (max(sink, window) >= 299)


def test_decoding_takes_the_dense_path():
    query, key, value = inputs(Shape(Tq=1, Tk=20000))
    stats = sparse_attn.attention(query, key, value, return_stats=True)[1]
    assert re.match(r"dense is faster below \d+ queries \(1 given\)", stats.fallback)


def test_a_crossover_that_nobody_measured_is_called_a_guess(monkeypatch):
    query, key, value = inputs(Shape(Tq=64, Tk=300))
    monkeypatch.setattr(crossover, "MEASURED", {"flex_prefill": {}})
    reason = crossover.dense_is_faster("flex_prefill", "triton", query, key.shape[2])
    assert "below 16384 keys (300 given)" in reason and "not been measured on triton" in reason
    assert crossover.dense_is_faster("dense", "triton", query, key.shape[2]) is None
    assert crossover.dense_is_faster("flex_prefill", "reference", query, key.shape[2]) is None


def test_explain_names_every_backend():
    query, key, value = inputs(Shape(Tq=64, Tk=64))
    text = sparse_attn.explain(query, key, value)
    assert all(name in text for name in ("cuda: ", "triton: ", "cpp: used", "reference: "))
    text = sparse_attn.explain(query, key, value, backend="reference")
    assert "reference: used" in text


OFFICIAL = FlexPrefill(variant="official", min_budget=0)


def parts_of(text):
    """What `explain` says of each operator: {operator: [its heading's end, its backends]}."""
    parts = {}
    for line in text.split("\n"):
        if line.startswith("  "):
            parts[list(parts)[-1]].append(line.strip())
        elif "method" not in line:
            name, _, rest = line.partition(":")
            parts[name] = [rest.strip()]
    return parts


def test_explain_and_stats_name_the_backend_that_selects():
    query, key, value = structured("sharp", 600)
    text = sparse_attn.explain(query, key, value, OFFICIAL, fallback=False)
    parts = parts_of(text)
    assert "reference: used" in parts["flex_prefill_select"]
    assert "cpp: the official variant is served by the reference" in parts["flex_prefill_select"]
    assert "cpp: used" in parts["block_sparse_attention"]
    stats = sparse_attn.attention(
        query, key, value, OFFICIAL, fallback=False, return_stats=True
    )[1]  # fmt: skip
    assert (stats.backend, stats.selected_by) == ("cpp", "reference")
    stats = sparse_attn.attention(query, key, value, "dense", return_stats=True)[1]
    assert stats.selected_by is None


def test_explain_says_that_a_call_would_raise():
    query, key, value = structured("sharp", 600)
    options = {"backend": "cpp", "fallback": False}
    with pytest.raises(NotImplementedError, match="the official variant"):
        sparse_attn.attention(query, key, value, OFFICIAL, **options)
    parts = parts_of(sparse_attn.explain(query, key, value, OFFICIAL, **options))
    assert parts["flex_prefill_select"][0] == "raises NotImplementedError"
    assert not any("used" in line for line in parts["flex_prefill_select"])
    assert "reference: cpp was asked for" in parts["block_sparse_attention"]


def test_explain_sees_autocast():
    query, key, value = (x.double() for x in inputs(Shape(Tq=64, Tk=64)))
    assert "reference: used" in sparse_attn.explain(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        assert "cpp: used" in sparse_attn.explain(query, key, value)


def test_the_environment_forces_a_backend(monkeypatch):
    """End to end: what attends, what selects, what is explained, whose crossover counts."""
    query, key, value = inputs(Shape(Tq=300, Tk=300))
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "reference")
    out, stats = sparse_attn.attention(query, key, value, return_stats=True)
    assert (stats.backend, stats.selected_by, stats.fallback) == ("reference", "reference", None)
    assert torch.equal(out, sparse_attn.attention(query, key, value, backend="reference"))
    text = sparse_attn.explain(query, key, value)
    assert text.count("reference: used") == 2 and "cpp: reference was asked for" in text
    stats = sparse_attn.attention(query, key, value, backend="cpp", return_stats=True)[1]
    assert stats.backend == "cpp", "the argument wins"
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "bogus")
    for call in (
        sparse_attn.attention,
        sparse_attn.explain,
        lambda q, k, v: sparse_attn.select(q, k),
    ):
        with pytest.raises(ValueError, match="SPARSE_ATTN_BACKEND: got 'bogus', expected one of"):
            call(query, key, value)


@pytest.mark.parametrize("index", ["abc", (1, 2), torch.zeros(1)], ids=repr)
def test_an_index_of_another_type_is_refused(index):
    query, key, value = inputs(Shape(Tq=64, Tk=64))
    with pytest.raises(
        TypeError, match=f"index: expected a BlockIndex, got {type(index).__name__}"
    ):
        sparse_attn.attention(query, key, value, index=index)


def test_an_unknown_backend_is_refused():
    query, key, value = inputs(Shape(Tq=64, Tk=64))
    for call in (sparse_attn.attention, sparse_attn.explain):
        with pytest.raises(ValueError, match="backend: got 'x', expected one of"):
            call(query, key, value, backend="x")


def test_the_crossover_is_that_of_the_backend_which_attends():
    """float64 is served by the reference, whatever the C++ kernels would make of the length."""
    query, key, value = (x.double() for x in inputs(Shape(Tq=300, Tk=300)))
    stats = sparse_attn.attention(query, key, value, return_stats=True)[1]
    assert (stats.backend, stats.fallback) == ("reference", None)


def test_methods_say_what_they_cannot_do():
    query, key, value = inputs(Shape(Tq=64, Tk=64))
    for call in (sparse_attn.attention, lambda q, k, v, m, **o: sparse_attn.select(q, k, m, **o)):
        with pytest.raises(NotImplementedError, match="defined for causal prefill; use"):
            call(query, key, value, "flex_prefill", causal=False)
    for name, message in (
        ("flash", r"method: got 'flash', expected one of \['dense', .*\]$"),
        ("flexprefill", r"expected one of .*; did you mean 'flex_prefill'\?"),
        (
            "flex_prefill:gamma=0.9",
            r"in a config: sparse_attn.FlexPrefill\(gamma=\.\.\., tau=\.\.\.",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_attn.attention(query, key, value, name)
    with pytest.raises(TypeError, match="method: got 3"):
        sparse_attn.attention(query, key, value, 3)


@pytest.mark.parametrize("call", [sparse_attn.attention, sparse_attn.explain])
def test_a_misspelt_method_beside_an_index(call):
    query, key, value = inputs(Shape(Hq=2, Hkv=2, Tq=64, Tk=64, D=32))
    index = sparse_attn.select(query, key, "dense")
    with pytest.raises(ValueError, match="^method: got 'hipp', .* did you mean 'hip'"):
        call(query, key, value, "hipp", index=index)
    call(query, key, value, None, index=index)


@pytest.mark.parametrize("call", [sparse_attn.attention, sparse_attn.explain])
def test_no_value(call):
    query, key, _ = inputs(Shape(Hq=2, Hkv=2, Tq=64, Tk=64, D=32))
    with pytest.raises(TypeError, match="^value: expected a tensor"):
        call(query, key, None, "dense")
    with pytest.raises(TypeError, match="^key: expected a tensor"):
        sparse_attn.select(query, None)


def test_an_option_that_the_method_lacks():
    query, key, value = inputs(Shape(Hq=2, Hkv=2, Tq=64, Tk=64, D=32))
    with pytest.raises(ValueError, match=r"^options: hip has no \['budge'\].*mean 'budget'"):
        torch.ops.sparse_attn.attention(query, key, value, "hip", '{"budge": 3}')


@pytest.mark.parametrize(
    ("best", "device", "dtype"),
    [
        ("avx2", "cpu", torch.float32),
        ("avx512", "cpu", torch.float32),
        ("portable", "cpu", torch.float32),
        ("avx512bf16", "cpu", torch.bfloat16),
        ("amx", "cpu", torch.bfloat16),
        ("avx2", "cuda", torch.bfloat16),
    ],
)
def test_models_run_in_what_the_hardware_multiplies(monkeypatch, best, device, dtype):
    monkeypatch.setattr(cpu_isa, "BEST", best)
    assert cpu_isa.model_dtype(device) == dtype

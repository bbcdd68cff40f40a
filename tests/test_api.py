import re

import pytest
import torch

import sparse_attn
from sparse_attn import crossover
from tests.cases import Shape, inputs
from tests.ops.test_flex_prefill_select import structured


def test_index_can_be_reused():
    query, key, value = structured("sharp", 1500)
    index = sparse_attn.select(query, key, "flex_prefill")
    want = sparse_attn.attention(query, key, value, "flex_prefill", fallback=False)
    assert torch.equal(sparse_attn.attention(query, key, value, index=index), want)


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


def test_decoding_takes_the_dense_path():
    query, key, value = inputs(Shape(Tq=1, Tk=20000))
    stats = sparse_attn.attention(query, key, value, return_stats=True)[1]
    assert re.match(r"dense is faster below \d+ queries \(1 given\)", stats.fallback)


def test_a_crossover_that_nobody_measured_is_called_a_guess(monkeypatch):
    query, key, value = inputs(Shape(Tq=64, Tk=300))
    monkeypatch.setattr(crossover, "MEASURED", {"flex_prefill": {}})
    reason = crossover.dense_is_faster("flex_prefill", "triton", query, key)
    assert "below 16384 keys (300 given)" in reason and "not been measured on triton" in reason
    assert crossover.dense_is_faster("dense", "triton", query, key) is None
    assert crossover.dense_is_faster("flex_prefill", "reference", query, key) is None


def test_explain_names_every_backend():
    query, key, value = inputs(Shape(Tq=64, Tk=64))
    text = sparse_attn.explain(query, key, value)
    assert all(name in text for name in ("cuda: ", "triton: ", "cpp: used", "reference: "))
    text = sparse_attn.explain(query, key, value, backend="reference")
    assert "reference: used" in text


def test_methods_say_what_they_cannot_do():
    query, key, value = inputs(Shape(Tq=64, Tk=64))
    for call in (sparse_attn.attention, lambda q, k, v, m, **o: sparse_attn.select(q, k, m, **o)):
        with pytest.raises(NotImplementedError, match="defined for causal prefill; use"):
            call(query, key, value, "flex_prefill", causal=False)
    with pytest.raises(ValueError, match="method: got 'flash', expected one of"):
        sparse_attn.attention(query, key, value, "flash")
    with pytest.raises(TypeError, match="method: got 3"):
        sparse_attn.attention(query, key, value, 3)
    with pytest.raises(NotImplementedError, match="an index cannot hold"):
        sparse_attn.select(query, key, "dense")

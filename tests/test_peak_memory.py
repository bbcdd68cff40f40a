"""Peak extra memory, results and scratch, of FlexPrefill and SALE, against their inputs' size."""

import pytest

from bench.memory import DIM, HEADS, measure_elsewhere
from sparse_attn import cpu_isa
from sparse_attn.evaluate.memory import MEASURABLE


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.skipif(not cpu_isa.available(), reason="needs the C++ extension")
@pytest.mark.parametrize("key_heads", [8, 2])
def test_flex_prefill_stays_under_twice_its_inputs(key_heads):
    measured = measure_elsewhere("flex_prefill_attention", 16384, key_heads)
    output = HEADS / (HEADS + 2 * key_heads)
    assert output < measured < 2, "the output is a part of what is measured"


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.skipif(not cpu_isa.available(), reason="needs the C++ extension")
@pytest.mark.parametrize("name, most", [("sale_select", 0.9), ("sale_select_shared", 1.2)])
def test_sale_selects_within_its_inputs(name, most):
    """The lists, codes and rows of floats that docs/ops/sale_select.md names, but no copy."""
    length, key_heads = 16384, 2
    heads = HEADS + key_heads
    read = 2 * DIM * length * (HEADS + 2 * key_heads)  # bytes of query, key and value
    codes = DIM // 2 * length * heads
    lists = 4 * (length // 64) * (length // 32) * (key_heads if "shared" in name else HEADS)
    measured = measure_elsewhere(name, length, key_heads)
    assert (codes + lists) / read < measured < most, "results and codes are a part of it"

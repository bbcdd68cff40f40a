"""Peak extra memory of FlexPrefill, results and scratch, against the size of its inputs."""

import pytest

from bench.memory import HEADS, measure_elsewhere
from sparse_attn import cpu_isa
from sparse_attn.evaluate.memory import MEASURABLE


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.skipif(not cpu_isa.available(), reason="needs the C++ extension")
@pytest.mark.parametrize("key_heads", [8, 2])
def test_flex_prefill_stays_under_twice_its_inputs(key_heads):
    measured = measure_elsewhere(16384, key_heads)
    output = HEADS / (HEADS + 2 * key_heads)
    assert output < measured < 2, "the output is a part of what is measured"

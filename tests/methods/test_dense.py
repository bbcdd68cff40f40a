import pytest
import torch
import torch.nn.functional as F

import sparse_attn
from tests.cases import Shape, inputs


@pytest.mark.parametrize("causal", [True, False])
def test_equals_sdpa(causal):
    query, key, value = inputs(Shape(Tq=200, Tk=200, Hq=4, Hkv=2))
    want = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    got, stats = sparse_attn.attention(query, key, value, "dense", causal=causal, return_stats=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert stats.density == 1.0

"""What the C++ kernels refuse by themselves: a call of an overload passes no other check."""

import pytest
import torch

from tests.cases import ISAS, Shape, inputs

pytestmark = pytest.mark.skipif(not ISAS, reason="needs the C++ extension")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma": float("nan")}, "gamma: got nan"),
        ({"gamma": -1.0}, "gamma: got -1"),
        ({"tau": -1.0}, "tau: got -1"),
        ({"min_budget": -5}, "min_budget: got -5"),
        ({"max_budget": -500}, "max_budget: got -500"),
        ({"scale": 1e300}, "scale: expected"),
        ({"scale": float("nan")}, "scale: expected"),
        ({"block_size": 129}, "block_size: got 129"),
        ({"variant": "official"}, "variant: got official"),
        ({"causal": False}, "causal"),
    ],
)
def test_options_of_a_selection(options, message):
    query, key = inputs(Shape(Tq=100, Tk=100))[:2]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_attn.flex_prefill_select.cpp(query, key, **options)


@pytest.mark.parametrize("lengths", [(1, 2**31 + 128), (2**30, 2**30 - 200)], ids=str)
def test_positions_beyond_32_bits(lengths):
    query, key = (torch.zeros(1, 1, 1, 8).expand(1, 1, n, 8) for n in lengths)
    blocks = -(-lengths[0] // 128)
    indices = torch.zeros(1, 1, blocks, 0, dtype=torch.int32)
    counts = torch.zeros(1, 1, 1, dtype=torch.int32).expand(1, 1, blocks)
    with pytest.raises(RuntimeError, match="query, key: lengths .* expected less than 2147483392"):
        torch.ops.sparse_attn.block_sparse_attention.cpp(
            query, key, key, indices, counts, 128, 128, sink=2**32
        )
    with pytest.raises(RuntimeError, match="query, key: lengths"):
        torch.ops.sparse_attn.flex_prefill_select.cpp(query, key)

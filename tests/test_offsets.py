"""Elements further than 2**31 from the first: offsets are computed in 64 bits."""

import pytest
import torch

from sparse_attn.ops import (
    block_sparse_attention,
    flex_prefill_select,
    merge_attention_states,
    sale_quantize,
)
from tests.cases import ISAS, call

FAR, TOKENS, D = 2**31, 34, 64
STEP = 2**26  # FAR / 32: the last two tokens lie beyond
STRIDES = {"heads": (0, FAR, 4 * D, 1), "tokens": (0, D, STEP, 1)}


@pytest.fixture(scope="module")
def memory():
    """4.6 GB of address space; only the pages that are written exist."""
    try:
        return torch.empty(FAR + 2 * STEP, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")


def spread(memory, which, offset):
    """Random [1, 2, TOKENS, D] far apart in `memory`, and the same close together."""
    near = torch.randn(1, 2, TOKENS, D).bfloat16()
    far = memory.as_strided(near.shape, STRIDES[which], offset)
    return far.copy_(near), near


@pytest.mark.parametrize("which", STRIDES)
@pytest.mark.parametrize("isa", ISAS)
def test_far_elements(memory, isa, which):
    far, near = zip(*(spread(memory, which, i * 2 * D) for i in range(2)), strict=True)
    query, run = torch.randn(1, 2, TOKENS, D).bfloat16(), ("cpp", isa)
    lse = torch.linspace(0, 1, 2 * TOKENS).view(1, 2, TOKENS)
    listed = torch.arange(3, dtype=torch.int32).expand(1, 1, 3, 3)
    counts = torch.full((1, 1, 3), 3, dtype=torch.int32)
    for op, of in (
        (block_sparse_attention.op, lambda k, v: (query, k, v, listed, counts, 16, 16)),
        (block_sparse_attention.op, lambda k, v: (query[:, :, :1], k, v, listed[:, :, :1],
                                                  counts[:, :, :1], 16, 16)),
        (block_sparse_attention.op, lambda k, v: (k, query, query, listed, counts, 16, 16)),
        (flex_prefill_select.op, lambda k, v: (query, k, 0.7, 0.0, 0, None, 16)),
        (sale_quantize.op, lambda k, v: (k, None, "key")),
        (merge_attention_states.op, lambda k, v: (k, lse, v, 2 * lse)),
    ):  # fmt: skip
        want, got = call(op, run, *of(*near)), call(op, run, *of(*far))
        assert torch.equal(got[0], want[0]) or op is flex_prefill_select.op
        assert torch.equal(got[1], want[1])

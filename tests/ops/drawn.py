"""Arguments without values that Hypothesis draws: shapes, strides and options."""

import torch
from hypothesis import strategies as st

HALF = (torch.float16, torch.bfloat16)


def models_layout(dtype, batch, heads, tokens, dim):
    """Heads between tokens, as models have them."""
    return torch.empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)


def query_key_value(draw):
    batch, hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 9))
    tq, tk = draw(st.integers(1, 700)), draw(st.integers(1, 60000))
    dtype, dims = draw(st.sampled_from(HALF)), [8 * draw(st.integers(1, 32)) for _ in "kv"]
    return (
        models_layout(dtype, batch, hkv * group, tq, dims[0]),
        models_layout(dtype, batch, hkv, tk, dims[0]),
        models_layout(dtype, batch, hkv, tk, dims[1]),
    )


def pages_of(draw, key):
    """key, block_table, kv_lengths: as they are, or in pages."""
    batch, lengths = key.shape[0], draw(st.booleans())
    lengths = torch.zeros(batch, dtype=torch.int32) if lengths else None
    if not draw(st.booleans()):
        return key, None, lengths
    size = draw(st.sampled_from((16, 128)))
    pages = models_layout(key.dtype, 7, key.shape[1], size, key.shape[3])
    return pages, torch.zeros(batch, -(-key.shape[2] // size), dtype=torch.int32), lengths

"""Cases of merge_attention_states that only the tests need."""

from functools import partial

import torch
from hypothesis import strategies as st

from sparse_attn.ops.merge_attention_states import op
from tests.cases import DTYPES, Shape, inputs, layouts
from tests.ops.drawn import HALF, models_layout


def arguments(draw):
    shape = [draw(st.integers(1, high)) for high in (2, 3, 9)]
    dv, offset = draw(st.integers(1, 300)), draw(st.sampled_from((0, 3, 8)))
    dtype = draw(st.sampled_from(HALF))
    outs = [torch.empty(*shape, 2 * dv + 8, dtype=dtype)[..., offset : offset + dv] for _ in "ab"]
    if draw(st.booleans()):
        outs[0] = models_layout(dtype, *shape, dv)
    lses = [torch.empty(*shape[::-1]).permute(2, 1, 0) for _ in "ab"]
    return outs[0], lses[0], outs[1], lses[1]


def direct_call():
    out = inputs(Shape(Tq=64), torch.float16)[0]
    return out, out[..., 0].float(), out, out[..., 0].float()


def guarded():
    for shape in (Shape(Tq=33, D=64), Shape(B=2, Hq=3, Tq=601, D=5)):
        for dtype in DTYPES:
            out_a, out_b = (inputs(shape, dtype)[0] for _ in range(2))
            lse = torch.randn(2, shape.B, shape.Tq, shape.Hq).transpose(2, 3)
            for layout, (a, b) in layouts(out_a, out_b).items():
                name = f"merge_attention_states, {dtype}, {layout}, {shape}"
                yield name, partial(op, backend="cpp"), [a, lse[0], b, lse[1]]


def any_length(new, n_queries, n_keys):
    from sparse_attn.triton_kernels.merge_attention_states import merge_attention_states as run

    out, lse = new(8, n_queries), new.empty(8, n_queries)
    run(out, lse, out, lse)

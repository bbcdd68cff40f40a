"""Cases of sale_select that only the tests need."""

from functools import partial

import torch

from sparse_attn.ops.sale_attention import op as attention
from tests.cases import DTYPES, Shape, inputs, layouts

GUARDED = [
    (Shape(Tq=300, Tk=300, D=64, Dv=64, Hq=4, Hkv=2), 64, 32),
    (Shape(Tq=70, Tk=261, D=34, Dv=7, B=2), 32, 16),
    (Shape(Tq=129, Tk=129, D=128, Dv=96, Hq=6, Hkv=1), 128, 64),
    (Shape(Tq=90, Tk=31, D=2, Dv=1), 16, 16),
]


def guarded():
    """All of SALE in one call, with sale_threshold."""
    for shape, q_block, kv_block in GUARDED:
        grid = {"q_block": q_block, "kv_block": kv_block, "local": 16, "sink": 16}
        for dtype in DTYPES:
            for layout, given in layouts(*inputs(shape, dtype, spread=3.0)).items():
                run = partial(attention, **grid, backend="cpp")
                threshold = torch.full((shape.Hq,), 0.1)
                name = f"{dtype}, {layout}, {shape}, {grid}"
                yield f"sale_attention, {name}", run, [*given, threshold]

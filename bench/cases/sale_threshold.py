"""Cases of sale_threshold; what is compiled: sale_select.py."""

from __future__ import annotations

import torch

from sparse_attn.ops.sale_threshold import op

from ..gpu.check import apart
from ..gpu.context import Context
from ..gpu.operators import Sizes, compare


def timed(context: Context, sizes: Sizes) -> None:
    threshold = torch.full((sizes.heads,), 0.004, device=context.device)
    args = (sizes.query, sizes.key, sizes.key.float().mean(2), threshold)
    first: list[torch.Tensor] = []

    def wrong(theta: torch.Tensor) -> str | None:
        first.append(theta)
        return apart(theta, first[0].double(), 1e-4)

    compare(context, f"sale threshold {sizes.n}", op, args, wrong)

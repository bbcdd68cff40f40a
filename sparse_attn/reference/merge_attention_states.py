"""Reference of `merge_attention_states`."""

from __future__ import annotations

import torch


def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights both outputs by exp(lse); rows empty in both stay 0 with lse -inf."""
    lse = torch.logaddexp(lse_a, lse_b)
    known = lse.masked_fill(lse == -torch.inf, 0)
    out = torch.zeros(out_a.shape, dtype=lse.dtype, device=lse.device)
    for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
        weighted = torch.exp(lse_x - known)[..., None] * out_x.to(lse.dtype)
        # whatever the row of an empty side holds, the other is taken
        out += weighted.masked_fill((lse_x == -torch.inf)[..., None], 0)
    return out.to(out_a.dtype).contiguous(), lse.contiguous()

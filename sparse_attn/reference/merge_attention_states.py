"""Reference of `merge_attention_states`."""

from __future__ import annotations

import torch


def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights both outputs by exp(lse); rows empty in both stay 0 with lse -inf."""
    lse = torch.logaddexp(lse_a, lse_b)
    known = lse.masked_fill(lse == -torch.inf, 0)
    weight_a, weight_b = (torch.exp(x - known)[..., None] for x in (lse_a, lse_b))
    out = weight_a * out_a.to(lse.dtype) + weight_b * out_b.to(lse.dtype)
    return out.to(out_a.dtype).contiguous(), lse.contiguous()

"""`merge_attention_states`: a few rows of both outputs per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch


# lengths vary from call to call, and the strides of lse with them
@triton.jit(do_not_specialize=["H", "T", "rows", "la_b", "la_h", "la_t", "lb_b", "lb_h", "lb_t"])
def merge_attention_states_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, H, T, Dv,
    oa_b, oa_h, oa_t, oa_d, la_b, la_h, la_t, ob_b, ob_h, ob_t, ob_d, lb_b, lb_h, lb_t,
    rows, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_r < rows
    i_b, i_h, i_t = o_r // T // H, o_r // T % H, o_r % T
    b_la = tl.load(lse_a + i_b * la_b + i_h * la_h + i_t * la_t, mask=m_r, other=-float("inf"))
    b_lb = tl.load(lse_b + i_b * lb_b + i_h * lb_h + i_t * lb_t, mask=m_r, other=-float("inf"))
    b_max = tl.maximum(b_la, b_lb)
    b_max = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_wa, b_wb = tl.exp(b_la - b_max), tl.exp(b_lb - b_max)
    b_sum = b_wa + b_wb
    tl.store(lse + o_r, b_max + tl.log(b_sum), mask=m_r)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    # an empty side is not read: whatever its row holds, the other is taken
    m = m_r[:, None] & (o_d < Dv)[None, :]
    m_a = m & (b_la != -float("inf"))[:, None]
    m_b = m & (b_lb != -float("inf"))[:, None]
    p_a = out_a + (i_b * oa_b + i_h * oa_h + i_t * oa_t)[:, None] + (o_d * oa_d)[None, :]
    p_b = out_b + (i_b * ob_b + i_h * ob_h + i_t * ob_t)[:, None] + (o_d * ob_d)[None, :]
    b_oa = tl.load(p_a, mask=m_a, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    b_ob = tl.load(p_b, mask=m_b, other=0.0).to(tl.float32)
    b_out = b_oa * (b_wa / b_sum)[:, None] + b_ob * (b_wb / b_sum)[:, None]
    p_out = out + o_r[:, None] * Dv + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m)


def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As sparse_attn/reference/merge_attention_states.py."""
    _, heads, length, dv = out_a.shape
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    block_d = triton.next_power_of_2(dv)
    block_t = max(1, 2048 // block_d)
    launch.run(
        merge_attention_states_kernel, triton.cdiv(lse.numel(), block_t),
        out_a, lse_a, out_b, lse_b, out, lse, heads, length, dv,
        *out_a.stride(), *lse_a.stride(), *out_b.stride(), *lse_b.stride(),
        lse.numel(), BLOCK_T=block_t, BLOCK_D=block_d,
    )  # fmt: skip
    return out, lse

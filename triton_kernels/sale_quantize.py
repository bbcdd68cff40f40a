"""`sale_quantize`: the mean in a fixed order, then codes and steps of 64 tokens at a time.

Everything but the mean is to the bit what sparse_attn/reference/sale_quantize.py says: the kernel
is compiled without fusing products and sums, divisions are rounded as IEEE has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, launch

SMALLEST, FLOOR = tl.constexpr(2.0**-58), tl.constexpr(2.0**-16)
LARGEST_FINITE = tl.constexpr(torch.finfo(torch.float32).max)
UNITS = tl.constexpr(12582912.0)  # 1.5 * 2^23: a small number added to it is rounded to an integer
UNITS_BITS = tl.constexpr(0x4B400000)
SIZE_BITS = tl.constexpr(0x7FFFFFFF)
TOKENS = 64  # whole groups of every kind
CHUNK = 512  # tokens whose sum one program makes


@triton.jit(do_not_specialize=["H", "T", "chunks"])
def sale_sum_kernel(
    x, partial, H, T, chunks, x_b, x_h, x_t, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sums of a chunk of tokens, [B * H, chunks, D]."""
    pid = tl.program_id(0)
    i_head, i_chunk = pid // chunks, pid % chunks
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + (i_head // H).to(tl.int64) * x_b + (i_head % H).to(tl.int64) * x_h
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in range(i_chunk * CHUNK, tl.minimum((i_chunk + 1) * CHUNK, T), BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m = (o_t < T)[:, None] & (o_d < D)[None, :]
        b_x = tl.load(p_x + o_t.to(tl.int64)[:, None] * x_t + o_d[None, :], mask=m, other=0.0)
        b_sum += tl.sum(b_x.to(tl.float32), 0)
    tl.store(partial + pid.to(tl.int64) * D + o_d, b_sum, mask=o_d < D)


@triton.jit(do_not_specialize=["T", "chunks"])
def sale_mean_kernel(
    partial, center, floor, T, chunks, GIVEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean of a head where none was given, and the floor of its groups, as bits."""
    i_head = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    if GIVEN:
        b_mean = tl.load(center + i_head * D + o_d, mask=o_d < D, other=0.0)
    else:
        b_mean = tl.zeros([BLOCK_D], tl.float32)
        for i in range(chunks):
            b_mean += tl.load(partial + (i_head * chunks + i) * D + o_d, mask=o_d < D, other=0.0)
        b_mean = b_mean / T.to(tl.float32)
        tl.store(center + i_head * D + o_d, b_mean, mask=o_d < D)
    bits = (b_mean * FLOOR).to(tl.int32, bitcast=True) & SIZE_BITS
    tl.store(floor + i_head, tl.max(bits))


@triton.jit
def _difference(p_x, p_center, o_d, m_t, m_d):
    """Channels of tokens less the mean; zeros where there are none."""
    m = m_t[:, None] & m_d[None, :]
    b_x = tl.load(p_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_mean = tl.load(p_center + o_d, mask=m_d, other=0.0)
    return tl.where(m, b_x - b_mean[None, :], 0.0)


@triton.jit
def _step(bits):
    """Steps of groups, and what turns numbers into codes."""
    m = bits.to(tl.float32, bitcast=True)
    strange, zero = bits > 0x7F7FFFFF, m < SMALLEST
    safe = tl.where(strange | zero, 1.0, m)
    step, inverse = tl.div_rn(m, 7.0), tl.div_rn(7.0, safe)
    step = tl.where(zero, 0.0, tl.where(strange, float("nan"), step))
    return step, tl.where(zero | strange, 0.0, inverse)


@triton.jit
def _code(b_c, b_inverse):
    """The nearest integer, ties to even, as 4 bits; 0 of NaN."""
    b_x = b_c * b_inverse[:, None]
    b_x = tl.where(b_x == b_x, b_x, 0.0)
    return ((b_x + UNITS).to(tl.int32, bitcast=True) - UNITS_BITS) & 15


@triton.jit(do_not_specialize=["H", "T", "tiles", "groups"])
def sale_code_kernel(
    x, center, floor, packed, step, H, T, tiles, groups, x_b, x_h, x_t, GROUP: tl.constexpr,
    KV_BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Codes [T, D / 2] and steps of BLOCK_T tokens; BLOCK_D covers half of the channels."""
    HALF: tl.constexpr = D // 2
    pid = tl.program_id(0)
    i_head, i_tile = (pid // tiles).to(tl.int64), pid % tiles
    o_t, o_d = i_tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < T, o_d < HALF
    p_x = x + i_head // H * x_b + i_head % H * x_h + (o_t.to(tl.int64) * x_t)[:, None]
    p_center = center + i_head * D
    b_low = _difference(p_x, p_center, o_d, m_t, m_d)
    b_high = _difference(p_x + HALF, p_center + HALF, o_d, m_t, m_d)
    low_bits = b_low.to(tl.int32, bitcast=True) & SIZE_BITS
    high_bits = b_high.to(tl.int32, bitcast=True) & SIZE_BITS
    b_most = tl.maximum(tl.max(low_bits, 1), tl.max(high_bits, 1))
    least = tl.load(floor + i_head)
    if GROUP == "query":  # rows r and r + 8 of 16
        b_most = tl.max(tl.reshape(b_most, [BLOCK_T // 16, 2, 8]), 1)
        b_step, b_inverse = _step(tl.maximum(b_most, least))
        b_inverse = tl.broadcast_to(b_inverse[:, None, :], [BLOCK_T // 16, 2, 8])
        EACH: tl.constexpr = BLOCK_T // 2
    else:  # keys j of a block with the same (j % 8) // 2
        b_most = tl.max(tl.reshape(b_most, [BLOCK_T // KV_BLOCK, KV_BLOCK // 8, 4, 2]), 3)
        b_step, b_inverse = _step(tl.maximum(tl.max(b_most, 1), least))
        b_inverse = tl.broadcast_to(
            b_inverse[:, None, :, None], [BLOCK_T // KV_BLOCK, KV_BLOCK // 8, 4, 2]
        )
        EACH: tl.constexpr = BLOCK_T // KV_BLOCK * 4
    o_g = i_tile * EACH + tl.arange(0, EACH)
    tl.store(step + i_head * groups + o_g, tl.reshape(b_step, [EACH]), mask=o_g < groups)
    b_inverse = tl.reshape(b_inverse, [BLOCK_T])
    b_byte = _code(b_low, b_inverse) | (_code(b_high, b_inverse) << 4)
    p_out = packed + (i_head * T + o_t)[:, None] * HALF + o_d[None, :]
    tl.store(p_out, b_byte.to(tl.uint8), mask=m_t[:, None] & m_d[None, :])


def sale_quantize(
    x: torch.Tensor, mean: torch.Tensor | None = None, group: str = "query", block: int = 32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As sparse_attn/reference/sale_quantize.py."""
    from sparse_attn.ops.sale_quantize import op

    x = launch.last_dim_contiguous(x)
    batch, heads, length, head_dim = x.shape
    packed, step, center = op.empty(x, mean, group, block)
    chunks = triton.cdiv(length, CHUNK)
    partial, width = center, configs.padded(head_dim)
    if mean is None:
        partial = torch.empty(
            (batch * heads, chunks, head_dim), dtype=torch.float32, device=x.device
        )
        launch.run(
            sale_sum_kernel, batch * heads * chunks, x, partial, heads, length, chunks,
            *x.stride()[:3], D=head_dim, BLOCK_D=width, CHUNK=CHUNK, BLOCK_T=32,
        )  # fmt: skip
    else:
        center.copy_(mean)
    floor = torch.empty((batch * heads,), dtype=torch.int32, device=x.device)
    launch.run(
        sale_mean_kernel, batch * heads, partial, center, floor, length, chunks,
        GIVEN=mean is not None, D=head_dim, BLOCK_D=width,
    )  # fmt: skip
    tiles = triton.cdiv(length, TOKENS)
    launch.run(
        sale_code_kernel, batch * heads * tiles, x, center, floor, packed, step, heads, length,
        tiles, step.shape[2], *x.stride()[:3], GROUP=group, KV_BLOCK=block, D=head_dim,
        BLOCK_T=TOKENS, BLOCK_D=configs.padded(head_dim // 2, 1), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return packed, step, center

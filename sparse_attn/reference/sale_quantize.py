"""Reference of `sale_quantize`: SALE's 4-bit copy of queries or keys (arXiv 2505.24179, sec. 3).

Every step below is one operation of float32, rounded to nearest even, except the mean, whose order
of summation is free: for a given `mean` all backends return the same bits.
"""

from __future__ import annotations

import torch

from ..ops._sale import group_of, n_groups

SMALLEST = 2.0**-58  # a group whose largest value is below counts as zero: products stay normal
FLOOR = 2.0**-16  # steps follow the mean down to here, so that what is added fits an int32
LARGEST_FINITE = torch.finfo(torch.float32).max


def sale_quantize(
    x: torch.Tensor, mean: torch.Tensor | None = None, group: str = "query", block: int = 32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit codes of x - mean and the step of each group of tokens.

    1. mean float32 [B, H, D]: the mean over tokens, or what is given.
    2. c = float32(x) - mean.
    3. Per group: m = max(largest |c| over its tokens and channels, FLOOR * largest |mean|). Tokens
       past the end belong to no group. Of NaN, infinity and numbers the largest is meant by the
       bits of |c|: NaN over infinity over every number.
       * m is NaN or infinite: step NaN, codes 0.
       * m < SMALLEST: step 0, codes 0.
       * else step = m / 7, code = rint(c * (7 / m)), two roundings; in [-7, 7] without a clamp.
    4. Byte b of a token holds the code of channel b in its low and that of channel b + D / 2 in its
       high nibble, in two's complement.

    The group of token t is `group_of`: "query" 8 * (t // 16) + t % 8, so rows r and r + 8 of 16
    share a step; "key" 4 * (t // block) + t % 8 // 2; "token" t, which only the reference
    serves. A last tile or block may be ragged, and groups without any token are as groups of zeros
    are, but for the floor.

    Returns packed uint8 [B, H, T, D / 2], step float32 [B, H, groups] and the mean that was used.
    """
    values = x.float()
    center = values.mean(2) if mean is None else mean.clone(memory_format=torch.contiguous_format)
    c = values - center[:, :, None]
    batch, heads, length, dim = c.shape
    place = group_of(torch.arange(length, device=x.device), group, block)
    # bits of non-negative floats are ordered as the floats, NaN above all
    bits = (c.view(torch.int32) & 0x7FFFFFFF).amax(3)
    low = (center * FLOOR).view(torch.int32) & 0x7FFFFFFF
    largest = low.amax(2)[..., None].repeat(1, 1, n_groups(length, group, block))
    largest.scatter_reduce_(2, place.expand(batch, heads, -1), bits, "amax")
    m = largest.view(torch.float32)
    zero, strange = m < SMALLEST, ~(m <= LARGEST_FINITE)
    seven = torch.full_like(m, 7)  # by a number PyTorch divides in two roundings
    step = (m / seven).masked_fill(zero, 0).masked_fill(strange, torch.nan)
    inverse = (seven / m).masked_fill(zero | strange, 0)
    codes = torch.round(c * inverse[..., place, None]).nan_to_num(0, 0, 0).to(torch.int32)
    low, high = codes[..., : dim // 2], codes[..., dim // 2 :]
    packed = ((low & 15) | ((high & 15) << 4)).to(torch.uint8)
    return packed.contiguous(), step, center


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes, int32 [B, H, T, D]."""
    both = torch.cat([packed & 15, packed >> 4], -1).to(torch.int32)
    return (both ^ 8) - 8

"""SALE's selection and each of its steps, beside own dense attention over the same prompt."""

from __future__ import annotations

import torch

from sparse_attn import BlockIndex, attention
from sparse_attn.ops import _sale as sale
from sparse_attn.ops.sale_estimate import op as estimate
from sparse_attn.ops.sale_quantize import op as quantize
from sparse_attn.ops.sale_select import op as select
from sparse_attn.ops.sale_threshold import op as bar

from ..harness import DTYPE, DTYPE_NAME, Report, time_in_turn
from ..inputs import gen

HEADS, KEY_HEADS = 8, 2


def run(report: Report) -> None:
    for n, dim, threshold in (
        (8192, 64, 0.004),
        (8192, 128, 0.004),
        (32768, 64, 0.004),
        (32768, 128, 0.004),
        # a bar that nothing reaches: no tile stops early
        (8192, 64, 1e30),
        (32768, 64, 1e30),
        (32768, 128, 1e30),
    ):
        q, k, v = gen(7, n, "mixed", Hq=HEADS, Hkv=KEY_HEADS, D=dim)
        query, key, value = (torch.from_numpy(x).transpose(1, 2).to(DTYPE) for x in (q, k, v))
        measure(report, query, key, value, threshold)


def measure(
    report: Report, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, threshold: float
) -> None:
    n, dim = query.shape[2:]
    thresholds = torch.full((HEADS,), threshold)
    packed, step, mean = quantize(query, None, "query")
    key_packed, key_step, key_mean = quantize(key, None, "key")
    vectors = mean.unflatten(1, (-1, HEADS // KEY_HEADS))
    theta, bias = bar(query, key, key_mean, thresholds), sale.dots(key, key_mean, vectors)
    codes = (packed, step, key_packed, key_step, bias, theta)
    lists = estimate(*codes)
    some = slice(n - 256, None)  # the last blocks, against the reference bit by bit
    part = (packed[:, :, some], step[:, :, -128:], *codes[2:5], theta[:, :, some])
    for got, want in zip(lists, estimate(*part, backend="reference"), strict=True):
        if not torch.equal(got[:, :, -4:], want):
            raise AssertionError("the lists differ from the reference's")
    seconds = time_in_turn(
        {
            "dense": lambda: attention(query, key, value, "dense"),
            "quantize": lambda: (quantize(query, None, "query"), quantize(key, None, "key")),
            "threshold": lambda: bar(query, key, key_mean, thresholds),
            "bias": lambda: sale.dots(key, key_mean, vectors),
            "estimate": lambda: estimate(*codes),
            "select": lambda: select(query, key, thresholds),
        },
        3,
    )
    report.add(
        f"SALE's selection, share of own dense time, mixed, {HEADS} x {n} x {dim}, "
        + (f"threshold {threshold}" if threshold < 1 else "no block kept"),
        seconds["select"] / seconds["dense"],
        "<= 0.35" if n == 32768 else "",
        density=BlockIndex(*lists, 64, 32).density(n, n),
        dtype=DTYPE_NAME,
        ms=seconds["select"] * 1e3,
        **{f"{name}_ms": seconds[name] * 1e3 for name in list(seconds)[1:-1]},
    )

"""FlexPrefill's choice of blocks."""

from __future__ import annotations

import torch

from ..registry import Op
from . import _checks as check

VARIANTS = ("exact", "official")
OPTIONS = (
    "float gamma=0.95, float tau=0.1, SymInt min_budget=1024, SymInt? max_budget=None, "
    'int block_size=128, str variant="exact", bool causal=True, float? scale=None'
)

op = Op(
    "flex_prefill_select",
    f"(Tensor query, Tensor key, {OPTIONS}) -> (Tensor indices, Tensor counts, Tensor pattern)",
)


@op.fake
def _(query, key, gamma=0.95, tau=0.1, min_budget=1024, max_budget=None, block_size=128,
      variant="exact", causal=True, scale=None):  # fmt: skip
    rows = (query.shape[2] + block_size - 1) // block_size
    blocks = (key.shape[2] + block_size - 1) // block_size
    shape = (query.shape[0], query.shape[1], rows)
    return (
        query.new_empty((*shape, blocks), dtype=torch.int32),
        query.new_empty(shape, dtype=torch.int32),
        query.new_empty(shape[:2], dtype=torch.int32),
    )


def check_options(gamma, tau, min_budget, max_budget, block_size, variant):
    """The checks that need no tensor; the method's config makes them too."""
    check.number("gamma", gamma)
    if not gamma > 0:
        raise ValueError(f"gamma: got {gamma}, expected more than 0 (1 or more: every block)")
    check.number("tau", tau)
    check.between("tau", tau, 0, float("inf"))
    for name, budget, least in (("min_budget", min_budget, 0), ("max_budget", max_budget, 1)):
        if budget is not None or name == "min_budget":
            check.integer(name, budget)
            check.between(name, budget, least, check.MAX_INT64)
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}, expected one of {VARIANTS}")
    check.block_size("block_size", block_size)
    if variant == "official" and block_size not in (16, 32, 64, 128):
        raise ValueError(
            f"block_size: got {block_size}, the official variant accepts 16, 32, 64 or 128; "
            "variant='exact' accepts 1 to 128"
        )


def why_not(causal):
    """Why FlexPrefill is not defined for a call, or None."""
    if not causal:
        return "FlexPrefill is defined for causal prefill; use method='dense' or causal=True"
    return None


@op.validate
def _(query, key, gamma, tau, min_budget, max_budget, block_size, variant, causal, scale):
    check.query_key(query, key)
    check_options(gamma, tau, min_budget, max_budget, block_size, variant)
    check.finite_scale(scale)
    reason = why_not(causal)
    if reason is not None:
        raise ValueError(f"causal: {reason}")


def _kernels_serve(query, key, gamma, tau, min_budget, max_budget, block_size, variant, *args):
    if variant == "official":
        return "the official variant is served by the reference"
    return check.not_float64(query)


def _triton_serves(query, *args):
    if query.shape[3] > 256:
        return f"head_dim {query.shape[3]}, served up to 256"
    return _kernels_serve(query, *args)


def _cuda_serves(query, *args):
    if query.shape[3] > 256 or query.shape[3] % 8 != 0:
        return f"head_dim {query.shape[3]}, served are multiples of 8 up to 256"
    served = _kernels_serve(query, *args)
    return check.cuda_kernels_serve(query) if served is True else served


op.impl("triton", device="cuda", when=_triton_serves)
op.impl("cuda", device="cuda", when=_cuda_serves)
op.impl("cpp", device="cpu", when=_kernels_serve)
op.impl("reference", device="any")
op.autocast(2)
op.no_grad("A selection has no gradient: call it on detached tensors.")

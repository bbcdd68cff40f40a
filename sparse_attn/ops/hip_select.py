"""HiP's choice of blocks: a tree search per query block."""

from __future__ import annotations

from ..registry import Op
from . import _checks as check
from . import _hip as hip
from . import _hip_kernels as kernels

OPTIONS = (
    "SymInt budget=512, int q_block=64, int kv_block=2, int q_stride=2, int key_stride=1, "
    'SymInt sink=16, SymInt window=256, str representative="centre", int branch=4, '
    "bool share_kv_heads=False, bool causal=True, float? scale=None"
)

op = Op(
    "hip_select",
    f"(Tensor query, Tensor key, {OPTIONS}, {hip.PAGES}) -> (Tensor indices, Tensor counts)",
)


@op.fake
def _(query, key, budget=512, q_block=64, kv_block=2, q_stride=2, key_stride=1, sink=16,
      window=256, representative="centre", branch=4, share_kv_heads=False, causal=True,
      scale=None, block_table=None, kv_lengths=None):  # fmt: skip
    heads = key.shape[1] if share_kv_heads else query.shape[1]
    return hip.fake_index(query, key, heads, q_block, kv_block, budget, block_table)


def check_options(budget, q_block, kv_block, q_stride, key_stride, sink, window, representative,
                  branch):  # fmt: skip
    """The checks that need no tensor; the method's config makes them too."""
    hip.budget("budget", budget)
    check.block_size("q_block", q_block)
    check.block_size("kv_block", kv_block)
    check.block_size("q_stride", q_stride)
    check.block_size("key_stride", key_stride)
    for name, x in (("sink", sink), ("window", window)):
        check.integer(name, x)
        check.between(name, x, 0, check.MAX_TOKENS)
    hip.one_of("representative", representative, hip.REPRESENTATIVES)
    hip.one_of("branch", branch, (2, 4))


@op.validate
def _(query, key, budget, q_block, kv_block, q_stride, key_stride, sink, window, representative,
      branch, share_kv_heads, causal, scale, block_table=None, kv_lengths=None):  # fmt: skip
    check.cache(query, key, None, block_table, kv_lengths)
    check_options(
        budget, q_block, kv_block, q_stride, key_stride, sink, window, representative, branch
    )
    check.finite_scale(scale)


def _triton_serves(query, key, budget, q_block, kv_block, q_stride, key_stride, sink, window,
                   representative, branch, share_kv_heads, causal, scale, block_table=None,
                   kv_lengths=None):  # fmt: skip
    return kernels.triton(query, kernels.tree_fits(key, budget, kv_block, block_table))


def _cuda_serves(query, key, budget, q_block, kv_block, q_stride, key_stride, sink, window,
                 representative, branch, share_kv_heads, causal, scale, block_table=None,
                 kv_lengths=None):  # fmt: skip
    fits = kernels.tree_fits(key, budget, kv_block, block_table)
    return kernels.cuda(query, key, fits, block_table)


def _reference_unasked(query, key, budget, q_block, kv_block, q_stride, key_stride, sink, window,
                       representative, branch, share_kv_heads, causal, scale, block_table=None,
                       kv_lengths=None):  # fmt: skip
    fits = kernels.tree_fits(key, budget, kv_block, block_table)
    return kernels.reference_unasked(query, fits)


op.impl("triton", device="cuda", when=_triton_serves)
op.impl("cuda", device="cuda", when=_cuda_serves)
op.impl("cpp", device="cpu", when=check.not_float64)
op.impl("reference", device="any", unasked=_reference_unasked)
op.autocast(2)
op.no_grad("A selection has no gradient: call it on detached tensors.")

"""InfiniteHiP's choice of blocks: stages that prune chunks of keys."""

from __future__ import annotations

from ..registry import Op
from . import _checks as check
from . import _hip as hip
from . import _hip_kernels as kernels

op = Op(
    "hip_prune_select",
    "(Tensor query, Tensor key, int[] chunks, int[] keeps, int[] q_strides, int q_block=64, "
    'SymInt sink=256, SymInt window=1024, str representative="centre", str merge_heads="none", '
    f"bool causal=True, float? scale=None, {hip.PAGES}) -> (Tensor indices, Tensor counts)",
)


@op.fake
def _(query, key, chunks, keeps, q_strides, q_block=64, sink=256, window=1024,
      representative="centre", merge_heads="none", causal=True, scale=None, block_table=None,
      kv_lengths=None):  # fmt: skip
    heads = {"none": query.shape[1], "group": key.shape[1], "all": 1}[merge_heads]
    return hip.fake_index(query, key, heads, q_block, chunks[-1], keeps[-1], block_table)


def check_options(chunks, keeps, q_strides, q_block, sink, window, representative, merge_heads):
    """The checks that need no tensor; the method's config makes them too."""
    check.block_size("q_block", q_block)
    for name, x in (("chunks", chunks), ("keeps", keeps), ("q_strides", q_strides)):
        if not isinstance(x, (list, tuple)) or not 1 <= len(x) <= 8:
            raise ValueError(f"{name}: got {x!r}, expected one integer per stage, 1 to 8 stages")
    if not len(chunks) == len(keeps) == len(q_strides):
        raise ValueError(
            "chunks, keeps, q_strides: expected one integer per stage in each, got "
            f"{len(chunks)}, {len(keeps)} and {len(q_strides)}"
        )
    for i, (chunk, keep, stride) in enumerate(zip(chunks, keeps, q_strides, strict=True)):
        check.integer(f"chunks[{i}]", chunk)
        if not 1 <= chunk <= 4096 or (i and (chunk > chunks[i - 1] or chunks[i - 1] % chunk)):
            above = f" that divides chunks[{i - 1}] = {chunks[i - 1]}" if i else ""
            raise ValueError(f"chunks[{i}]: got {chunk}, expected 1 to 4096{above}")
        hip.budget(f"keeps[{i}]", keep)
        check.block_size(f"q_strides[{i}]", stride)
    if chunks[-1] > 128:
        raise ValueError(f"chunks[-1]: got {chunks[-1]}, expected 1 to 128: it is the block size")
    for name, x in (("sink", sink), ("window", window)):
        check.integer(name, x)
        check.between(name, x, 0, check.MAX_TOKENS)
    hip.one_of("representative", representative, hip.REPRESENTATIVES)
    hip.one_of("merge_heads", merge_heads, hip.MERGES)


@op.validate
def _(query, key, chunks, keeps, q_strides, q_block, sink, window, representative, merge_heads,
      causal, scale, block_table, kv_lengths):  # fmt: skip
    check.cache(query, key, None, block_table, kv_lengths)
    check_options(
        chunks, keeps, q_strides, q_block, sink, window, representative, merge_heads
    )  # fmt: skip
    check.finite_scale(scale)


def _triton_serves(query, key, chunks, keeps, q_strides, q_block, sink, window, representative,
                   merge_heads, causal, scale, block_table=None, kv_lengths=None):  # fmt: skip
    return kernels.triton(query, kernels.stages_fit(key, chunks, keeps, block_table))


def _cuda_serves(query, key, chunks, keeps, q_strides, q_block, sink, window, representative,
                 merge_heads, causal, scale, block_table=None, kv_lengths=None):  # fmt: skip
    rows = max(-(-min(q_block, query.shape[2]) // stride) for stride in q_strides)
    if query.shape[3] > 128 and rows > 64:
        return f"q_strides: {rows} queries sampled, served up to 64 where head_dim is above 128"
    fits = kernels.stages_fit(key, chunks, keeps, block_table)
    return kernels.cuda(query, key, fits, block_table)


def _reference_unasked(query, key, chunks, keeps, q_strides, q_block, sink, window, representative,
                       merge_heads, causal, scale, block_table=None, kv_lengths=None):  # fmt: skip
    fits = kernels.stages_fit(key, chunks, keeps, block_table)
    return kernels.reference_unasked(query, fits)


op.impl("triton", device="cuda", when=_triton_serves)
op.impl("cuda", device="cuda", when=_cuda_serves)
op.impl("cpp", device="cpu", when=check.not_float64)
op.impl("reference", device="any", unasked=_reference_unasked)
op.autocast(2)
op.no_grad("A selection has no gradient: call it on detached tensors.")

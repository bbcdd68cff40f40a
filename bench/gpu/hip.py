"""HiP's selections on each GPU backend, and HiP end to end against the fastest dense kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparse_attn import BlockIndex
from sparse_attn.ops.hip_attention import op as attend
from sparse_attn.ops.hip_prune_select import op as prune
from sparse_attn.ops.hip_select import op as search

from . import baselines
from .cases import tensors
from .context import Context
from .operators import compare
from .timing import time_in_turn

STAGES = ([256, 32, 8], [32768, 8192, 2048], [4, 4, 1])


def legal(n: int, kv_block: int, q_block: int = 64) -> Callable[..., None]:
    """What the index must be; whether it is the right one is for the part `check`."""
    return lambda indices, counts: BlockIndex(indices, counts, q_block, kv_block).validate(n, n)


def run(context: Context) -> None:
    heads, key_heads = context.size((8, 2), (2, 1))
    for n in context.size((32768, 131072), (420,)):
        if context.enough(6, f"HiP {n}"):
            one(context, n, *tensors(context, n, n, heads, key_heads))


def one(
    context: Context, n: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    shared = (512, 64, 2, 2, 1, 16, 256, "centre", 4, True)
    compare(context, f"HiP {n}, search", search, (query, key), legal(n, 2))
    compare(context, f"HiP {n}, search, shared", search, (query, key, *shared), legal(n, 2))
    compare(context, f"HiP {n}, stages", prune, (query, key, *STAGES), legal(n, 8))
    compare(context, f"HiP {n}, search for one query", search,
            (query[:, :, -1:], key, 512, 1, 2, 1), lambda *index: None)  # fmt: skip
    others = baselines.prefill(context, query, key, value)
    ours = {
        name: lambda name=name: attend(query, key, value, backend=name)
        for name in context.backends("hip_attention")
    }
    seconds = time_in_turn(context, others | ours, 1.0)
    best = min((seconds[name] for name in others if name in seconds), default=float("nan"))
    for name in [x for x in ours if x in seconds]:
        context.add(f"HiP {n}, {name} vs dense", best / seconds[name], "x",
                    ">= 12" if n == 131072 else "", ms=seconds[name] * 1e3)  # fmt: skip

"""HiP end to end at 32k on the structured inputs: budget, recall and speed, beside the best choice.

Recall is the share of attention mass kept, mean over 16 blocks of queries of every head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_attn import HiP, InfiniteHiP, attention
from sparse_attn.block_index import BlockIndex

from ..harness import DTYPE, DTYPE_NAME, Report, check, time_in_turn
from ..inputs import gen, locality
from ..recall import attention_mass, best_recall, recall

# in large blocks wide strides and more budget keep as much as the default strides, in less time
CONFIGS = [
    HiP(budget=512),
    HiP(budget=2048),
    HiP(budget=8192, kv_block=16, window=1024),
    HiP(budget=8192, kv_block=16, key_stride=8, q_stride=4, window=1024),
    HiP(budget=10240, kv_block=16, key_stride=8, q_stride=4, window=1024),
    HiP(budget=16384, kv_block=32, key_stride=16, q_stride=4, window=1024),
    HiP(budget=20480, kv_block=64, key_stride=32, q_stride=4, window=1024),
    InfiniteHiP(keeps=(16384, 8192, 4096), q_strides=(4, 4, 4)),
]


def run(report: Report) -> None:
    alike(report)
    against_dense(report)
    q, k, v = gen(7, 32768, "mixed")
    end_to_end(report, *(torch.from_numpy(x).transpose(1, 2).to(DTYPE) for x in (q, k, v)))


def alike(report: Report) -> None:
    """Keys whose neighbours are alike: what a search needs; one block of queries at 8192."""
    for length in (1, 4, 16, 64):
        masses, tensors = [], []
        for seed in range(4):
            q, k = locality(seed, 8192, length)
            tensors.append(tuple(torch.from_numpy(x).transpose(1, 2) for x in (q, k)))
            masses.append(attention_mass(*tensors[-1], 64, 1))
        for budget in (512, 1024):
            stages = ((64, 32, 8), (8 * budget, 4 * budget, budget), (4, 4, 1), 64, 64, 256)
            best = sum(best_recall(m, budget, 2, 64, 256) for m in masses) / 4
            for name, config in (
                ("HiP", HiP(budget=budget, sink=64)),
                ("HiP, two branches", HiP(budget=budget, sink=64, branch=2)),
                ("InfiniteHiP", InfiniteHiP(*stages)),
                ("InfiniteHiP, heads merged", InfiniteHiP(*stages, merge_heads="all")),
            ):
                kept = [recall(m, config.select(*t)) for m, t in zip(masses, tensors, strict=True)]
                report.add(
                    f"{name}, budget {budget}, keys alike over {length}: recall",
                    sum(kept) / 4,
                    best=best,
                    config=str(config),
                )


def against_dense(report: Report) -> None:
    """Defaults of both methods beside own dense attention: from where on they pay."""
    q, k, v = gen(7, 32768, "mixed", Hq=8, Hkv=2, D=64)
    tensors = [torch.from_numpy(x).transpose(1, 2).to(DTYPE) for x in (q, k, v)]
    for n in (2048, 4096, 8192, 16384, 32768):
        for queries in (1, 128, min(n, 2048)):  # 2048: a chunk, whose rows see nearly all keys
            query = tensors[0][:, :, n - queries : n]
            key, value = (x[:, :, :n] for x in tensors[1:])
            methods = {"dense": "dense", "hip": HiP(), "infinite_hip": InfiniteHiP()}
            seconds = time_in_turn(
                {
                    name: lambda t=(query, key, value, m): attention(*t, fallback=False)
                    for name, m in methods.items()
                },
                3,
            )
            for name in ("hip", "infinite_hip"):
                report.add(
                    f"{name}, defaults, vs own dense, last {queries} queries of {n} keys",
                    seconds["dense"] / seconds[name],
                    config=str(methods[name]),
                )


def describe(config: HiP | InfiniteHiP) -> tuple[str, int, int]:
    """Name, budget and block of keys of a config."""
    if isinstance(config, InfiniteHiP):
        return "InfiniteHiP", config.keeps[-1], config.chunks[-1]
    return "HiP", config.budget, config.kv_block


def end_to_end(report: Report, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    n, group = key.shape[2], query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.repeat_interleave(group, 1) for x in (key, value))
    masses = attention_mass(query, key, 64, 16)
    last = query[:, :, -64:]
    alternatives = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, wide_key, wide_value, is_causal=True),
        "dense": lambda: attention(query, key, value, "dense"),
    }
    kept = {}
    for config in CONFIGS:
        index = config.select(query, key)
        kept[config] = recall(masses, index)
        got = attention(query, key, value, config, fallback=False)[:, :, -64:]
        check(str(config), got, last_rows(index, last, key, value), 1e-2)
        alternatives[config] = lambda c=config: attention(query, key, value, c, fallback=False)
        alternatives[config, "select"] = lambda c=config: c.select(query, key)
    seconds = time_in_turn(alternatives, 1)
    for config in CONFIGS:
        name, budget, block = describe(config)
        report.add(
            f"{name} vs sdpa, {DTYPE_NAME}, mixed, 4/2 x {n} x 64, budget {budget}",
            seconds["sdpa"] / seconds[config],
            ">= 10" if kept[config] >= 0.95 else "",
            recall=kept[config],
            best=best_recall(masses, budget, block, config.sink, config.window),
            kv_block=block,
            vs_own_dense=seconds["dense"] / seconds[config],
            ms=seconds[config] * 1e3,
            select_ms=seconds[config, "select"] * 1e3,
            config=str(config),
        )


def last_rows(
    index: BlockIndex, last: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """What the reference makes of the last query block of an index."""
    from sparse_attn.ops.block_sparse_attention import op

    part = (index.indices[:, :, -1:], index.counts[:, :, -1:], index.q_block, index.kv_block)
    args = (last, key, value, *part, True, index.sink, index.window)
    return op(*args, backend="reference")[0]

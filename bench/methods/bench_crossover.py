"""From which length on each method beats own dense attention: the entries of crossover.py."""

from __future__ import annotations

import torch

from sparse_attn import attention
from sparse_attn.cpu_isa import BEST
from sparse_attn.crossover import CAUTIOUS, MEASURED
from sparse_attn.methods import METHODS
from sparse_attn.ops.block_sparse_attention import op as attend

from ..harness import DTYPE, Report, check, time_in_turn
from ..inputs import gen

KEYS = (1024, 2048, 4096, 8192, 16384)
QUERIES = (128, 512, 1024, 4096)


def run(report: Report) -> None:
    for kind in ("sharp", "mixed"):
        q, k, v = gen(7, KEYS[-1], kind, Hq=8, Hkv=2, D=64)
        tensors = [torch.from_numpy(x).transpose(1, 2).to(DTYPE) for x in (q, k, v)]
        for name, places in MEASURED.items():
            least = places.get(BEST, CAUTIOUS)
            for n in KEYS:
                goal = ">= 1" if n >= least.keys else ""
                query, key, value = (x[:, :, :n] for x in tensors)
                measure(report, f"{name}, {kind}, {n} keys", name, query, key, value, goal)
            for n in QUERIES:
                goal = ">= 1" if n >= least.queries else ""
                query = tensors[0][:, :, -n:]
                what = f"{name}, {kind}, last {n} queries of {KEYS[-1]} keys"
                measure(report, what, name, query, *tensors[1:], goal)


def measure(
    report: Report,
    what: str,
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    goal: str,
) -> None:
    """Adds dense time / method time for one size; defaults of the method, in tokens of the call."""
    config = METHODS[name]()
    out, stats = attention(query, key, value, config, fallback=False, return_stats=True)
    index = config.select(query, key)
    # the last query blocks: all of them would take the reference long
    blocks = 128 // index.q_block
    rows = slice((-(-query.shape[2] // index.q_block) - blocks) * index.q_block, None)
    part = index._replace(
        indices=index.indices[:, :, -blocks:], counts=index.counts[:, :, -blocks:]
    )
    last = query[:, :, rows]
    args = (last, key, value, *part.blocks, True, part.sink, part.window)
    want, _ = attend(*args, backend="reference")
    check(what, out[:, :, rows], want, 1e-2)
    seconds = time_in_turn(
        {
            "dense": lambda: attention(query, key, value, "dense"),
            "method": lambda: attention(query, key, value, config, fallback=False),
        },
        5,
    )
    report.add(what, seconds["dense"] / seconds["method"], goal, density=stats.density)

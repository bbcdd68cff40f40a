"""Inputs of the tests of Squeezed Attention's operators, and the recorded ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from sparse_attn.reference.squeezed_lookup import children_of, cluster_scores, keep, runs_of
from tests.cases import CUDA, RUNS, Shape, inputs

ORACLES = Path(__file__).parent / "oracles" / "squeezed"


def runs_for(op):
    """Every way to run an operator here that it has an implementation for."""
    backends = {row.backend for row in op.impls}
    return [run for run in [*RUNS, CUDA[-1]] if run[0] in backends]


def dtype_for(run):
    """What every backend serves: the CUDA kernels take 16-bit elements only."""
    return torch.bfloat16 if run[0] == "cuda" else torch.float32


@dataclass(frozen=True)
class Case:
    """Sizes of one lookup."""

    B: int = 1
    C: int = 1
    Hq: int = 4
    Hkv: int = 2
    Tq: int = 3
    K: int = 40
    K1: int = 0  # 0: one level
    D: int = 64
    largest: int = 9  # keys of a cluster; some have none
    shared: bool = False
    quantile: float = 0.7
    spread: float = 1.0


def lookup_inputs(case: Case, dtype: torch.dtype = torch.float32):
    """The arguments of squeezed_lookup, thresholds in gaps of the scores: no near ties."""
    query = torch.randn(case.B, case.Tq, case.Hq, case.D).mul(case.spread).to(dtype)
    query = query.transpose(1, 2)
    counts = torch.randint(0, case.largest + 1, (case.C, case.Hkv, case.K))
    counts[..., 0] = 1
    offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()
    centroids = torch.randn(case.C, case.Hkv, case.K, case.D).to(dtype)
    args = [query, centroids, counts.float().log(), offsets, None]
    coarse = [None] * 4
    if case.K1:
        bounds = torch.randint(0, case.K + 1, (case.C, case.Hkv, case.K1 - 1)).sort(-1).values
        children = torch.nn.functional.pad(bounds, (1, 1))
        children[..., -1] = case.K
        below = offsets.long().gather(-1, children).diff(dim=-1)
        coarse = [
            torch.randn(case.C, case.Hkv, case.K1, case.D).to(dtype), below.float().log(),
            children.int(), None,
        ]  # fmt: skip
    return with_thresholds([*args, *coarse, case.shared, None], case.quantile)


def with_thresholds(args, quantile):
    """The arguments with thresholds at about a quantile of the scores, in the widest gap near."""
    query, centroids, log_counts, offsets, _, *coarse, shared, scale = args
    alive = None
    if coarse[0] is not None:
        scores = cluster_scores(
            query.double(), coarse[0].double(), coarse[1].double(), shared, scale
        )
        coarse[3] = in_a_gap(scores, min(quantile, 0.5))
        parents = keep(scores, coarse[1], coarse[3])
        alive = children_of(parents, coarse[2], centroids.shape[2])
    scores = cluster_scores(
        query.double(), centroids.double(), log_counts.double(), shared, scale, alive
    )
    return [
        query,
        centroids,
        log_counts,
        offsets,
        in_a_gap(scores, quantile),
        *coarse,
        shared,
        scale,
    ]


def in_a_gap(scores, quantile):
    values = scores[scores > 0].log().sort().values
    if len(values) == 0:
        return torch.tensor(0.0)
    at = int(quantile * (len(values) - 1))
    near = values[max(0, at - 4) : at + 5]
    widest = near.diff().argmax() if len(near) > 1 else 0
    if len(near) < 2 or near.diff()[widest] < 1e-3:
        return (values[0].exp() / 2).float()
    return ((near[widest] + near[widest + 1]) / 2).exp().float()


def in_float64(args):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
    ]


def attend_inputs(shape, Hi, tail, share=0.5, C=1, dtype=torch.float32, spread=1.0, mean=5):
    """The arguments of squeezed_attend: Tk tokens in clusters of about `mean`, `tail` behind."""
    query, key, value = inputs(shape, torch.float32, spread)
    key, value = key[:C], value[:C]
    _, tail_key, tail_value = inputs(Shape(**{**vars(shape), "Tk": max(1, tail)}), torch.float32)
    tail_key, tail_value = tail_key[:, :, :tail], tail_value[:, :, :tail]
    tensors = [x.to(dtype) for x in (query, key, value, tail_key, tail_value)]
    K = max(1, shape.Tk // mean)
    bounds = torch.randint(0, shape.Tk + 1, (C, shape.Hkv, K + 1)).sort(-1).values.int()
    bounds[..., 0], bounds[..., -1] = 0, shape.Tk
    kept = torch.rand(shape.B, Hi, K) < share
    return [*tensors, *runs_of(kept, bounds)[:3], None, None]


@cache
def recorded(name):
    return np.load(ORACLES / f"{name}.npz")


FLAT, HIERARCHICAL = "squeezed_T1124_nq37", "squeezed_hier_T4196_nq20"


def recorded_lookup(file, prefix, layer, mode, quantile, dtype):
    """The arguments of squeezed_lookup for a recorded call, and where the tokens lie.

    Returns (arguments, order [H, Sc]): token i of the sorted context stood at order[h, i].
    """
    z = recorded(file)
    queries = torch.from_numpy(z[f"l{layer}_q_in"])
    nq = int(z["nq"])
    query = (queries[:, :nq] if mode == "prefill" else queries[:, -1:])[None].to(dtype)
    labels = torch.from_numpy(z[f"l{layer}_labels"]).long()
    counts = torch.from_numpy(z[f"l{layer}_counts"]).long()
    centroids = torch.from_numpy(z[f"l{layer}_centroids"])
    coarse = [None] * 4
    if file == HIERARCHICAL:
        parent = torch.from_numpy(z[f"l{layer}_l1_of_l2"]).long()
        by_parent = parent.argsort(dim=-1, stable=True)
        centroids = centroids.gather(1, by_parent[..., None].expand_as(centroids))
        labels = by_parent.argsort(-1).gather(1, labels)
        counts, parent = counts.gather(1, by_parent), parent.gather(1, by_parent)
        n = int(z["K1"])
        sizes = torch.zeros(len(parent), n, dtype=torch.long)
        below = sizes.scatter_add(1, parent, counts)
        children = torch.nn.functional.pad(
            sizes.scatter_add(1, parent, torch.ones_like(parent)).cumsum(-1), (1, 0)
        )
        coarse = [
            torch.from_numpy(z[f"l{layer}_l1_centroids"])[None].to(dtype),
            below.float().log()[None], children.int()[None],
            torch.tensor(float(z["tau1_0.5"])),
        ]  # fmt: skip
    offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()[None]
    args = [
        query, centroids[None].to(dtype), counts.float().log()[None], offsets,
        torch.tensor(float(z[f"tau_{quantile}"])), *coarse, False, None,
    ]  # fmt: skip
    return args, labels.argsort(dim=-1, stable=True)


RECORDED = [
    (FLAT, prefix, layer, mode, quantile)
    for prefix in ("f32", "f16") for layer in (0, 1) for mode in ("prefill", "decode")
    for quantile in ("0.5", "0.7", "0.9")
] + [(HIERARCHICAL, "f32", 0, mode, "0.9") for mode in ("prefill", "decode")]  # fmt: skip

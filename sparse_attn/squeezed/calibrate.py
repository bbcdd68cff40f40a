"""The global threshold: a quantile of the scores of all keys of all layers and heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def weighted_quantile(
    values: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], q: float
) -> float:
    """The q-quantile of a multiset in which values[i] occurs weights[i] times.

    Linear interpolation at position q (N - 1), N the sum of the weights, as numpy's default.
    """
    value = torch.cat([v.flatten() for v in values]).double().cpu()
    weight = torch.cat([w.flatten() for w in weights]).long().cpu()
    value, weight = value[weight > 0], weight[weight > 0]
    value, order = value.sort()
    ends = weight[order].cumsum(0)
    position = q * (int(ends[-1]) - 1)
    below = int(position)
    at = torch.tensor([below, min(below + 1, int(ends[-1]) - 1)])
    low, high = value[torch.searchsorted(ends, at, right=True)].tolist()
    return low + (high - low) * (position - below)


def threshold_of(
    scores: Sequence[torch.Tensor], counts: Sequence[torch.Tensor], sparsity: float, level: str
) -> float:
    """The threshold that drops a share `sparsity` of the keys of the calibration queries.

    Args:
        scores: per layer [H', K], mean scores of the calibration queries.
        counts: per layer [Hkv, K], keys per cluster.
        sparsity: 0 drops nothing. Above it the threshold is positive, if need be the smallest
            normal float32: most keys can have a score that underflows to 0, and a threshold of 0
            would keep everything.
        level: "fine" or "coarse", for the error.

    Raises:
        ValueError: a score is not finite, so that no threshold means anything.
    """
    for i, x in enumerate(scores):
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"the {level} scores of layer {i} are not finite: its keys or its calibration "
                "queries hold NaN or infinities, or overflow in their dtype"
            )
    if sparsity == 0:
        return 0.0
    weights = [
        n.repeat_interleave(s.shape[0] // n.shape[0], 0)
        for n, s in zip(counts, scores, strict=True)
    ]
    return max(weighted_quantile(scores, weights, sparsity), torch.finfo(torch.float32).tiny)

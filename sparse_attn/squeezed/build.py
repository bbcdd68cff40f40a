"""Clusters the layers of a context, one after another, all heads of a layer together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..ops import _checks as check
from ..reference.squeezed_lookup import cluster_scores
from .kmeans import kmeans, segmented, split_giants, sums_by_label
from .pages import in_large_pages

GROUP = 4  # clusters, or groups of them, on average, that stand together
ORDER_ROUNDS = 5  # of the K-means that finds them

if TYPE_CHECKING:
    from .context import Parameters, SqueezedLayer


def build_layers(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    queries: Sequence[torch.Tensor],
    p: Parameters,
    progress: bool,
    release: bool = False,
) -> tuple[SqueezedLayer, ...]:
    """The layers with threshold 0; `SqueezedContext.calibrated` sets it from the scores.

    With `release` each layer's tensors leave the lists as soon as it is built, so that the whole
    context is not held twice.
    """
    if not len(keys) == len(values) == len(queries) > 0:
        raise ValueError(
            f"keys, values, queries: got {len(keys)}, {len(values)} and {len(queries)} layers, "
            "expected as many of each, at least 1"
        )
    for i in range(len(keys)):
        _check_layer(i, keys[i], values[i], queries[i], p)
    steps = len(keys) * _steps(keys[0].shape[2] - p.window, p)
    with _Bar(steps, progress) as tick, torch.no_grad():
        layers = []
        for i in range(len(keys)):
            layers.append(build_layer(keys[i], values[i], queries[i], p, tick))
            if release:
                keys[i] = values[i] = queries[i] = None  # type: ignore[index]
        return tuple(layers)


def _check_layer(
    i: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, p: Parameters
) -> None:
    dtypes = check.DTYPES[:3]
    check.tensor(f"keys[{i}]", key, ("1", "Hkv", "S", "D"), dtypes)
    check.tensor(f"values[{i}]", value, ("1", "Hkv", "S", "Dv"), dtypes)
    check.tensor(f"queries[{i}]", query, ("1", "Hq", "W", "D"), dtypes)
    for name, x in (("keys", key), ("values", value), ("queries", query)):
        if x.shape[0] != 1:
            raise ValueError(f"{name}[{i}]: batch size is {x.shape[0]}, expected 1: one context")
    check.like(f"values[{i}]", value, key, f"keys[{i}]")
    check.like(f"queries[{i}]", query, key, f"keys[{i}]")
    check.same(f"values[{i}]", "heads and length", tuple(value.shape[1:3]),
               tuple(key.shape[1:3]), f"keys[{i}]")  # fmt: skip
    check.same(f"queries[{i}]", "head_dim", query.shape[3], key.shape[3], f"keys[{i}]")
    check.heads(query, key)
    if key.shape[2] <= p.window:
        raise ValueError(
            f"keys[{i}]: {key.shape[2]} tokens, expected more than window, {p.window}: a context "
            "so short needs no clusters"
        )
    if query.shape[2] != p.window:
        raise ValueError(
            f"queries[{i}]: {query.shape[2]} queries, expected window, {p.window}: those of the "
            "last tokens alone"
        )


def _clusters(share: float, n: int) -> int:
    """The paper's rounding; 1e-9 so that 5 % of 100 is 5 in floats too."""
    return max(1, int(share * n + 1e-9))


def _steps(n: int, p: Parameters) -> int:
    parts = 1 if p.segment is None else max(1, round(n / p.segment))
    return parts * (p.iterations + 1)


def build_layer(
    key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, p: Parameters, tick: Any
) -> SqueezedLayer:
    """One layer: K-means on normalised keys, means of raw keys, everything sorted by cluster."""
    from .context import SqueezedLayer

    n = key.shape[2] - p.window
    raw = key[0, :, :n].float()
    generator = torch.Generator(device=key.device).manual_seed(p.seed)
    x = F.normalize(raw, dim=-1)
    labels, k = segmented(x, _clusters(p.clusters, n), p.segment, p.iterations, generator, tick)
    if p.split_above is not None:
        labels, k = split_giants(x, labels, k, p.split_above, generator)
    del x
    sums, counts = sums_by_label(raw, labels, k)
    means = sums / counts.clamp(min=1)[..., None]
    coarse: dict[str, torch.Tensor] = {}
    means, counts, labels = _reorder(_similar_together(means, generator), means, counts, labels)
    if p.coarse is not None:
        means, counts, labels, coarse = _two_levels(means, counts, labels, n, p, generator)
    order = labels.argsort(dim=-1, stable=True)
    offsets = F.pad(counts.cumsum(-1), (1, 0)).int()[None]
    log_counts = counts.float().log()[None]
    scores = cluster_scores(query.float(), means[None], log_counts, p.shared, p.scale)[0]
    if coarse:
        coarse["coarse_scores"] = cluster_scores(
            query.float(), coarse["coarse_centroids"], coarse["coarse_log_counts"], p.shared,
            p.scale,
        )[0]  # fmt: skip
        coarse["coarse_centroids"] = coarse["coarse_centroids"].to(key.dtype)
        coarse["coarse_threshold"] = torch.zeros((), device=key.device)
    names = ("coarse_centroids", "coarse_log_counts", "children", "coarse_threshold",
             "coarse_scores")  # fmt: skip
    return SqueezedLayer(
        key=_sorted(key, order),
        value=_sorted(value, order),
        order=order.int()[None],
        window_key=key[:, :, n:].clone(),
        window_value=value[:, :, n:].clone(),
        centroids=means[None].to(key.dtype),
        log_counts=log_counts,
        offsets=offsets,
        threshold=torch.zeros((), device=key.device),
        scores=scores,
        shared=p.shared,
        scale=p.scale,
        **{name: coarse.get(name) for name in names},
    )


def _sorted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens `order` [H, N] of x [1, H, S, D]."""
    at = order[None, ..., None].expand(-1, -1, -1, x.shape[3])
    return torch.gather(x, 2, at, out=in_large_pages(at.shape, x.dtype, x.device))


def _similar_together(means: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An order of the clusters [H, K] in which similar ones stand together: groups of groups.

    What a query keeps then lies in fewer, longer runs, which memory delivers faster.
    """
    x, levels = F.normalize(means, dim=-1), []
    while x.shape[1] > GROUP:
        k = x.shape[1] // GROUP
        levels.append(kmeans(x, k, ORDER_ROUNDS, generator))
        x = F.normalize(sums_by_label(x, levels[-1], k)[0], dim=-1)
    place = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    for group in reversed(levels):  # members of a group follow each other where it stands
        place = place.gather(1, group).argsort(dim=-1, stable=True).argsort(dim=-1)
    return place.argsort(dim=-1)


def _reorder(
    order: torch.Tensor, means: torch.Tensor, counts: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clusters in another order: [H, K, D], [H, K] and the labels of the keys [H, N]."""
    means = means.gather(1, order[..., None].expand_as(means))
    return means, counts.gather(1, order), order.argsort(dim=-1).gather(1, labels)


def _two_levels(
    means: torch.Tensor,
    counts: torch.Tensor,
    labels: torch.Tensor,
    n: int,
    p: Parameters,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Clusters the centroids and sorts them by parent.

    A parent's centroid is the mean of its centroids, each counted once whatever its size (empty
    clusters do not count); its size is the number of keys below it.
    """
    parents = _clusters(p.coarse or 0, n)
    label = kmeans(F.normalize(means, dim=-1), parents, p.iterations, generator)
    parents = min(parents, means.shape[1])
    above, _ = sums_by_label(means, label, parents)
    label = _similar_together(above, generator).argsort(dim=-1).gather(1, label)
    by_parent = label.argsort(dim=-1, stable=True)
    label = label.gather(1, by_parent)
    means, counts, labels = _reorder(by_parent, means, counts, labels)
    filled = (counts > 0).to(means.dtype)
    heads = torch.arange(len(means), device=means.device)[:, None]
    place = (label + parents * heads).flatten()
    wide = means.new_zeros((len(means) * parents, means.shape[2] + 1))
    wide.index_add_(
        0, place, torch.cat([means * filled[..., None], filled[..., None]], -1).flatten(0, 1)
    )
    wide = wide.view(len(means), parents, -1)
    keys = torch.zeros((len(means), parents), dtype=torch.int64, device=means.device)
    keys.scatter_add_(1, label, counts)
    children = F.pad(torch.zeros_like(keys).scatter_add_(1, label, torch.ones_like(label)), (1, 0))
    return (
        means,
        counts,
        labels,
        {
            "coarse_centroids": (wide[..., :-1] / wide[..., -1:].clamp(min=1))[None],
            "coarse_log_counts": keys.float().log()[None],
            "children": children.cumsum(-1).int()[None],
        },
    )


class _Bar:
    """A progress bar where one is wanted and tqdm is there."""

    def __init__(self, steps: int, wanted: bool) -> None:
        self.bar: Any = None
        if wanted:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=steps, desc="clustering", unit="round", leave=False)

    def __enter__(self) -> Any:
        return (lambda: None) if self.bar is None else self.bar.update

    def __exit__(self, *args: Any) -> None:
        if self.bar is not None:
            self.bar.close()

"""Squeezed Attention: decoding against own dense decoding, preparing against other K-means."""

from __future__ import annotations

import time

import torch

from sparse_attn import attention
from sparse_attn.squeezed.kmeans import kmeans, sums_by_label

from ..harness import Report, check, time_in_turn
from ..squeezed_inputs import HEADS, KEPT, Prepared, prepared, realised, with_share

CONTEXT = 131072
SMALL = 16384  # keys of the comparison with libraries
ROUNDS = 10


def run(report: Report) -> None:
    case = prepared(CONTEXT)
    report.add(
        f"preparing {CONTEXT} keys x {HEADS} heads x 128, segments of 8192, seconds",
        case.seconds, gib_beyond_input=case.gib, iterations=ROUNDS,
        clusters=case.layer.centroids.shape[2],
    )  # fmt: skip
    for share in (KEPT, 0.3):
        decode(report, case, share)
    libraries(report, case)


def decode(report: Report, case: Prepared, share: float) -> None:
    """One token behind a long context, the lookup included."""
    query = case.queries[:, :, -1:]
    layer = with_share(case.layer, query, share)
    tail = [torch.cat([x, x[:, :, -16:]], 2) for x in (layer.window_key, layer.window_value)]
    key, value = (torch.cat([x, y], 2) for x, y in zip((layer.key, layer.value), tail, strict=True))
    out, _, tokens = layer.attention(query, *tail)
    want, *_ = layer.attention(query, *tail, backend="reference")
    check("squeezed decode", out, want, 1e-2)
    kept, run = realised(layer, query)
    target = torch.empty_like(key)
    seconds = time_in_turn(
        {
            "copy": lambda: target.copy_(key),
            "dense": lambda: attention(query, key, value, "dense"),
            "squeezed": lambda: layer.attention(query, *tail),
        },
        15,
    )
    dense_bytes = 2 * key.numel() * key.element_size()
    floor = (
        layer.centroids.nbytes + 2 * int(tokens.sum()) * 128 * 2 + 2 * tail[0].nbytes
    )  # what must be read, docs/methods/squeezed.md
    report.add(
        f"squeezed decode vs own dense, bfloat16, {HEADS} x {CONTEXT} x 128, kept {kept:.3f}",
        seconds["dense"] / seconds["squeezed"],
        ">= 6" if share == KEPT else "",
        limit_by_bytes=dense_bytes / floor,
        ms=seconds["squeezed"] * 1e3,
        dense_ms=seconds["dense"] * 1e3,
        gb_per_s=floor / seconds["squeezed"] / 1e9,
        dense_gb_per_s=dense_bytes / seconds["dense"] / 1e9,
        tokens_per_run=run,
        least_kept=tokens.min().item() / CONTEXT,
        most_kept=tokens.max().item() / CONTEXT,
    )


def libraries(report: Report, case: Prepared) -> None:
    """One head, the whole of it at once, beside faiss and scikit-learn where they are installed."""
    x = case.normalised[:1, :SMALL].contiguous()
    k = SMALL // 20
    found: dict[str, tuple[float, float]] = {}

    def measure(name, run):  # run gives labels
        start = time.perf_counter()
        labels = torch.as_tensor(run()).long()
        found[name] = (time.perf_counter() - start, objective(x, labels.reshape(1, -1), k))

    measure("ours", lambda: kmeans(x, k, ROUNDS, torch.Generator().manual_seed(0)))
    measure("ours, 20", lambda: kmeans(x, k, 20, torch.Generator().manual_seed(0)))
    try:
        import sklearn.cluster

        run = sklearn.cluster.KMeans(k, n_init=1, max_iter=300, random_state=0)
        measure("scikit-learn", lambda: run.fit(x[0].numpy()).labels_)
    except ImportError:
        print("scikit-learn is not installed: not compared")
    try:
        import faiss

        def with_faiss():
            model = faiss.Kmeans(128, k, niter=ROUNDS, seed=0, max_points_per_centroid=10**6)
            model.train(x[0].numpy())
            return model.index.search(x[0].numpy(), 1)[1]

        measure("faiss", with_faiss)
    except ImportError:
        print("faiss is not installed: not compared")
    base = "scikit-learn" if "scikit-learn" in found else "ours"
    for name, (seconds, value) in found.items():
        report.add(
            f"K-means, {name}, {SMALL} keys x 128, {k} clusters: objective / {base}'s",
            value / found[base][1],
            "<= 1.02" if name.startswith("ours") and base != "ours" else "",
            seconds=seconds,
        )


def objective(x: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Sum of squared distances to the mean of one's cluster."""
    sums, counts = sums_by_label(x, labels, k)
    return (x.square().sum() - (sums.square().sum(-1) / counts.clamp(min=1)).sum()).item()

"""The K-means of Squeezed Attention beside others: python -m bench.quality.squeezed_kmeans

For each number of keys given (default 16384 32768 131072), normalised keys of one head of
bench/inputs.py, kind "mixed": seconds, memory beyond the keys and the sum of squared distances,
against scikit-learn's where it is installed. Libraries that are not installed are left out.
Writes bench/results/squeezed_kmeans.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from bench.harness import Report
from bench.squeezed_inputs import structured
from sparse_attn.evaluate.memory import MEASURABLE, forget_peak, resident
from sparse_attn.squeezed.kmeans import kmeans, segmented, sums_by_label

SIZES, ROUNDS, SHARE, SEGMENT = (16384, 32768, 131072), 10, 20, 8192


def objective(x: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Sum of squared distances of x [1, N, D] to the mean of one's cluster."""
    sums, counts = sums_by_label(x, labels, k)
    return (x.square().sum() - (sums.square().sum(-1) / counts.clamp(min=1)).sum()).item()


def contenders(x: torch.Tensor, k: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Each gives the labels of the rows of x [1, N, D]; all have ROUNDS rounds at most."""

    def seeded():
        return torch.Generator().manual_seed(0)

    found = {
        "scikit-learn": lambda: scikit_learn(x, k),
        "ours": lambda: kmeans(x, k, ROUNDS, seeded()),
        f"ours in segments of {SEGMENT}": lambda: segmented(x, k, SEGMENT, ROUNDS, seeded())[0],
        "faiss": lambda: with_faiss(x, k),
    }
    for name, module in (("scikit-learn", "sklearn"), ("faiss", "faiss")):
        if find_spec(module) is None:
            print(f"{name} is not installed: not compared")
            del found[name]
    return found


def scikit_learn(x: torch.Tensor, k: int) -> torch.Tensor:
    from sklearn.cluster import KMeans

    model = KMeans(k, n_init=1, max_iter=ROUNDS, random_state=0)
    return torch.from_numpy(model.fit(x[0].numpy()).labels_)


def with_faiss(x: torch.Tensor, k: int) -> torch.Tensor:
    import faiss

    rows = x[0].numpy()
    model = faiss.Kmeans(x.shape[2], k, niter=ROUNDS, seed=0, max_points_per_centroid=len(rows))
    model.train(rows)
    return torch.from_numpy(model.index.search(rows, 1)[1][:, 0])


def compare(report: Report, n: int) -> None:
    """One row per contender; a small run first, so that what it imports is not counted."""
    x = F.normalize(structured(n)[1][0, :1].float(), dim=-1)
    k, base = n // SHARE, None
    small = contenders(x[:, :512].contiguous(), 16)
    for name, run in contenders(x, k).items():
        small[name]()
        before = forget_peak() if MEASURABLE else 0
        start = time.perf_counter()
        labels = run()
        seconds = time.perf_counter() - start
        gib = (resident("VmHWM") - before) / 2**30 if MEASURABLE else float("nan")
        value = objective(x, labels.long().reshape(1, -1), k)
        base = base or (name, value)
        rival = name.startswith("ours") and base[0] == "scikit-learn"
        report.add(
            f"K-means, {name}, one head of {n} keys x 128, {k} clusters: objective / {base[0]}'s",
            value / base[1],
            "<= 1.02" if rival else "",
            objective=value, seconds=seconds, gib_beyond_input=gib, iterations=ROUNDS,
        )  # fmt: skip


def main(sizes: list[str]) -> None:
    report = Report("squeezed_kmeans")
    for n in [int(size) for size in sizes] or SIZES:
        compare(report, n)
    report.write()


if __name__ == "__main__":
    main(sys.argv[1:])

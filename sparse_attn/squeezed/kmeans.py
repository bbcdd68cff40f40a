"""K-means, batched over heads: Lloyd's iterations from a seeded k-means++ start."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

SCORES = 2**25  # held at once
START_ROUNDS = 32  # of the start: more centres than that are drawn several at a time
LEAST_SAMPLE = 1024  # rows that decide between candidates of the start, at least
TOLERANCE = 1e-4  # of the squared shift of the means, against the variance, as scikit-learn's


def nearest(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """For each row of x [H, N, D] the index of its nearest mean of [H, K, D]."""
    labels = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    square = means.square().sum(-1)[:, None] / 2
    rows = max(1, SCORES // means.shape[1])
    for h in range(len(x)):
        for i in range(0, x.shape[1], rows):
            part = x[h, i : i + rows]
            labels[h, i : i + rows] = torch.addmm(square[h], part, means[h].mT, alpha=-1).argmin(-1)
    return labels


def distances(x: torch.Tensor, half: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Half the squared distance of each row of x [H, N, D] to its nearest of few centres
    [H, M, D]; `half` [H, N] are half the squares of the rows."""
    square = centres.square().sum(-1, keepdim=True) / 2
    least = torch.empty_like(half)
    rows = max(1, SCORES // (len(x) * centres.shape[1]))
    for i in range(0, x.shape[1], rows):
        part = x[:, i : i + rows].mT
        least[:, i : i + rows] = torch.baddbmm(square, centres, part, alpha=-1).amin(1)
    return least.add_(half).clamp_(min=0)


def start(x: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """k rows of x per head, as greedy k-means++ draws them.

    Each is the best of 2 + ln k rows that are drawn with probability proportional to the squared
    distance to those chosen before: the one that shortens the distances most, of a quarter of the
    rows. From START_ROUNDS centres on several are chosen per round, each among rows of its own.
    """
    heads, n = x.shape[:2]
    chosen = [torch.randint(n, (heads, 1), generator=generator, device=x.device)]
    half = torch.linalg.vecdot(x, x) / 2
    distance = distances(x, half, gather(x, chosen[0]))
    sample = slice(None) if n < 4 * LEAST_SAMPLE else slice(None, None, 4)
    sampled, sampled_half = x[:, sample].contiguous(), half[:, sample]
    trials = 2 + int(math.log(k))
    while (left := k - sum(c.shape[1] for c in chosen)) > 0:
        noise = torch.empty_like(distance).exponential_(generator=generator)
        count = min(left, max(1, k // START_ROUNDS), n)
        drawn = (distance / noise).topk(min(n, count * trials), -1).indices
        tried = drawn.shape[1] // count
        drawn = drawn[:, : count * tried].view(heads, tried, count)
        short = distance[:, sample] - sampled_half
        gain = gains(sampled, short, gather(x, drawn.flatten(1)))
        best = gain.view(drawn.shape).argmax(1, keepdim=True)
        drawn = drawn.gather(1, best)[:, 0]
        chosen.append(drawn)
        distance = torch.minimum(distance, distances(x, half, gather(x, drawn)))
    return gather(x, torch.cat(chosen, 1))


def gains(x: torch.Tensor, short: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """By how much each of centres [H, M, D] alone shortens the distances of the rows of x
    [H, N, D], summed: [H, M]. `short` [H, N]: half the squared distance minus half the square."""
    total = x.new_zeros(centres.shape[:2])
    square = centres.square().sum(-1, keepdim=True) / 2
    rows = max(1, SCORES // (len(x) * centres.shape[1]))
    for i in range(0, x.shape[1], rows):
        offset = short[:, None, i : i + rows] - square
        total += torch.baddbmm(offset, centres, x[:, i : i + rows].mT).clamp_(min=0).sum(-1)
    return total


def gather(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows `at` [H, M] of x [H, N, D]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))


def sums_by_label(
    x: torch.Tensor, labels: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [H, K, D] and counts [H, K] of the rows of x [H, N, D] with each label."""
    place = (labels + k * torch.arange(len(x), device=x.device)[:, None]).flatten()
    sums = x.new_zeros((len(x) * k, x.shape[2])).index_add_(0, place, x.flatten(0, 1))
    counts = torch.bincount(place, minlength=len(x) * k)
    return sums.view(len(x), k, -1), counts.view(len(x), k)


def kmeans(
    x: torch.Tensor,
    k: int,
    iterations: int,
    generator: torch.Generator,
    tick: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Labels int64 [H, N] of the rows of x float32 [H, N, D], each head by itself.

    Euclidean, at most `iterations` rounds, less when the means stand still. `tick` is called
    after the start and after each round, `iterations` + 1 times in all. A cluster may be empty.
    """
    k = min(k, x.shape[1])
    means = start(x, k, generator)
    tick()
    still = TOLERANCE * x.var(1, unbiased=False).mean(-1)
    for done in range(1, iterations + 1):
        labels = nearest(x, means)
        sums, counts = sums_by_label(x, labels, k)
        moved = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], means)
        shift = (moved - means).square().sum((1, 2))
        means = moved
        tick()
        if (shift <= still).all():
            for _ in range(done, iterations):
                tick()
            break
    return labels


def segmented(
    x: torch.Tensor,
    k: int,
    segment: int | None,
    iterations: int,
    generator: torch.Generator,
    tick: Callable[[], object] = lambda: None,
) -> tuple[torch.Tensor, int]:
    """Labels of x, clustered in segments of about `segment` rows, and the number of clusters.

    Each segment gets its share of the k clusters, so the cost grows linearly with the length.
    """
    n = x.shape[1]
    parts = 1 if segment is None else max(1, round(n / segment))
    bounds = [n * i // parts for i in range(parts + 1)]
    labels, base = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device), 0
    for begin, end in zip(bounds, bounds[1:], strict=False):
        share = max(1, k * end // n - k * begin // n)
        share = min(share, end - begin)
        part = x[:, begin:end].contiguous()
        labels[:, begin:end] = kmeans(part, share, iterations, generator, tick) + base
        base += share
    return labels, base


def split_giants(
    x: torch.Tensor, labels: torch.Tensor, k: int, above: float, generator: torch.Generator
) -> tuple[torch.Tensor, int]:
    """Splits clusters of more than `above` times the mean size; the new number of clusters.

    Not in the paper: a cluster is kept or dropped whole, and outliers can pull a large part of a
    context into one.
    """
    limit = max(1, int(above * x.shape[1] / k))
    labels, most = labels.clone(), k
    for h in range(len(x)):
        counts, new = torch.bincount(labels[h], minlength=k), k
        for j in (counts > limit).nonzero().flatten().tolist():
            members = (labels[h] == j).nonzero().flatten()
            pieces = -(-len(members) // limit)
            piece = kmeans(x[h : h + 1, members], pieces, 10, generator)[0]
            # members that K-means cannot part, such as copies of one key, are cut by position
            order = piece.argsort(stable=True)
            inside = torch.arange(len(members), device=x.device)
            sizes = torch.bincount(piece, minlength=pieces)
            inside = inside - (sizes.cumsum(0) - sizes)[piece[order]]
            code = piece[order] * (len(members) // limit + 1) + inside // limit
            number = torch.unique_consecutive(code, return_inverse=True)[1]
            labels[h, members[order]] = torch.where(number == 0, j, new + number - 1)
            new += int(number[-1])
        most = max(most, new)
    return labels, most

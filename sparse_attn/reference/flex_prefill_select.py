"""Reference of `flex_prefill_select` (FlexPrefill, arXiv 2502.20766), both variants.

`official` follows the published code step by step (docs/methods/flex_prefill.md names each);
`exact` keeps its idea and mends its defects.
"""

from __future__ import annotations

import math

import torch

VERTICAL_SLASH, QUERY_AWARE = 0, 1


def flex_prefill_select(
    query: torch.Tensor,
    key: torch.Tensor,
    gamma: float = 0.95,
    tau: float = 0.1,
    min_budget: int = 1024,
    max_budget: int | None = None,
    block_size: int = 128,
    variant: str = "exact",
    causal: bool = True,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """indices [B, Hq, Mq, Nk], counts [B, Hq, Mq] and pattern [B, Hq] (1: query-aware)."""
    batch, heads, n_queries, head_dim = query.shape
    n_keys = key.shape[2]
    low = -(-min_budget // block_size)
    high = n_keys if max_budget is None else -(-max_budget // block_size)
    rows, blocks = -(-n_queries // block_size), -(-n_keys // block_size)
    mask = torch.zeros((batch, heads, rows, blocks), dtype=torch.bool, device=query.device)
    pattern = torch.zeros((batch, heads), dtype=torch.int32, device=query.device)
    select = official if variant == "official" else exact
    for b in range(batch):
        for h in range(heads):
            k = key[b, h // (heads // key.shape[1])]
            if gamma >= 1:
                mask[b, h] = visible_blocks(n_queries, n_keys, block_size, query.device)
                continue
            factor = 1 / math.sqrt(head_dim) if scale is None or variant == "official" else scale
            mask[b, h], pattern[b, h] = select(
                query[b, h], k, gamma, tau, low, min(high, blocks), block_size, factor
            )
    counts = mask.sum(-1, dtype=torch.int32)
    indices = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return indices.to(torch.int32), counts, pattern


def row_positions(n_queries, n_keys, block, device):
    """First and last position of each query block."""
    first = n_keys - n_queries + torch.arange(-(-n_queries // block), device=device) * block
    return first, (first + block - 1).clamp(max=n_keys - 1)


def visible_blocks(n_queries, n_keys, block, device):
    """[Mq, Nk] bool: blocks with a key at or before the last query of the row."""
    _, last = row_positions(n_queries, n_keys, block, device)
    return torch.arange(-(-n_keys // block), device=device) * block <= last[:, None]


def top(values, count):
    """Indices of the `count` largest; ties go to the lower index."""
    return values.sort(descending=True, stable=True).indices[:count]


def divergence(a, b):
    """Square root of the Jensen-Shannon divergence, natural log, with 0 * log 0 = 0."""
    m = ((a + b) / 2).clamp(min=torch.finfo(a.dtype).tiny)
    terms = torch.special.xlogy(a, a / m) + torch.special.xlogy(b, b / m)
    return (0.5 * terms.sum()).clamp(min=0).sqrt()


def pad_sum(x, block, dim=-1):
    """Sums over blocks of `block` from index 0; the last may be partial."""
    pad = -x.shape[dim] % block
    shape = list(x.shape)
    shape[dim] = pad
    return (
        torch.cat([x, x.new_zeros(shape)], dim)
        .unflatten(dim, (-1, block))
        .sum(dim + 1 if dim >= 0 else dim)
    )


def block_means(x, block):
    """Means of [T, D] over blocks of tokens, the last over its real tokens; float32."""
    size = pad_sum(x.new_ones((x.shape[0], 1), dtype=torch.float32), block, 0)
    return pad_sum(x.float(), block, 0) / size


# ---- the published code ----------------------------------------------------------------------


def official(q, k, gamma, tau, low, high, block, factor):
    """Rounds to bf16 where the published code does, which knows Tq = Tk only.

    A chunk's query block chooses what the blocks of the whole grid in which it lies would.
    """

    def bf16(x):
        return x.bfloat16().float()

    n_queries, n = q.shape[0], k.shape[0]
    low = max(low, 1)
    n_blocks = -(-n // block)
    first, last = (x[:, None] // block for x in row_positions(n_queries, n, block, q.device))
    visible = visible_blocks(n_queries, n, block, q.device)
    rows = min(block, n_queries, n)
    probe = bf16(q[-rows:].bfloat16().float() * factor)
    scores = bf16(probe @ bf16(k).T)
    row, column = torch.arange(rows)[:, None], torch.arange(n)
    scores = scores.masked_fill((column > n - rows + row).to(scores.device), -torch.inf)
    p = scores.softmax(-1)
    if not p.isfinite().all():
        return visible, 0
    vertical = p.mean(0)
    distance_from_far = column - row + (rows - 1)  # slash index i = distance n - 1 - i
    slash = (
        torch.zeros(n + rows, device=p.device).index_add_(
            0, distance_from_far.flatten().to(p.device), p.flatten()
        )[:n]
        / rows
    )

    def cover(x):
        return int((x.sort(descending=True).values.cumsum(0) <= gamma).sum()) + 1

    n_vertical = min(max(cover(vertical) // 128 + 1, low), high)
    n_slash = min(max(cover(slash) // 128 + 1, low), high)
    pooled = pad_sum(vertical, block)
    mean_key = bf16(block_means(bf16(k), block))
    estimate = bf16(bf16(probe.mean(0)) @ mean_key.T).softmax(-1)
    # the published code has no rule for 0 * log 0: NaN, which is not below tau
    defined = bool((estimate > 0).all() and (pooled > 0).all())
    query_aware = defined and bool(divergence(estimate, pooled) < tau)
    if query_aware:
        n_vertical = n_slash = low  # not bounded by `high`, as published
    pooled[0] = torch.inf
    pooled_slash = pad_sum(slash, block)
    pooled_slash[-1] = torch.inf
    mask = torch.zeros_like(visible)
    mask[:, top(pooled, n_vertical)] = True
    c = torch.arange(n_blocks, device=k.device)
    offsets = n_blocks - 1 - top(pooled_slash, n_slash)
    mask |= torch.isin(first - c, offsets) | torch.isin(last - c, offsets)
    if query_aware:
        mask |= official_query_aware(q, mean_key, visible, gamma, block, factor, bf16)
    return mask & visible, int(query_aware)


def official_query_aware(q, mean_key, visible, gamma, block, factor, bf16):
    """One threshold over the flattened map; the entry that crosses it is dropped."""
    pad = -q.shape[0] % block
    mean_query = bf16(pad_sum(bf16(q), block, 0) / block)
    mean_query[-1] = bf16(bf16(mean_query[-1] * block) / (block - pad))
    scores = bf16(bf16(mean_query * factor) @ mean_key.T)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0).flatten()
    order = weights.sort(descending=True, stable=True)
    kept = order.indices[order.values.cumsum(0) <= gamma * visible.any(-1).sum()]
    mask = torch.zeros_like(visible).flatten()
    mask[kept] = True
    return mask.view(visible.shape)


# ---- ours --------------------------------------------------------------------------------------


def exact(q, k, gamma, tau, low, high, block, factor):
    """Blocks that hold at least gamma of the probe rows' mass, unless `high` forbids it.

    A probe that is not finite keeps every block, so that the result is what dense attention gives.
    """
    n_queries, n_keys = q.shape[0], k.shape[0]
    n_blocks = -(-n_keys // block)
    first, last = row_positions(n_queries, n_keys, block, q.device)
    visible = visible_blocks(n_queries, n_keys, block, q.device)
    mask = visible & diagonal_and_sink(first, last, n_blocks, block)
    rows = min(block, n_queries, n_keys)
    p = (
        ((q[-rows:].float() @ k.float().T) * factor)
        .masked_fill(
            torch.ones(rows, n_keys, device=q.device).triu(n_keys - rows + 1).bool(), -torch.inf
        )
        .softmax(-1)
    )
    if not p.isfinite().all():
        return visible, 0

    size = pad_sum(torch.ones(n_keys, device=q.device), block)
    mean_key = block_means(k, block)
    scores = (q[-rows:].float().mean(0) @ mean_key.T) * factor
    estimate = (scores + size.log()).softmax(-1)
    mass = pad_sum(p.mean(0), block)
    query_aware = bool(divergence(estimate, mass) < tau)

    columns, buckets, free = attribute(p, first, n_queries, block)
    ranked = torch.cat([columns, buckets])
    order = ranked.sort(descending=True, stable=True)
    reached = free + order.values.cumsum(0)
    needed = 0 if query_aware or free >= gamma else int((reached < gamma).sum()) + 1
    chosen = order.indices[:needed]
    n_columns = min(max(int((chosen < n_blocks).sum()), low), high)
    n_buckets = min(max(int((chosen >= n_blocks).sum()), low), high)
    mask[:, top(columns, n_columns)] = True
    for bucket in top(buckets, n_buckets).tolist():
        mask |= touched(first, last, bucket, n_blocks, block)
    if query_aware:
        mask |= query_aware_rows(q, mean_key, size, visible, mask, gamma, block, factor)
        # the estimate promises nothing: where the truth is known, the probe rows, keep that too
        mask[(n_queries - rows) // block :, reaching(mass, gamma)] = True
    return mask & visible, int(query_aware)


def diagonal_and_sink(first, last, n_blocks, block):
    """Block 0 and the blocks in which the row's own positions lie."""
    c = torch.arange(n_blocks, device=first.device)
    own = (c >= first.clamp(min=0)[:, None] // block) & (c <= last[:, None] // block)
    return own | (c == 0)


def touched(first, last, bucket, n_blocks, block):
    """[Mq, Nk]: blocks that hold a key at a distance in [bucket * block, (bucket + 1) * block)."""
    c = torch.arange(n_blocks, device=first.device)
    low, high = first - (bucket + 1) * block + 1, last - bucket * block
    inside = (c >= low.clamp(min=0)[:, None] // block) & (c <= high[:, None].clamp(min=0) // block)
    return inside & (high >= 0)[:, None]


def attribute(p, first, n_queries, block):
    """Splits the probe's mass between columns of keys and buckets of distances.

    An entry goes to its column and its diagonal in proportion to the mean mass of each, so a
    stripe counts as a column and a line at constant distance as a bucket, not both as both. Mass
    in the blocks that every row keeps anyway is `free`. Returns [Nk] columns, [Nk] buckets, free.
    """
    rows, n_keys = p.shape
    row = torch.arange(rows, device=p.device)[:, None]
    column = torch.arange(n_keys, device=p.device)
    distance = (n_keys - rows + row - column).clamp(min=0)
    vertical = p.mean(0)
    slash = torch.zeros(n_keys, device=p.device).index_add_(0, distance.flatten(), p.flatten())
    slash = slash / rows
    total = vertical + slash[distance]
    share = torch.where(total > 0, vertical / total.clamp(min=1e-30), 0)
    own = first.clamp(min=0)[(n_queries - rows + row[:, 0]) // block] // block * block
    is_free = (column < block) | (column >= own[:, None])
    mean = p / rows
    paid = mean.masked_fill(is_free, 0)
    columns = pad_sum((paid * share).sum(0), block)
    at_distance = torch.zeros(n_keys, device=p.device).index_add_(
        0, distance.flatten(), (paid * (1 - share)).flatten()
    )
    return columns, pad_sum(at_distance, block), (mean - paid).sum()


def reaching(mass, gamma):
    """Indices of the fewest entries, heaviest first, that sum to gamma."""
    order = mass.sort(descending=True, stable=True)
    return order.indices[order.values.cumsum(0) - order.values < gamma]


def query_aware_rows(q, mean_key, size, visible, kept, gamma, block, factor):
    """For each row the fewest blocks that bring its estimated mass to gamma."""
    scores = (block_means(q, block) @ mean_key.T) * factor + size.log()
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    strange = ~scores.isfinite().all(-1, keepdim=True)
    weights = weights.nan_to_num(0)
    held = (weights * kept).sum(-1, keepdim=True)
    order = weights.masked_fill(kept, -1).sort(dim=-1, descending=True, stable=True)
    before = held + order.values.clamp(min=0).cumsum(-1) - order.values.clamp(min=0)
    wanted = (before < gamma) & (order.values > 0)
    return torch.zeros_like(visible).scatter_(-1, order.indices, wanted) | strange

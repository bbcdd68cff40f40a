"""What the published kernels of HiP (v1.1) and InfiniteHiP (v1.2) select, quirks included.

Built on the reference's steps; each departure from them is a named quirk, so that a test can show
which ones a recorded selection needs. docs/methods/hip.md has them as a table.
"""

from __future__ import annotations

import torch

from sparse_attn.reference._hip import best

MASKED = -32000.0  # the score of a pair that may not be seen

V11_QUIRKS = frozenset({
    "aligned chunks",  # chunk starts rounded down to a multiple of a step: the tail is unreachable
    "saturated rank",  # by sigmoid, rounded to bfloat16: above 6.2 all logits tie
    "sorting network",  # ties in the order that a bitonic sort leaves them in
    "wrapped rows",  # the missing rows of a ragged block are the first queries of the prompt
    "zero is masked",  # a product of exactly 0 counts as masked
    "strides end",  # the last key of each stride is sampled, not the first
})  # fmt: skip


def bitonic_order(values: torch.Tensor) -> torch.Tensor:
    """Indices of a descending bitonic sort of [N], N a power of two; equal values get swapped."""
    n = len(values)
    order = torch.arange(n)
    bits = n.bit_length() - 1
    for stage in range(1, bits + 1):
        group = torch.arange(n) >> stage  # direction alternates between groups; the last descends
        descending = (group % 2 == 1) if stage < bits else torch.ones(n, dtype=torch.bool)
        for step in range(stage - 1, -1, -1):
            left = torch.arange(n)[(torch.arange(n) >> step) % 2 == 0]
            right = left + (1 << step)
            swap = (values[order[left]] > values[order[right]]) ^ descending[left]
            a, b = order[left], order[right]
            order[left], order[right] = torch.where(swap, b, a), torch.where(swap, a, b)
    return order


def v11(query, key, *, mask_k, bq, bsq, bk, bsk, sw, sink, quirks=V11_QUIRKS):
    """Token offsets of the blocks of each (head, query block), ascending: query [H, Tq, D]."""
    heads, n_queries, _ = query.shape
    n_keys, keep = key.shape[1], mask_k // bk
    chosen = []
    for h in range(heads):
        k = key[h // (heads // key.shape[0])]
        for m in range(-(-n_queries // bq)):
            row = m * bq + torch.arange(bq // bsq) * bsq + min(n_queries, bsq) - 1
            row = row % n_queries if "wrapped rows" in quirks else row[row < n_queries]
            real = torch.arange(m * bq, min((m + 1) * bq, n_queries))
            position = n_keys - n_queries + row + 1  # counted from 1
            searched = max(0, int(real[-1]) + 1 + n_keys - n_queries - sw - sink)
            blocks, start = -(-searched // bk), -(-sink // bk)
            if searched <= mask_k:
                chosen.append((start + torch.arange(blocks)) * bk)
                continue

            def score(block, k=k, row=row, position=position, h=h):
                offset = torch.arange(0, bk, bsk) + (bsk - 1 if "strides end" in quirks else 0)
                token = block[:, None] * bk + offset
                dots = query[h, row] @ k[token.clamp(max=n_keys - 1)].mT  # [N, R, S]
                masked = token[:, None] > position[:, None] - sw - 1
                if "zero is masked" in quirks:
                    masked = masked | (dots == 0)
                dots = dots.masked_fill(masked, MASKED)
                return dots.masked_fill(token[:, None] >= n_keys, -torch.inf).amax((1, 2))

            chosen.append(v11_search(score, start, blocks, keep, quirks) * bk)
    return chosen


def v11_search(score, start, blocks, keep, quirks):
    if "aligned chunks" in quirks:
        step = -(-(1 << (blocks.bit_length() - 1)) // keep)
        at = (torch.tensor(blocks / keep, dtype=torch.float32) * torch.arange(keep + 1)).floor()
        bound = (at.long() // step * step).clamp(max=blocks) + start
    else:
        bound = start + torch.arange(keep + 1) * blocks // keep
    begin, length = bound[:-1], bound.diff()
    longest = float(length.max())
    while longest > 1:
        half = length // 2
        begin = torch.stack([begin, begin + half], 1).flatten()
        length = torch.stack([half, length - half], 1).flatten()
        value = score(begin + length // 2)
        if "saturated rank" in quirks:
            value = value.bfloat16().float().sigmoid().bfloat16().float()
        value = value.masked_fill(length == 0, -1 if "saturated rank" in quirks else -torch.inf)
        # after the network they stay in its order
        network = "sorting network" in quirks
        kept = bitonic_order(value)[:keep] if network else best(value, keep)
        begin, length = begin[kept], length[kept]
        longest /= 2
    return begin.sort().values


def v12(query, key, *, stages, second_stage_k, sw, sink):
    """The keys that attention reads: bool [H, Tq, Tk]; query [H, Tq, D], key [Hkv, Tk, D].

    Heads share one choice, queries are averaged over a stride, halves are compared by their
    centres, ties go right, the best score of all levels counts, one level more than needed.
    """
    heads, n_queries, _ = query.shape
    n_keys, first_size, size = key.shape[1], stages[0][2], stages[-1][2]
    keys = key.repeat_interleave(heads // key.shape[0], 0)
    into = max(0, sw - first_size)  # the search reaches first_size keys into the window
    position = n_keys - n_queries + torch.arange(n_queries)
    token = torch.arange(n_keys)
    window = (token > position[:, None] - sw) & (token <= position[:, None])
    before = token <= position[:, None] - sw
    seen = (window | (before & (token < sink))).expand(heads, -1, -1).clone()
    q_block = stages[0][0]
    for m in range(-(-n_queries // q_block)):
        rows = slice(m * q_block, min((m + 1) * q_block, n_queries))
        count = -(-max(0, n_keys - sink - sw) // first_size)
        left, merged = sink + torch.arange(count) * first_size, torch.empty(0)
        for i, (_, stride, chunk, keep) in enumerate(stages):
            if i:
                parent = stages[i - 1][2]
                left = left[top(merged, keep // parent)]
                left = left.sort().values
                left = (left[:, None] + torch.arange(0, parent, chunk)).flatten()
            right = (left + chunk).clamp(max=n_keys - into) if i == 0 else left + chunk
            scores = v12_scores(
                query[:, rows], keys, position[rows], left, right, stride, chunk, into, q_block
            )
            merged = scores.amax(0)
        left = left[top(merged, second_stage_k // size)]
        blocks = torch.unique(left // size * size)
        blocks = blocks[blocks < int(position[rows.start]) + q_block]
        listed = torch.zeros(n_keys + size, dtype=torch.bool)
        listed[(blocks[:, None] + torch.arange(size)).flatten()] = True
        seen[:, rows] |= listed[:n_keys] & before[rows] & (token >= sink)
    return seen


def top(values, count):
    return values.topk(min(count, len(values))).indices


def v12_scores(query, keys, position, left, right, stride, chunk, into, q_block):
    """[H, N] scores of the chunks [left, right) for the rows [H, R, D] of one query block."""
    groups = torch.arange(query.shape[1]) // stride
    lead = position[::stride]
    pooled = torch.stack([query[:, groups == g].mean(1) for g in range(int(groups[-1]) + 1)], 1)
    limit = max(int(lead.min()) - into, 0)
    heads, n = query.shape[0], len(left)
    shape = (heads, n)
    score = torch.full(shape, MASKED)
    for tile in range(0, n, 64):
        part = slice(tile, min(tile + 64, n))
        if int(lead.min()) + q_block < int(left[part].min()):
            continue
        lo, hi = (x[part].expand(heads, -1).clone() for x in (left, right))
        best_seen = score[:, part].clone()
        longest = float((hi - lo).max())
        while longest >= 1:
            longest /= 2
            active = (lo < hi) & (lo <= limit)
            middle = (lo + hi) // 2
            a, z = (lo + middle) // 2, (middle + hi) // 2
            sa, sz = (
                torch.einsum(
                    "hrd,hnd->hrn",
                    pooled,
                    keys[torch.arange(heads)[:, None], x.clamp(0, keys.shape[1] - 1)],
                ).amax(1)
                for x in (a, z)
            )
            go_left = sa > sz
            better = torch.maximum(best_seen, torch.maximum(sa, sz))
            best_seen = torch.where(active, better, best_seen)
            hi = torch.where(active & go_left, middle, hi)
            lo = torch.where(active & ~go_left, middle, lo)
        score[:, part] = best_seen
    return score

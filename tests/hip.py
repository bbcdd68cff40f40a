"""What the tests of HiP share: legality of an index, inputs with exact scores, near ties, pages."""

from __future__ import annotations

import torch

from sparse_attn.reference import hip_select
from tests.cases import CUDA, RUNS, Shape, inputs

GARBAGE = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)  # no pages, no lengths


def runs_of(op):
    """Every way to run an operator here; the backends are those that it declares."""
    declared = {row.backend for row in op.impls}
    return [run for run in (*RUNS, CUDA[-1]) if run[0] in declared]


def brief(run, length, short):
    """A length, or a shorter one for the interpreter and the executor, which are slow."""
    return short if run[0] in ("triton", "cuda") else length


def dtype_for(run):
    return torch.bfloat16 if run[0] == "cuda" else torch.float32


def whole_numbers(shape: Shape, dtype=torch.float32, most=2):
    """query and key whose products are exact in any order of summation, so that many tie."""
    query, key, _ = inputs(shape)
    return tuple((x * most / 2).round().clamp(-most, most).to(dtype) for x in (query, key))


def smooth_keys(shape: Shape, length=16, dtype=torch.float32):
    """query and key [B, H, T, D] where neighbouring keys are alike: a search can succeed."""
    query, key, _ = inputs(shape)
    window = torch.ones(length, dtype=key.dtype) / length**0.5
    padded = torch.nn.functional.pad(key.transpose(2, 3).flatten(0, 2)[:, None], (0, length - 1))
    key = torch.nn.functional.conv1d(padded, window[None, None])[:, 0]
    key = key.unflatten(0, (shape.B, shape.Hkv, shape.D)).transpose(2, 3)
    return query.to(dtype), key.to(dtype)


def check_index(indices, counts, n_blocks):
    """The listed places as bool, after checking that the lists are legal."""
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    assert indices.dtype == counts.dtype == torch.int32
    assert (counts >= 0).all() and (counts <= indices.shape[-1]).all()
    assert ((indices >= 0) & (indices < n_blocks) | ~listed).all(), "blocks exist"
    ascending = (indices[..., 1:] > indices[..., :-1]) | ~listed[..., 1:]
    assert ascending.all(), "indices ascend and are unique"
    assert (indices[~listed] == 0).all(), "the rest is 0"
    return listed


def mask_of(indices, counts, n_blocks):
    """bool [B, H', Mq, n_blocks] of a legal index."""
    listed = check_index(indices, counts, n_blocks)
    mask = torch.zeros((*counts.shape, n_blocks + 1), dtype=torch.bool)
    return mask.scatter_(-1, torch.where(listed, indices, n_blocks).long(), True)[..., :-1]


def nearest_ties(reference, call):
    """Of each query block, in the order of the reference's loops, the smallest gap of a choice.

    The gap lies between the worst score kept and the best one dropped, over all rounds.
    `reference` is the module; `call` runs it.
    """
    gaps, chosen = [], []
    search = "search" if reference is hip_select else "prune"
    kept = {"best": reference.best, search: getattr(reference, search)}

    def best(values, keep):
        order = values.sort(descending=True).values
        if keep < len(order):
            chosen.append((order[keep - 1] - order[keep]).item())
        return kept["best"](values, keep)

    def of_one(*args):
        chosen.clear()
        result = kept[search](*args)
        gaps.append(min(chosen, default=float("inf")))
        return result

    reference.best = best
    setattr(reference, search, of_one)
    try:
        call()
    finally:
        for name, fn in kept.items():
            setattr(reference, name, fn)
    return torch.tensor(gaps)


def paged(key, page_size, lengths, seed=0):
    """key [B, Hkv, Tk, D] scattered over pages in any order: (pages, block_table, kv_lengths).

    Sequence b holds its first lengths[b] tokens; what belongs to nobody is NaN, and places of the
    table beyond a length hold no page. Without a page size there is one piece per sequence and no
    table.
    """
    batch, heads, n_keys, dim = key.shape
    lengths = torch.tensor(lengths, dtype=torch.int32)
    if page_size is None:
        beyond = torch.arange(n_keys)[:, None] >= lengths[:, None, None, None]
        return key.masked_fill(beyond, torch.nan), None, lengths
    most = -(-n_keys // page_size)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(batch * most + 3, generator=generator)[: batch * most]
    table = table.view(batch, most).int()
    pages = key.new_full((batch * most + 3, page_size, heads, dim), torch.nan).transpose(1, 2)
    for b in range(batch):
        for t in range(int(lengths[b])):
            pages[table[b, t // page_size], :, t % page_size] = key[b, :, t]
    unused = torch.arange(most) * page_size >= lengths[:, None]
    garbage = GARBAGE[torch.arange(batch * most) % 3].view(batch, most)
    table = torch.where(unused, garbage, table)
    return pages, table, lengths

"""What the tests of HiP share: legality of an index, inputs with exact scores, near ties, pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from sparse_attn.reference import hip_select
from tests.cases import CUDA, DTYPES, GARBAGE, RUNS, Shape, call, inputs

GUARDED = [
    Shape(Tq=70, Tk=300, D=64, Hq=4, Hkv=2),
    Shape(Tq=33, Tk=200, D=33, B=2),  # no pairs of dimensions
    Shape(Tq=20, Tk=131, D=40),
    Shape(Tq=1, Tk=400, D=128, Hq=4, Hkv=1),  # few voters
    Shape(Tq=3, Tk=150, D=2, Hq=3, Hkv=3),
]


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


def legal_mask(op, query, key, run, options, keep, heads, kv_block, exactly):
    """The choice as `mask_of`, after checking its shape and that it is what a search may find.

    `keep` blocks for each of `heads`, exactly, or at most, as many as sink and window leave.
    """
    indices, counts = call(op, run, query, key, **options)
    values = dict(zip(op._signature.parameters, op.bind(query, key, **options), strict=True))
    q_block, table, lengths = values["q_block"], values["block_table"], values["kv_lengths"]
    capacity = key.shape[2] if table is None else table.shape[1] * key.shape[2]
    rows, blocks = -(-query.shape[2] // q_block), -(-capacity // kv_block)
    assert indices.shape == (query.shape[0], heads, rows, min(keep, blocks))
    assert counts.shape == indices.shape[:3]
    mask = mask_of(indices, counts, blocks)
    for b in range(query.shape[0]):
        n_keys = capacity if lengths is None else int(lengths[b])
        for m in range(rows):
            last = n_keys - query.shape[2] + min((m + 1) * q_block, query.shape[2]) - 1
            end = max(0, last - values["window"] + 1) if values["causal"] else n_keys
            start, end = values["sink"] // kv_block, -(-end // kv_block)
            most = min(keep, max(0, end - start))
            assert (counts[b, :, m] == most if exactly else counts[b, :, m] <= most).all()
            assert not mask[b, :, m, :start].any() and not mask[b, :, m, end:].any()
    return mask


def nearest_ties(reference, run):
    """Of each query block, in the order of the reference's loops, the smallest gap of a choice.

    The gap lies between the worst score kept and the best one dropped, over all rounds.
    `reference` is the module; `run` calls it.
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
        run()
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


# ---- what both selections promise: `mask_of(query, key, run, **options)` is of one ----


def equals_the_reference_ties_included(mask_of, run, data, options, shortest):
    """Whole numbers: every sum is exact, and most scores tie. options(data, length) draws some."""
    length = data.draw(st.integers(3, brief(run, 400, shortest)))
    chunk = data.draw(st.integers(1, 12 if run[0] == "triton" else brief(run, 150, 70)))
    dims = data.draw(st.sampled_from((8, 32, 40, 64)))
    heads = data.draw(st.sampled_from(((1, 1), (4, 2), (3, 3))))
    shape = Shape(B=data.draw(st.integers(1, 2)), Hq=heads[0], Hkv=heads[1], Tq=chunk, Tk=length,
                  D=dims)  # fmt: skip
    dtype = torch.bfloat16 if run[0] == "cuda" else data.draw(st.sampled_from(DTYPES))
    query, key = whole_numbers(shape, dtype)
    chosen = options(data, length)
    assert torch.equal(*(mask_of(query, key, r, **chosen) for r in (run, ("reference", None))))


def equals_the_reference_but_near_ties(mask_of, reference, run, dtype, options, gap, length):
    """`gap` between scores is enough; keys are alike over `length`."""
    if run[0] == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is served by others")
    shape = Shape(Hq=4, Hkv=2, Tq=brief(run, 150, 40), Tk=brief(run, 900, 300))
    query, key = smooth_keys(shape, length, dtype)
    exact = {}
    gaps = nearest_ties(
        reference, lambda: exact.update(mask=mask_of(query.double(), key.double(), **options))
    )
    clear = (gaps > gap).view(-1, exact["mask"].shape[1]).T
    got = mask_of(query, key, run, **options)[0]
    assert clear.float().mean() > 0.5
    assert torch.equal(got[clear], exact["mask"][0][clear])


def ignores_keys_of_the_window_and_later(mask_of, run, options):
    """For options with q_block 32 and a window of 40."""
    query, key = smooth_keys(Shape(Tq=64, Tk=400), dtype=dtype_for(run))
    before = mask_of(query, key, run, **options)
    key[:, :, 368 - 40 :] *= 50  # first block: positions 336 to 367
    after = mask_of(query, key, run, **options)
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    assert not torch.equal(before[:, :, 1], after[:, :, 1])


def sees_each_key_up_to_itself(mask_of, run, shape, kv_block, options):
    """Each query, for options with room for all: in a block, the sink or the window."""
    n_queries, n_keys = shape
    shape = Shape(Tq=n_queries, Tk=n_keys, Hq=2, Hkv=1, D=16)
    query, key, _ = inputs(shape, dtype_for(run))
    mask = mask_of(query, key, run, **options)[0, 0]
    q_block, sink, window = (options[x] for x in ("q_block", "sink", "window"))
    token = torch.arange(n_keys)
    for i in range(n_queries):
        p = n_keys - n_queries + i
        seen = mask[i // q_block][token // kv_block] | (token < sink) | (token > p - window)
        assert seen[: max(p + 1, 0)].all()


def knows_batches_strides_and_chunks(mask_of, run, options):
    """For options with q_block 32; returns (query, key, mask)."""
    query, key = smooth_keys(Shape(B=2, Hq=4, Hkv=2, Tq=65, Tk=300), dtype=dtype_for(run))
    both = mask_of(query, key, run, **options)
    for b in range(2):
        alone = mask_of(query[b : b + 1], key[b : b + 1], run, **options)
        assert torch.equal(both[b : b + 1], alone)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    assert torch.equal(both, mask_of(*strided, run, **options))
    chunk = mask_of(query[:, :, 32:], key, run, **options)
    assert torch.equal(both[:, :, 1:], chunk)
    return query, key, both


def passes_strange_numbers_over(mask_of, run, value, options):
    """A NaN does not count: the choice is as if the pair were masked. Lists stay legal."""
    query, key = whole_numbers(Shape(Tq=33, Tk=300, Hq=2, Hkv=1), dtype_for(run))
    key[:, :, 100:140, 3] = value
    query[:, 1, 5] = value
    got = mask_of(query, key, run, **options)
    assert torch.equal(got, mask_of(query, key, **options))
    query[:] = float("nan")
    assert torch.equal(mask_of(query, key, run, **options), mask_of(query, key, **options))


def reads_any_pages(mask_of, run, page_size, options):
    """Any order of pages, or none, lengths of their own: as each sequence alone."""
    shape = Shape(B=3, Hq=4, Hkv=2, Tq=brief(run, 40, 17), Tk=270)
    query, key = smooth_keys(shape, dtype=dtype_for(run))
    lengths = [270, 131, 0]
    pages, table, n = paged(key, page_size, lengths)
    got = mask_of(query, pages, run, **options, block_table=table, kv_lengths=n)
    for b, length in enumerate(lengths):
        if length == 0:
            assert not got[b].any()
            continue
        alone = mask_of(query[b : b + 1], key[b : b + 1, :, :length], run, **options)
        assert torch.equal(got[b : b + 1, ..., : alone.shape[-1]], alone)
        assert not got[b, ..., alone.shape[-1] :].any()


def stays_in_a_wrong_cache(op, run, page_size, options, n_blocks):
    """An undefined choice, but a legal one and no read outside: interpreter and executor tell."""
    query, key = smooth_keys(Shape(B=3, Tq=5, Tk=96), dtype=dtype_for(run))
    pages, table, full = paged(key, page_size, [96] * 3)
    pages, wrong = torch.nan_to_num(pages), GARBAGE
    if table is not None:
        table = wrong[torch.arange(table.numel()) % 3].view(table.shape)
    for lengths in (wrong,) if table is None else (full, wrong):
        for change in ({}, {"causal": False}):
            cache = {"block_table": table, "kv_lengths": lengths}
            check_index(*call(op, run, query, pages, **options, **change, **cache), n_blocks)


def every_argument_reaches(mask_of, run, base, changes):
    """Each of the changes is obeyed, and shows."""
    shape = Shape(Hq=4, Hkv=2, Tq=64, Tk=brief(run, 900, 400))
    query, key = whole_numbers(shape, dtype_for(run))
    seen = []
    for change in ({}, *changes):
        got, want = (mask_of(query, key, r, **(base | change)) for r in (run, RUNS[0]))
        assert torch.equal(got, want)
        seen.append(tuple(got.float().mean((0, 2)).flatten().tolist()))
    assert len(set(seen)) == len(seen)


def ignores_the_order_of_threads(op, options):
    query, key = smooth_keys(Shape(Hq=2, Hkv=1, Tq=40, Tk=250), dtype=torch.bfloat16)
    one, *others = (call(op, run, query, key, **options) for run in CUDA)
    assert all(torch.equal(x, y) for other in others for x, y in zip(one, other, strict=True))


def ignores_the_number_of_threads(op, threads, options):
    query, key = smooth_keys(Shape(Hq=3, Hkv=1, Tq=200, Tk=900))
    before = torch.get_num_threads()
    one = op(query, key, **options)
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(one, op(query, key, **options), strict=True))
    finally:
        torch.set_num_threads(before)


NO_PAGES = [  # page, length, message
    (-1, 30, "block_table: .* in use"),
    (3, 30, "block_table: .* in use"),
    (2, -1, "kv_lengths: .*(-1|a value is not in)"),
    (2, 49, "kv_lengths: .*(49|a value is not in)"),
]


def refuses_a_page_that_is_not_there(op, backend, page, length, message, **options):
    query, key = torch.randn(1, 2, 4, 32), torch.randn(3, 1, 16, 32)
    table = torch.tensor([[0, page, 7]], dtype=torch.int32)  # the last is not in use
    lengths = torch.tensor([length], dtype=torch.int32)
    options |= {"block_table": table, "kv_lengths": lengths, "backend": backend}
    with pytest.raises(RuntimeError, match=message):
        op(query, key, **options)
    table[0, 1], lengths[0] = 2, 32
    op(query, key, **options)

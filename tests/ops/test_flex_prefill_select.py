"""The selection against the recorded choices of the published code, and what `exact` promises."""

import json
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.inputs import gen
from sparse_attn.ops.flex_prefill_select import op
from sparse_attn.reference import flex_prefill_select as reference
from tests import simt
from tests.cases import CUDA, DTYPES, TRITON, Shape, call, opcheck
from tests.cases import RUNS as OTHER_RUNS
from tests.cases import inputs as random_inputs
from tests.simt.operators import arguments as simt_arguments

ORACLES = Path(__file__).parents[1] / "oracles" / "flexprefill"
FILES = json.loads((ORACLES / "flex_index.json").read_text())["inputs"]
NO_BOUND = 2**31 - 1
# each kernel runs in all orders of the threads in test_kernel_equals_reference
RUNS = [*OTHER_RUNS, CUDA[-1]]


def brief(run, length, short):
    """A length, or a shorter one for the interpreter and the executor, which are slow."""
    return short if run[0] in ("triton", "cuda") else length


def dtype_for(run):
    return torch.bfloat16 if run[0] == "cuda" else torch.float32


@cache
def structured(kind, length, dtype=torch.float32, seed=7):
    """query, key, value of bench/inputs.py as [1, H, T, D]."""
    return tuple(torch.from_numpy(x).transpose(1, 2).to(dtype) for x in gen(seed, length, kind))


def in_bf16(kind, length):
    return structured(kind, length, torch.bfloat16)


def mask_of(query, key, run=("reference", None), **options):
    """[B, Hq, Mq, Nk] bool and the pattern, after checking that the index is legal."""
    indices, counts, pattern = call(op, run, query, key, **options)
    block = options.get("block_size", 128)
    batch, heads, length, n_keys = *query.shape[:3], key.shape[2]
    rows, blocks = -(-length // block), -(-n_keys // block)
    assert indices.shape == (batch, heads, rows, blocks) and indices.dtype == torch.int32
    assert counts.shape == (batch, heads, rows) and counts.dtype == torch.int32
    assert pattern.shape == (batch, heads) and pattern.dtype == torch.int32
    listed = torch.arange(blocks) < counts[..., None]
    ascending = (indices[..., 1:] > indices[..., :-1]) | ~listed[..., 1:]
    assert ascending.all(), "indices ascend and are unique"
    last = n_keys - length + (torch.arange(rows) + 1) * block - 1
    seen = torch.arange(blocks) * block <= last.clamp(max=n_keys - 1)[:, None]
    assert ((indices >= 0) & (indices < blocks) | ~listed).all()
    mask = torch.zeros(indices.shape, dtype=torch.bool)
    mask.scatter_(-1, indices.long() * listed, listed)
    mask[..., 0] = (indices[..., 0] == 0) & (counts > 0) if blocks else False
    assert not (mask & ~seen).any(), "no block above the diagonal"
    return mask, pattern


def visible(length, n_keys, block):
    """[Mq, Nk]: every block with a key that some query of the row may see."""
    positions = n_keys - length + torch.arange(length)
    mask = torch.zeros(-(-length // block), -(-n_keys // block), dtype=torch.bool)
    for i, p in enumerate(positions.tolist()):
        mask[i // block, : p // block + 1 if p >= 0 else 0] = True
    return mask


# ---- the published code ------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f['kind']}-{f['N']}")
def test_official_equals_the_recorded_sets(file):
    query, key, _ = in_bf16(file["kind"], file["N"])
    recorded = np.load(ORACLES / f"flex_{file['kind']}_{file['N']}.npz")
    exact = other = 0
    for case in file["cases"]:
        if case["gamma"] >= 1:  # the published code crashes or keeps blocks above the diagonal
            continue
        block, n = case["block_size"], case["num_blocks"]
        order = [0, 2, 1, 3] if case["gqa_interleave"] else [0, 1, 2, 3]
        most = None if case["max_blocks"] == NO_BOUND else case["max_blocks"] * block
        mask, pattern = mask_of(
            query[:, order], key, gamma=case["gamma"], tau=case["tau"], block_size=block,
            min_budget=case["min_blocks"] * block, max_budget=most, variant="official",
        )  # fmt: skip
        mask, pattern = mask[:, np.argsort(order)], pattern[:, np.argsort(order)]
        flat = recorded[f"c{case['id']}_flat"]
        bounds = recorded[f"c{case['id']}_ptr"]
        for h in range(4):
            want = torch.zeros(n * n, dtype=torch.bool)
            want[torch.from_numpy(flat[bounds[h] : bounds[h + 1]].astype(np.int64))] = True
            wrong = int((mask[0, h].flatten() != want).sum())
            robust = case["robust"][h]
            assert wrong == 0 if robust else wrong <= 2, f"case {case['id']} head {h}: {wrong}"
            if robust:
                assert bool(pattern[0, h]) == case["query_aware"][h]
            exact, other = exact + robust, other + (not robust)
    assert exact > 100


def test_the_copied_inputs_are_the_recorded_ones():
    for file in FILES:
        for name, x in zip("qkv", in_bf16(file["kind"], file["N"]), strict=True):
            bits = x.transpose(1, 2).contiguous().view(torch.int16).numpy()
            assert sha256(bits.tobytes()).hexdigest() == file["sha256"][name]


def test_official_ignores_the_scale_and_exact_uses_it():
    query, key, _ = in_bf16("mixed", 1024)
    one, two = (
        [mask_of(query, key, variant=v, scale=s, min_budget=128, tau=0.0)[0] for s in (None, 0.5)]
        for v in ("official", "exact")
    )
    assert torch.equal(*one) and not torch.equal(*two)


# ---- ours --------------------------------------------------------------------------------------


def probe_mass(query, key, block, scale=None):
    """Share of the probe rows' attention per (head, query block, key block), in float64."""
    batch, heads, length, d = query.shape
    n_keys, rows = key.shape[2], min(block, length, key.shape[2])
    k = key.double().repeat_interleave(heads // key.shape[1], 1)
    scores = query[:, :, -rows:].double() @ k.mT * (d**-0.5 if scale is None else scale)
    later = torch.ones(rows, n_keys).triu(n_keys - rows + 1).bool()
    p = scores.masked_fill(later, -torch.inf).softmax(-1) / rows
    p = torch.nn.functional.pad(p, (0, -n_keys % block)).unflatten(-1, (-1, block)).sum(-1)
    mass = p.new_zeros(batch, heads, -(-length // block), p.shape[-1])
    return mass.index_add_(2, (length - rows + torch.arange(rows)) // block, p)


@pytest.mark.parametrize("run", RUNS, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_gamma_of_the_probe_is_covered(run, data):
    """The promise of `exact`: any kind of input, length, block size, threshold and pattern."""
    pick = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    length = data.draw(st.integers(brief(run, 600, 60), brief(run, 1500, 180)))
    block = max(data.draw(st.integers(1, 128)), 8)
    query, key, _ = in_bf16(pick("mixed", "sharp", "flat", "peaky"), 1500)
    chunk, gamma = data.draw(st.integers(1, length)), pick(0.3, 0.8, 0.95, 0.99)
    query, key = query[:, :, length - chunk : length], key[:, :, :length]
    options = {"gamma": gamma, "block_size": block, "tau": pick(0.0, 0.1, 10.0)}
    mask, _ = mask_of(query, key, run, **options, min_budget=pick(0, 128), variant="exact")
    covered = (probe_mass(query, key, block) * mask).sum((-1, -2))
    assert (covered >= gamma - 1e-5).all(), covered


@pytest.mark.parametrize(
    "run, variant", [*((run, "exact") for run in RUNS), (RUNS[0], "official")], ids=str
)
def test_gamma_one_is_every_visible_block(run, variant):
    for length, block in ((1000, 128), (321, 64), (1, 16)):
        query, key, _ = in_bf16("mixed", 1024)
        query, key = query[:, :, :length], key[:, :, :length]
        for gamma in (1.0, 1.5):
            mask, _ = mask_of(query, key, run, gamma=gamma, block_size=block, variant=variant)
            assert torch.equal(mask[0, 0], visible(length, length, block))


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_the_needle_is_kept(run, gamma):
    """The published code drops it: the sink takes the one place in the budget."""
    query, key, _ = in_bf16("peaky", 1024)
    mass = probe_mass(query, key, 128)[0, :, -1]
    needle = mass.argmax(-1)
    mask, _ = mask_of(query, key, run, gamma=gamma, tau=0.0, min_budget=1)
    assert (needle > 0).all() and mask[0, range(4), -1, needle].all()
    official, _ = mask_of(query, key, gamma=gamma, tau=0.0, min_budget=1, variant="official")
    assert not official[0, range(4), -1, needle].any()


@pytest.mark.parametrize(
    "run, dtype, kind",
    [
        (run, dtype, kind)
        for run in [*OTHER_RUNS[1:], *CUDA]
        for dtype in DTYPES
        for kind in ("mixed", "sharp", "flat", "peaky")
        if brief(run, True, False) or dtype == torch.bfloat16 or kind == "mixed"
        if run not in CUDA[:-1] or (dtype, kind) == (torch.bfloat16, "mixed")
        if run[0] != "cuda" or dtype != torch.float32
    ],
    ids=str,
)
def test_kernel_equals_reference(run, dtype, kind):
    """Sets may differ only where scores nearly tie: at most 1 % of the blocks."""
    for length, chunk, block, tau in (
        (brief(run, 1500, 400), brief(run, 1500, 400), 128, 0.1),
        (brief(run, 1500, 250), brief(run, 1500, 250), 37, 0.0),
        (brief(run, 1333, 333), brief(run, 500, 130), 64, 10.0),
        (brief(run, 2048, 500), 1, 128, 0.1),
    ):
        query, key, _ = in_bf16(kind, 2048)
        query, key = query[:, :, length - chunk : length].to(dtype), key[:, :, :length].to(dtype)
        options = {"block_size": block, "tau": tau, "min_budget": 128, "gamma": 0.9}
        got, pattern = mask_of(query, key, run, **options)
        want, expected = mask_of(query, key, **options)
        same = pattern[0] == expected[0]
        assert same.sum() >= 3, "a divergence may lie on the threshold, once"
        differ = (got != want)[0, same].float().mean()
        assert differ <= 0.01, f"{differ:.4f} of {want.sum()} blocks"


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_budgets(run):
    query, key, _ = (x[:, :, : brief(run, 1500, 700)] for x in in_bf16("mixed", 1500))
    rows = -(-query.shape[2] // 128)
    least, most = (
        mask_of(query, key, run, tau=0.0, **b)[0].sum((-1, -2))[0]
        for b in ({"gamma": 1e-6, "min_budget": 512}, {"gamma": 0.999, "max_budget": 1})
    )
    none = mask_of(query, key, run, tau=0.0, gamma=1e-6, min_budget=0)[0].sum((-1, -2))[0]
    full = mask_of(query, key, run, tau=0.0, gamma=0.999, min_budget=0)[0].sum((-1, -2))[0]
    assert (least > none).all() and (most < full).all()
    assert (none == 2 * rows - 1).all(), "the diagonal and the sink are free"
    # sink, own block, one column and one bucket, which touches two diagonals
    assert mask_of(query, key, run, gamma=0.99, tau=0.0, max_budget=128)[0].sum(-1).max() <= 5


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_batches_heads_strides_and_repeats(run):
    a, b = in_bf16("mixed", 1024), in_bf16("sharp", 1024)
    a, b = ([x[:, :, : brief(run, 1024, 200)] for x in y] for y in (a, b))
    query, key = (torch.cat([x, y]) for x, y in zip(a[:2], b[:2], strict=True))
    both, pattern = mask_of(query, key, run)
    for i, one in enumerate((a, b)):
        alone, own = mask_of(*one[:2], run)
        assert torch.equal(both[i], alone[0]) and torch.equal(pattern[i], own[0])
    again, _ = mask_of(query.contiguous(), key.contiguous(), run)
    assert torch.equal(both, again)
    expanded, _ = mask_of(query, key.repeat_interleave(2, 1), run)
    assert torch.equal(both, expanded)


@pytest.mark.parametrize(
    "run, variant", [*((run, "exact") for run in RUNS), (RUNS[0], "official")], ids=str
)
@pytest.mark.parametrize("block", [64, 128])
def test_a_chunk_is_the_suffix_of_the_whole_prompt(run, variant, block):
    """The probe is the same last rows, so an aligned chunk chooses what the whole prompt does."""
    query, key, _ = (x[:, :, : brief(run, 1500, 700)] for x in in_bf16("mixed", 1500))
    options = {"tau": 0.0, "min_budget": 256, "block_size": block, "variant": variant}
    whole, _ = mask_of(query, key, run, **options)
    part, _ = mask_of(query[:, :, 4 * block :], key, run, **options)
    assert torch.equal(part, whole[:, :, 4:])


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 0.0])
def test_strange_numbers(run, value):
    """Nothing crashes; a probe that is not finite keeps every block, as dense attention would."""
    query, key = random_inputs(Shape(Tq=300, Tk=300, Hq=2, Hkv=1), dtype_for(run))[:2]
    query[:, :, -1, 0] = value
    mask, _ = mask_of(query, key, run, block_size=32, gamma=0.5, min_budget=32)
    if value != value or value == float("inf"):
        assert torch.equal(mask[0, 0], visible(300, 300, 32))


@pytest.mark.parametrize("tau", [0.0, 10.0])
@pytest.mark.parametrize("chunk", [1, 77, 500, 1100])
def test_official_takes_chunks(chunk, tau):
    """Off the block grid too: the sink and every own block are there, for all dtypes alike."""
    query, key, _ = in_bf16("mixed", 1024)
    options = {"variant": "official", "min_budget": 1, "gamma": 0.5, "tau": tau}
    query = torch.cat([query[:, :, :76], query], 2)[:, :, -chunk:]
    mask, _ = mask_of(query, key, **options)
    for position in range(max(1024 - chunk, 0), 1024):
        row = mask[0, :, (position - 1024 + chunk) // 128]
        assert row[:, 0].all() and row[:, position // 128].all()
    same, _ = mask_of(query.float(), key.float(), **options)
    assert torch.equal(mask, same)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (130, 700), (700, 130), (127, 129)], ids=str)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_lengths(run, shape):
    shaped = Shape(Tq=shape[0], Tk=shape[1], Hq=4, Hkv=2, D=40)
    query, key = random_inputs(shaped, dtype_for(run))[:2]
    for block in (1, 13, 128) if max(shape) < brief(run, 500, 9) else (13, 128):
        mask, _ = mask_of(query, key, run, block_size=block, min_budget=block)
        empty = ~visible(*shape, block).any(-1)
        assert torch.equal(mask[0, 0].any(-1), ~empty)


@pytest.mark.parametrize("run", [CUDA[-1]], ids=str)
@pytest.mark.parametrize("D", [8, 96, 256])
def test_head_dims(run, D):
    shape = Shape(B=2, Tq=150, Tk=330, Hq=3, Hkv=1, D=D)
    query, key = random_inputs(shape, torch.bfloat16, spread=5.0)[:2]
    for tau in (0.0, 10.0):
        options = {"block_size": 16, "gamma": 0.5, "min_budget": 0, "tau": tau}
        got, want = (mask_of(query, key, r, **options)[0] for r in (run, RUNS[0]))
        assert (got != want).float().mean() <= 0.01
        assert want.sum() < 0.9 * 6 * visible(150, 330, 16).sum(), "something is left out"


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_ties_go_to_the_lower_index(run):
    """All mass at one key: the budgets are filled with blocks and distances of no mass."""
    key = -torch.ones(1, 1, 400, 32, dtype=torch.bfloat16)
    key[:, :, 211] = 1
    query = torch.full((1, 2, 400, 32), 200.0, dtype=torch.bfloat16)
    options = {"block_size": 25, "tau": 0.0, "min_budget": 75, "gamma": 0.5}
    mask, _ = mask_of(query, key, run, **options)
    # columns 0, 1 and that of the key; buckets 0, 1 and one of the key's seven or eight
    want, _ = mask_of(query, key, **options)
    assert torch.equal(mask, want) and mask[0, 0, -1].sum() < 9


@pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))
@pytest.mark.parametrize(
    "chunk, length, block, D",
    [(300, 300, 128, 64), (200, 520, 37, 40), (600, 600, 100, 136), (3, 290, 64, 8)],
    ids=str,
)
def test_profiles_of_the_cuda_kernels(chunk, length, block, D):
    """What they choose from, in the executor: the sums of the reference."""
    shape = Shape(Tq=chunk, Tk=length, Hq=2, Hkv=1, D=D)
    query, key = random_inputs(shape, torch.bfloat16, spread=2.0)[:2]
    blocks, rows = -(-length // block), min(block, chunk)
    inputs, outputs, numbers = simt_arguments(op, query, key, 0.9, 0.1, 0, None, block)
    sums = {name: torch.empty(2, n, blocks) for name, n in (("mass", 1), ("ranked", 2))}
    simt.run(op.name, inputs, outputs | sums, numbers, seed=chunk)
    later = torch.ones(rows, length).triu(length - rows + 1).bool()
    first = length - chunk + torch.arange(-(-chunk // block)) * block
    for h in range(2):
        scores = query[0, h, -rows:].double() @ key[0, 0].double().T / D**0.5
        p = scores.masked_fill(later, -torch.inf).softmax(-1).float()
        columns, buckets, _ = reference.attribute(p, first, chunk, block)
        mass = reference.pad_sum(p.mean(0), block)
        for got, want in ((sums["mass"][h, 0], mass), (sums["ranked"][h, 0], columns),
                          (sums["ranked"][h, 1], buckets)):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU decides the order of its threads")
def test_the_order_of_threads_does_not_show():
    """Not even in what follows the listed blocks."""
    query, key, _ = (x[:, :, :500] for x in in_bf16("mixed", 2048))
    options = {"block_size": 64, "gamma": 0.9, "min_budget": 64, "tau": 0.15}
    one, *others = (call(op, run, query[:, :, 170:], key, **options) for run in CUDA)
    assert 0 < one[2].sum() < 4, "both patterns"
    assert all(torch.equal(x, y) for other in others for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_choice(threads):
    query, key, _ = in_bf16("mixed", 2048)
    before = torch.get_num_threads()
    one = op(query, key)
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(one, op(query, key), strict=True))
    finally:
        torch.set_num_threads(before)


# ---- the operator ------------------------------------------------------------------------------

BAD = [
    ({"gamma": 0.0}, "gamma: got 0.0"),
    ({"gamma": float("nan")}, "gamma: got nan"),
    ({"tau": -0.1}, "tau: got"),
    ({"tau": float("nan")}, "tau: got"),
    ({"min_budget": -1}, "min_budget: got -1"),
    ({"max_budget": 0}, "max_budget: got 0"),
    ({"block_size": 0}, "block_size: got 0"),
    ({"block_size": 129}, "block_size: got 129"),
    ({"block_size": 96, "variant": "official"}, "block_size: got 96"),
    ({"variant": "paper"}, "variant: got 'paper'"),
    ({"causal": False}, "defined for causal prefill"),
    ({"scale": float("inf")}, "scale: got inf"),
    ({"scale": 1e300}, "scale: got 1e\\+300"),
    ({"key": torch.randn(1, 2, 100, 32)}, "key: head_dim"),
    ({"key": torch.randn(1, 3, 100, 64)}, "query: 4 heads"),
    ({"key": torch.randn(1, 2, 0, 64)}, "key: dimension Tk is empty"),
    ({"key": torch.zeros(1, 2, 1, 64).expand(1, 2, 2**31, 64)}, "key: 100 queries and 2147483648"),
    ({"query": torch.randn(4, 100, 64)}, "query: expected 4 dimensions"),
    ({"query": torch.ones(1, 4, 100, 64, dtype=torch.int32)}, "query: expected dtype"),
]


@pytest.mark.parametrize("backend", ["cpp", "reference", "triton", "cuda"])
@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input(backend, change, message):
    query, key = random_inputs(Shape(Tq=100, Tk=100, Hq=4, Hkv=2))[:2]
    arguments = {"query": query, "key": key} | change
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op(**arguments, backend=backend)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op.default(**arguments)


@pytest.mark.parametrize("overload", ["default", "cpp", "reference", "triton", "cuda"])
def test_opcheck(overload):
    query, key = random_inputs(Shape(Tq=50, Tk=70, Hq=4, Hkv=2), torch.bfloat16)[:2]
    args = (query, key, 0.9, 0.2, 16, 32, 16, "exact", True, 0.2)
    opcheck(getattr(torch.ops.sparse_attn.flex_prefill_select, overload), args)


@pytest.mark.parametrize("run", [("cpp", None), TRITON, CUDA[-1]], ids=str)
def test_every_argument_reaches_the_kernel(run):
    query, key, _ = in_bf16("mixed", brief(run, 1500, 800))
    base = {"gamma": 0.7, "tau": 0.0, "min_budget": 0, "block_size": 64}
    changes = [{}, {"gamma": 0.97}, {"tau": 10.0}, {"min_budget": 640}, {"max_budget": 64},
               {"block_size": 32}, {"scale": 0.4}]  # fmt: skip
    totals = []
    for change in changes:
        options = base | change
        got, want = (mask_of(query, key, r, **options)[0] for r in (run, RUNS[0]))
        assert (got != want).float().mean() < 0.01
        totals.append(got.sum().item())
    assert len(set(totals)) == len(totals), totals


def test_no_silent_loss_of_gradient():
    query, key = random_inputs(Shape(Tq=50, Tk=50))[:2]
    assert not any(x.requires_grad for x in op(query.requires_grad_(), key))

import pytest
import torch

import sparse_attn
from bench.inputs import gen, locality
from sparse_attn import HiP, InfiniteHiP
from sparse_attn.crossover import dense_is_faster
from sparse_attn.methods.hip import HiPState
from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.reference.block_sparse_attention import block_mask, token_mask
from tests import hip
from tests.cases import Shape

BACKENDS = ["cpp", "reference"]


def tensors(**sizes):
    query, key = hip.smooth_keys(Shape(**sizes))
    return query, key, torch.randn_like(key)


def run(query, key, value, method, **options):
    return sparse_attn.attention(query, key, value, method, fallback=False, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "n_queries, n_keys", [(300, 300), (1, 200), (77, 411), (1, 1), (5, 3), (130, 129)], ids=str
)
@pytest.mark.parametrize("causal", [True, False])
def test_a_budget_for_all_is_dense_attention(backend, n_queries, n_keys, causal):
    """Also where everything lies in the sink and the window, or nothing is there."""
    query, key, value = tensors(B=2, Hq=4, Hkv=2, Tq=n_queries, Tk=n_keys)
    for config in (HiP(budget=n_keys), HiP(n_keys + 7, window=0, sink=0), HiP(n_keys, kv_block=3)):
        got = run(query, key, value, config, backend=backend, causal=causal)
        want = run(query, key, value, "dense", backend=backend, causal=causal)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_shorter_than_sink_and_window_is_dense(backend):
    query, key, value = tensors(Tq=260, Tk=260)
    got = run(query, key, value, HiP(budget=2), backend=backend)
    want = run(query, key, value, "dense", backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_odd_budgets_keep_what_they_say():
    query, key, _ = tensors(Tq=64, Tk=900)
    for budget, blocks in ((1, 1), (2, 1), (37, 19), (100, 50), (333, 167)):
        index = HiP(budget=budget).select(query, key)
        index.validate(64, 900)
        assert (index.counts == blocks).all() and (index.sink, index.window) == (16, 256)


# ---- recall ------------------------------------------------------------------------------------


def mass_per_key(query, key, sink=64, window=256):
    """Mean attention of the rows: of sink and window together [H], of every other key [H, Tk]."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    position = n_keys - n_queries + torch.arange(n_queries)[:, None]
    token = torch.arange(n_keys)
    scores = (query @ key.mT / query.shape[3] ** 0.5).masked_fill(token > position, -torch.inf)
    near = (token < sink) | ((token > position - window) & (token <= position))
    mass = scores.softmax(-1)[0]
    return (mass * near).sum(-1).mean(-1), (mass * ~near).mean(1)


def kept(near, far, index):
    """Share of the attention mass, mean over heads, that an index with sink and window keeps."""
    mask = block_mask(*index[:2], -(-far.shape[1] // index.kv_block))[0, :, 0].repeat_interleave(
        index.kv_block, -1
    )
    return (near + (far * mask[:, : far.shape[1]]).sum(-1)).mean().item()


def best(near, far, budget, block):
    """As `kept`, of the best choice of as many blocks."""
    blocks = far.unflatten(-1, (-1, block)).sum(-1).topk(budget // block).values
    return (near + blocks.sum(-1)).mean().item()


# what the method as published, ranked in float32, kept on inputs of this kind: methods' notes,
# 8192 keys, 4 heads, a sink of 64, a window of 256
PUBLISHED = {(1, 512): 0.25, (1, 1024): 0.50, (4, 512): 0.92, (4, 1024): 0.96, (16, 512): 0.98,
             (16, 1024): 0.99, (64, 512): 0.99, (64, 1024): 1.0}  # fmt: skip


@pytest.mark.parametrize("length, budget", PUBLISHED)
def test_recall_on_keys_that_are_alike(length, budget):
    """At least what the published search keeps, or all but half a percent of the best choice."""
    found, possible = [], []
    for seed in range(4):
        query, key = (torch.from_numpy(x).transpose(1, 2) for x in locality(seed, 8192, length))
        near, far = mass_per_key(query, key)
        index = HiP(budget=budget, sink=64).select(query, key)
        found.append(kept(near, far, index))
        possible.append(best(near, far, budget, 2))
    found, possible = sum(found) / 4, sum(possible) / 4
    assert found >= min(PUBLISHED[length, budget], possible - 0.005), f"{found:.3f}, {possible:.3f}"
    assert found <= possible


def test_four_branches_find_more_than_two():
    """Without locality the search is blind; then it counts that no branch dies unseen."""
    kept_by = {2: 0.0, 4: 0.0}
    for seed in range(4):
        query, key = (torch.from_numpy(x).transpose(1, 2) for x in locality(seed, 8192, 1))
        near, far = mass_per_key(query, key)
        for branch in kept_by:
            index = HiP(budget=1024, sink=64, branch=branch).select(query, key)
            kept_by[branch] += kept(near, far, index) / 4
    assert kept_by[4] > kept_by[2] + 0.05, kept_by


def test_a_larger_budget_keeps_more():
    query, key, _ = (torch.from_numpy(x).transpose(1, 2) for x in gen(3, 4096, "mixed"))
    last = query[:, :, -64:]
    key = key.repeat_interleave(2, 1)
    near, far = mass_per_key(last, key, sink=16)
    found = [kept(near, far, HiP(budget=b).select(last, key)) for b in (64, 256, 1024, 2048)]
    assert all(a < b for a, b in zip(found, found[1:], strict=False)), found


# ---- decoding ----------------------------------------------------------------------------------


def weight_of(out):
    """Values are 0 but for one key: the output is the attention to it."""
    return out[..., 0].min().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("refresh", [1, 8])
def test_a_hot_key_stays_visible_while_a_choice_ages(backend, refresh):
    """It leaves the window between two searches; a choice made before has not searched it."""
    config = HiP(budget=16, window=32, sink=4, share_kv_heads=True)
    state = HiPState(config, refresh)
    hot, n = 300 - 32 + 3, 300  # the fourth oldest of the window at the first step
    key, value = torch.zeros(1, 2, n + 12, 32), torch.zeros(1, 2, n + 12, 32)
    nearby = (1 - (torch.arange(n + 12) - hot).abs() / 20).clamp(min=0)  # a search can find it
    key[..., 0], value[:, :, hot, 0] = 20 * nearby, 1
    query = torch.zeros(1, 4, 1, 32)
    query[..., 0] = 10
    ages = []
    for step in range(12):
        seen = slice(0, n + step)
        args = query, key[:, :, seen], value[:, :, seen]
        out, _ = state.attention(*args, backend=backend)
        ages.append(state.age)
        assert weight_of(out) > 0.6, f"step {step}"
        if state.age >= 4:  # without the wider window it would be gone
            without, _ = attend(*args, *state.index.blocks, True, 4, 32, backend=backend)
            assert weight_of(without) < 0.01
    assert ages == [step % refresh for step in range(12)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_between_two_searches_each_key_is_in_the_reach_of_one_of_them_or_the_window(backend):
    """With room for all, decoding with a state is dense attention, whatever its age."""
    query, key, value = tensors(Hq=4, Hkv=2, Tq=40, Tk=240)
    for refresh in (1, 3, 8):
        state = HiPState(HiP(budget=500, window=16, sink=4, share_kv_heads=True), refresh)
        for i in range(40):
            keys = slice(0, 201 + i)
            one = query[:, :, i : i + 1], key[:, :, keys], value[:, :, keys]
            out, lse = state.attention(*one, backend=backend)
            want = run(*one, "dense", backend=backend, return_lse=True)
            torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)


def test_a_state_searches_again_when_it_must():
    query, key, value = tensors(B=2, Hq=2, Hkv=2, Tq=8, Tk=400)
    state = HiPState(HiP(budget=64, window=32, q_block=1), refresh=6)

    def step(n_queries, n_keys, batch=2):
        args = query[:batch, :, :n_queries], key[:batch, :, :n_keys], value[:batch, :, :n_keys]
        state.attention(*args)
        return state.age

    assert [step(1, 300), step(1, 301), step(1, 302)] == [0, 1, 2]
    assert step(1, 350) == 0, "keys were skipped"
    assert step(1, 351) == 1
    assert step(1, 100) == 0, "another sequence"
    assert step(1, 100) == 0, "another sequence as long as the last"
    assert step(1, 101, batch=1) == 0, "another batch"
    assert step(4, 105, batch=1) == 0, "several tokens at a time"
    assert step(4, 109, batch=1) == 4
    assert step(4, 113, batch=1) == 0, "8 tokens are more than 5"
    state.reset()
    assert state.index is None and step(1, 300) == 0
    lengths = torch.tensor([301, 301], dtype=torch.int32)
    state.attention(query[:, :, :1], key, value, kv_lengths=lengths)
    assert state.age == 0, "lengths came in"


@pytest.mark.parametrize(
    "q_block, refresh, steps",
    [(4, 16, (8, 5)), (4, 16, (5, 8)), (8, 16, (8, 5)), (8, 16, (3, 8)), (4, 17, (8, 8)),
     (4, 9, (9, 1))],
)  # fmt: skip
def test_no_key_is_invisible_where_steps_differ(q_block, refresh, steps):
    """With room for all, steps of other lengths are dense attention, too."""
    query, key, value = tensors(Hq=4, Hkv=2, Tq=20, Tk=220)
    config = HiP(budget=500, window=16, sink=4, q_block=q_block, share_kv_heads=True)
    state, n = HiPState(config, refresh), 200
    for step in steps:
        n += step
        args = query[:, :, :step], key[:, :, :n], value[:, :, :n]
        out, lse = state.attention(*args)
        want = run(*args, "dense", return_lse=True)
        torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)
    alike = steps[0] == steps[1] or max(steps) <= q_block
    assert state.age == (steps[1] if alike else 0)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "growing"])
def test_a_step_in_parts_is_as_one_in_one_piece(fixed):
    """The parts of a step, as graphs replay them: what search and attend compute, books apart."""
    query, key, value = tensors(Hq=4, Hkv=2, Tq=30, Tk=240)
    config = HiP(budget=500, window=16, sink=4, share_kv_heads=True)
    state, one = HiPState(config, 8), HiPState(config, 8)
    state.search(query[:, :, :1], key)  # as a capture does: it counts for nothing
    due = []
    for i in range(30):
        step, n = query[:, :, i : i + 1], 200 + i
        seen = (key, value) if fixed else (key[:, :, :n], value[:, :, :n])
        cache = {"kv_lengths": torch.tensor([n], dtype=torch.int32)} if fixed else {}
        due.append(state.advance(step, seen[0], **cache))
        if due[-1]:
            state.search(step, seen[0], **cache)
        out, _ = state.attend(step, *seen, **cache)
        want = run(step, key[:, :, :n], value[:, :, :n], "dense")
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(out, one.attention(step, *seen, **cache)[0]) and state.age == one.age
    assert due == [i % 8 == 0 for i in range(30)]


def test_a_search_that_fails_leaves_no_choice():
    query, key, value = tensors(Tq=1, Tk=300)
    state = HiPState(HiP(budget=64, window=32), refresh=3)
    state.attention(query, key[:, :, :299], value[:, :, :299])
    with pytest.raises(ValueError, match="scale"):
        state.search(query, key, scale=float("nan"))
    assert state.index is None and state.advance(query, key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("refresh", [1, 4])
def test_a_cache_of_fixed_size_is_as_one_that_grows(backend, page_size, refresh):
    """Sequences of lengths of their own, NaN and no pages where they end."""
    query, key, value = tensors(B=2, Hq=4, Hkv=2, Tq=9, Tk=320)
    config = HiP(budget=32, window=24, sink=4, share_kv_heads=True)
    together, alone = HiPState(config, refresh), [HiPState(config, refresh) for _ in range(2)]
    for i in range(9):
        lengths, step = [290 + i, 200 + i], query[:, :, i : i + 1]
        keys, table, n = hip.paged(key, page_size, lengths)
        values = hip.paged(value, page_size, lengths)[0]
        cache = {"block_table": table, "kv_lengths": n}
        got = together.attention(step, keys, values, backend=backend, **cache)
        assert together.age == i % refresh
        for b, state in enumerate(alone):
            own = (x[b : b + 1, :, : lengths[b]] for x in (key, value))
            want = state.attention(step[b : b + 1], *own, backend=backend)
            assert state.age == together.age
            assert torch.equal(together.index.indices[b], state.index.indices[0])
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x[b : b + 1], y, rtol=1e-5, atol=1e-5)


def test_with_lengths_the_age_decides_when_to_search():
    query, key, value = tensors(Tq=1, Tk=400)
    state = HiPState(HiP(budget=64, window=32), refresh=3)

    def step(room, length):
        lengths = None if length is None else torch.tensor([length], dtype=torch.int32)
        state.attention(query, key[:, :, :room], value[:, :, :room], kv_lengths=lengths)
        return state.age

    assert [step(300, n) for n in (200, 201, 202, 203)] == [0, 1, 2, 0]
    assert step(400, 204) == 1, "a larger cache"
    assert step(300, 205) == 2 and step(300, 206) == 0
    assert step(200, 100) == 0, "less room: blocks may be gone"
    assert step(200, None) == 0, "without lengths as many keys are no next step"


def test_a_state_keeps_its_memory():
    """A CUDA graph of a step reads the addresses that it was captured with."""
    query, key, value = tensors(Hq=4, Hkv=2, Tq=1, Tk=400)
    state = HiPState(HiP(budget=64, window=32, share_kv_heads=True), refresh=2)
    places = set()
    for n in range(380, 392):
        before = None if state.index is None else state.index.indices.clone()
        state.attention(query, key[:, :, :n], value[:, :, :n])
        places.add(state.index.indices.data_ptr())
        moved = before is not None and not torch.equal(before, state.index.indices)
        assert not (moved and state.age > 0)
    assert len(places) == 1


def test_nothing_is_read_on_the_host():
    """Every part of a step traces through fake tensors, which have no values to read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key = torch.empty(2, 4, 1, 64), torch.empty(2, 2, 5000, 64)
        state = HiPState(refresh=4)
        for n in range(4990, 5000):
            out, lse = state.attention(query, key[:, :, :n], key[:, :, :n])
            assert out.shape == query.shape and lse.shape == (2, 4, 1)
        assert state.age == 1


@pytest.mark.parametrize("value", [0, -1])
def test_a_state_checks_its_interval(value):
    with pytest.raises(ValueError, match=f"refresh: got {value}, expected 1 or more"):
        HiPState(refresh=value)
    with pytest.raises(RuntimeError, match="nothing has been chosen yet"):
        HiPState().attend(*tensors(Tq=1, Tk=9))


# ---- caches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(
    "config",
    [
        HiP(budget=32, q_block=16, window=16, sink=4),
        InfiniteHiP((32, 8), (64, 32), (1, 1), 16, 4, 16, merge_heads="group"),
    ],
    ids=lambda x: x.name,
)
def test_keys_of_a_cache_are_as_those_in_one_piece(backend, page_size, config):
    query, key, value = tensors(B=2, Hq=4, Hkv=2, Tq=40, Tk=304)
    lengths = [297, 130]
    keys, table, n = hip.paged(key, page_size, lengths)
    values = hip.paged(value, page_size, lengths)[0]
    cache = {"block_table": table, "kv_lengths": n, "backend": backend}
    got = run(query, keys, values, config, **cache)
    all_keys = run(query, keys, values, "dense", **cache)
    assert not torch.allclose(got, all_keys, atol=1e-2)
    for b, length in enumerate(lengths):
        own = (x[b : b + 1, :, :length] for x in (key, value))
        want = run(query[b : b + 1], *own, config, backend=backend)
        torch.testing.assert_close(got[b : b + 1], want, rtol=1e-5, atol=1e-5)
    by_default = sparse_attn.attention(query, keys, values, config, **cache)
    if backend == "cpp":  # of the capacity, not the pages
        torch.testing.assert_close(by_default, all_keys)
    with pytest.raises(NotImplementedError, match="return_stats: no density is computed"):
        run(query, keys, values, config, return_stats=True, **cache)


def test_a_method_without_caches_names_those_that_have_them():
    query, key, value = tensors(Tq=40, Tk=300)
    lengths = torch.tensor([200], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="methods 'dense', 'hip', 'infinite_hip'"):
        sparse_attn.attention(query, key, value, "flex_prefill", kv_lengths=lengths)


# ---- the config --------------------------------------------------------------------------------


def test_the_sink_and_the_window_are_attended_to():
    query, key, value = tensors(Tq=64, Tk=700)
    config = HiP(budget=64, sink=20, window=50)
    out = run(query, key, value, config, backend="reference")
    index = config.select(query, key)
    mask = token_mask(
        index.indices, index.counts, slice(0, 64), (2, 1, 64, 700), 64, 2, True, 20, 50
    )
    scores = (query @ key.repeat_interleave(2, 1).mT / 8).masked_fill(~mask, -torch.inf)
    want = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_explain_names_the_backend():
    query, key, value = tensors(Tq=64, Tk=700)
    text = sparse_attn.explain(query, key, value, HiP(budget=64), fallback=False)
    assert "hip_select:" in text and "budget=64" in text and "used" in text
    short = sparse_attn.explain(query, key, value, "hip")
    assert "takes the dense path" in short


@pytest.mark.parametrize(
    "n_queries, n_keys, because",
    [(4096, 4096, None), (4096, 4095, "4096 keys (4095 given)"), (128, 4096, None),
     (127, 2**17, "128 queries (127 given)"), (1, 2**20, "128 queries (1 given)")],
)  # fmt: skip
def test_the_dense_path_is_taken_where_it_is_faster(monkeypatch, n_queries, n_keys, because):
    """In decoding always: there the method has been measured, and lost, at every length."""
    monkeypatch.setattr("sparse_attn.cpu_isa.BEST", "avx512bf16")
    reason = dense_is_faster("hip", "cpp", torch.empty(1, 1, n_queries, 8), n_keys)
    assert (reason is None) if because is None else reason == f"dense is faster below {because}"


def test_gradients_flow_through_the_blocks_chosen():
    query, key, value = (x.requires_grad_() for x in tensors(Tq=64, Tk=400))
    run(query, key, value, HiP(budget=64, window=32)).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (query, key, value))


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("budget", 0, "1 or more"),
        ("budget", 1.5, "an integer"),
        ("q_block", 0, "1 to 128"),
        ("q_block", 129, "1 to 128"),
        ("kv_block", 256, "1 to 128"),
        ("q_stride", 129, "1 to 128"),
        ("key_stride", 0, "1 to 128"),
        ("sink", -1, "0 or more"),
        ("window", 2**40, r"0 to 2\*\*31 - 256"),
        ("window", True, "an integer"),
        ("representative", "middle", "one of .'centre', 'first'."),
        ("branch", 3, "one of .2, 4."),
        ("share_kv_heads", 1, "True or False"),
    ],
)
def test_config_checks_itself(name, value, expected):
    with pytest.raises(
        (ValueError, TypeError), match=f"{name}: got {value!r}, expected {expected}"
    ):
        HiP(**{name: value})


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        HiP().budget = 1
    assert HiP.name == "hip" and sparse_attn.HiP is HiP


@pytest.mark.parametrize("config", ["hip", InfiniteHiP()])
def test_state_takes_a_hip(config):
    with pytest.raises(TypeError, match="config: got .*, expected a HiP"):
        HiPState(config)

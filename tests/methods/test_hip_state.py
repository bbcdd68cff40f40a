"""Decoding with a choice of HiP that is reused."""

import pytest
import torch

from sparse_attn import HiP, InfiniteHiP
from sparse_attn.methods.hip import HiPState
from sparse_attn.ops.block_sparse_attention import op as attend
from tests import hip
from tests.methods.test_hip import BACKENDS, run, tensors


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


@pytest.mark.parametrize("config", ["hip", InfiniteHiP()])
def test_state_takes_a_hip(config):
    with pytest.raises(TypeError, match="config: got .*, expected a HiP"):
        HiPState(config)

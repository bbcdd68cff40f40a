import pytest
import torch

import sparse_attn
from bench.inputs import gen, locality
from sparse_attn import HiP, InfiniteHiP
from sparse_attn.crossover import dense_is_faster
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


@pytest.mark.parametrize("block, sink, budget", [(8, 7, 8), (8, 16, 24), (3, 4, 10), (1, 5, 9)])
def test_up_to_which_length_a_prompt_is_dense(block, sink, budget):
    config = HiP(budget, 1, block, sink=sink, window=11)
    longest = 11 + block * (sink // block - -budget // block)
    for n in (longest - 1, longest, longest + 1):
        query, key, value = tensors(Tq=1, Tk=n)
        out, lse = run(query, key, value, config, return_lse=True)
        want, whole = run(query, key, value, "dense", return_lse=True)
        assert torch.allclose(lse, whole, atol=1e-5) == (n <= longest)


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

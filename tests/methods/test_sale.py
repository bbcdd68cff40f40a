import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attn
from sparse_attn import BlockIndex, Sale, settings
from sparse_attn.calibrate_sale import START, calibrate_sale
from sparse_attn.methods.sale import METHOD, SaleState
from tests.cases import FLOOR, Shape, assert_as_accurate, inputs
from tests.ops.test_sale_select import structured


def mass_of_blocks(query, key):
    """Attention mass per 64 x 32 block, [Hq, Mq, Nk], summed over rows, and causal blocks."""
    n = key.shape[2]
    scores = (
        query[0].float() @ key[0].float().repeat_interleave(query.shape[1] // key.shape[1], 0).mT
    )
    later = torch.ones(n, n).triu(1).bool()
    p = (scores / query.shape[3] ** 0.5).masked_fill(later, -torch.inf).softmax(-1)
    p = torch.nn.functional.pad(p, (0, -n % 32, 0, -n % 64))
    return p.unflatten(2, (-1, 32)).unflatten(1, (-1, 64)).sum((2, 4))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("kind", ["mixed", "sharp"])
def test_no_threshold_equals_dense(backend, kind):
    query, key, value = structured(kind, 1100, torch.float32)
    run = lambda m: sparse_attn.attention(  # noqa: E731
        query, key, value, m, backend=backend, fallback=False
    )
    torch.testing.assert_close(run(Sale(threshold=0.0)), run("dense"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, tau", [("mixed", 0.004), ("sharp", 0.02), ("peaky", 0.004)])
def test_keeps_the_mass_and_more_of_it_than_its_share(kind, tau):
    """Against the exact best choice of as many blocks in each head."""
    query, key, _ = structured(kind, 2048)
    mass = mass_of_blocks(query, key)
    mask = sparse_attn.select(query, key, Sale(threshold=tau)).to_mask(2048)[0]
    assert 0 < mask.sum() < 0.85 * BlockIndex.full(2048, 2048, 64, 32).counts.sum() * 4
    kept = (mass * mask).sum().item()
    sizes = mask.flatten(1).sum(1).tolist()
    heads = zip(mass.flatten(1), sizes, strict=True)
    best = sum(of_head.topk(n).values.sum().item() for of_head, n in heads)
    assert kept >= 0.95 * mass.sum().item(), f"recall {kept / mass.sum().item():.3f}"
    assert kept >= 0.95 * best, f"{kept / best:.3f} of the best"


def test_a_lower_threshold_keeps_more():
    query, key, _ = structured("sharp", 1500)
    configs = [Sale(threshold=t) for t in (0.001, 0.01, 0.1)]
    masks = [sparse_attn.select(query, key, c).to_mask(1500) for c in configs]
    assert (masks[0] >= masks[1]).all() and (masks[1] >= masks[2]).all()
    assert masks[0].sum() > masks[1].sum() > masks[2].sum()


def test_thresholds_per_head():
    query, key, _ = structured("sharp", 1500)
    taus = (0.001, 0.1, 0.0, 0.02)
    each = sparse_attn.select(query, key, Sale(threshold=torch.tensor(taus))).to_mask(1500)
    for h, tau in enumerate(taus):
        alone = sparse_attn.select(query, key, Sale(threshold=tau)).to_mask(1500)
        assert torch.equal(each[:, h], alone[:, h])
    with pytest.raises(ValueError, match="threshold: number of heads is 3, expected 4"):
        sparse_attn.select(query, key, Sale(threshold=[0.1, 0.1, 0.1]))


def test_short_prompts_are_dense_and_explain_says_so():
    query, key, value = inputs(Shape(Tq=700, Tk=1000), torch.bfloat16)
    why = "1000 keys are fewer than min_length, 1024"
    assert why in sparse_attn.explain(query, key, value, "sale")
    out, stats = sparse_attn.attention(query, key, value, "sale", return_stats=True)
    assert stats.fallback == why and stats.density == 1
    assert torch.equal(out, sparse_attn.attention(query, key, value, "dense"))
    stats = sparse_attn.attention(query, key, value, "sale", fallback=False, return_stats=True)[1]
    assert stats.fallback is None and stats.selected_by == "cpp"
    assert why not in sparse_attn.explain(query, key, value, Sale(min_length=10))


def test_chunks_batches_and_shared_lists():
    query, key, value = (torch.cat([x, x.flip(1)]) for x in structured("sharp", 1500))
    config = Sale(threshold=0.02, share_kv_heads=True)
    index = sparse_attn.select(query[:, :, 900:], key, config)
    assert index.indices.shape[:3] == (2, 2, 10)
    out = sparse_attn.attention(query[:, :, 900:], key, value, config, fallback=False)
    want = sparse_attn.attention(query[:, :, 900:], key, value, index=index)
    assert torch.equal(out, want)
    dense = sparse_attn.attention(query, key, value, "dense")[:, :, 900:]
    assert (out - dense).float().norm() < 0.1 * dense.float().norm()
    own = sparse_attn.select(query[:, :, 900:], key, Sale(threshold=0.02))
    assert index.density(600, 1500) > own.density(600, 1500)


@pytest.mark.parametrize("share", [False, True])
def test_chunks_with_frozen_means_are_the_whole_prompt_with_them(share):
    """The codes of a block stay from chunk to chunk, and so does, bit for bit, what is chosen."""
    tensors = [torch.cat([x, x.flip(1)]) for x in structured("sharp", 1500)]
    query, key, value = tensors
    config = Sale(threshold=(0.02, 0.01, 0.02, 0.01), min_length=0, share_kv_heads=share)
    state, outs = SaleState(config), []
    means = {f"{n}_mean": x[:, :, :512].mean(2, dtype=torch.float32)
             for n, x in (("query", query), ("key", key))}  # fmt: skip
    whole = config.select(query, key, **means)
    for start, end in ((0, 512), (512, 1024), (1024, 1500)):
        q, k, v = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        out, lse = state.attention(q, k, v, fallback=False)
        assert torch.equal(state.key_mean, means["key_mean"])
        assert torch.equal(state.query_mean, means["query_mean"])
        index = config.select(q, k, **means)
        rows = slice(start // 64, -(-end // 64))
        want = whole.to_mask(1500)[:, :, rows, : -(-end // 32)]
        assert torch.equal(index.to_mask(end), want)
        assert torch.equal(out, sparse_attn.attention(q, k, v, index=index))
        outs.append(out)
    assert index.density(476, 1500) < 0.9
    want = sparse_attn.attention(query, key, value, index=whole)
    assert_as_accurate(torch.cat(outs, 2), *(
        sparse_attn.attention(*(x.to(dtype) for x in tensors), index=whole, backend="reference")
        for dtype in (torch.float64, torch.bfloat16)
    ), FLOOR[torch.bfloat16])  # fmt: skip
    own = config.select(query[:, :, 512:1024], key[:, :, :1024])  # means of its own
    assert not torch.equal(own.to_mask(1024), whole.to_mask(1500)[:, :, 8:16, :32])


def test_a_state_takes_new_means_when_it_must():
    query, key, value = structured("sharp", 300)
    state = SaleState(Sale(min_length=0))

    def step(start, end, heads=4, flip=False):
        args = (query[:, :heads, start:end], key[:, :, :end], value[:, :, :end])
        before = state.key_mean
        state.attention(*(x.flip(3) if flip else x for x in args), fallback=False)
        return state.key_mean is before

    assert [step(0, 100), step(100, 200), step(200, 300)] == [False, True, True]
    assert not step(0, 100, flip=True), "a new prompt"
    assert not step(150, 300), "tokens were skipped"
    assert not step(0, 100) and step(100, 101) and not step(101, 102, heads=2), "other heads"
    state.reset()
    assert state.key_mean is state.query_mean is None
    assert state.fallback is None
    state = SaleState()
    out, _ = state.attention(query, key, value)
    assert state.fallback == "300 keys are fewer than min_length, 1024"
    assert torch.equal(out, sparse_attn.attention(query, key, value, "dense"))
    with pytest.raises(TypeError, match="config: got 'sale', expected a Sale"):
        SaleState("sale")
    for name, of in (("key_mean", 4), ("query_mean", 2)):
        wrong = torch.zeros(1, of, query.shape[3])
        with pytest.raises(ValueError, match=f"{name}: shape is"):
            Sale().select(query, key, **{name: wrong})


def test_thresholds_per_head_cost_the_same_few_operations():
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls[-1].append(function)
            return function(*args, **(kwargs or {}))

    for heads in (2, 32):
        taus = [0.1 / (h + 1) for h in range(heads)]
        query = torch.zeros(1, heads, 1, 2, dtype=torch.bfloat16)
        calls.append([])
        with Count():
            _, args = Sale(threshold=taus).selector(query, query, True, None)
        assert torch.equal(args[2], torch.tensor(taus))
    assert calls[0] == calls[1] and len(calls[0]) <= 4


def test_compiles_with_thresholds_per_head():
    """The number of heads is a symbol until the thresholds fix it."""
    config = Sale(threshold=(0.1, 0.05), min_length=0)
    attend = lambda *x: sparse_attn.attention(*x, config, fallback=False)  # noqa: E731
    run = torch.compile(attend, fullgraph=True, dynamic=True)
    for length in (200, 333):
        tensors = [torch.randn(1, 2, length, 32) for _ in range(3)]
        assert torch.equal(run(*tensors), attend(*tensors))


def test_as_an_operator_and_backward():
    query, key, value = (torch.randn(1, 2, 300, 32) for _ in range(3))
    options = '{"threshold": [0.1, 0.2], "min_length": 10}'
    out, _ = torch.ops.sparse_attn.attention(query, key, value, "sale", options)
    config = Sale(threshold=(0.1, 0.2), min_length=10)
    want = sparse_attn.attention(query.requires_grad_(), key, value, config)
    assert torch.equal(out, want)
    want.sum().backward()
    assert query.grad.abs().sum() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_in_transformers(side):
    """Padding tokens never reach the selection: a padded sequence is as it is alone."""
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("sparse_attn.integrations.transformers")
    config = Sale(threshold=0.05, min_length=0)
    integration.register(config, "sale_padded", fallback=False)
    tensors = [torch.cat([x, x.flip(1)]) for x in structured("sharp", 900)]
    query, key, value = tensors
    real = torch.ones(2, 900, dtype=torch.bool)
    part = slice(300, None) if side == "left" else slice(None, 600)
    real[1] = False
    real[1, part] = True
    key[~real[:, None].expand(key.shape[:3])] = 1e4  # would win every block
    mask = real[:, None, None] & torch.ones(900, 900).tril().bool()
    run = transformers.AttentionInterface()["sale_padded"]
    out, _ = run(torch.nn.Module(), query, key, value, mask, is_causal=True)
    for b, tokens in ((0, slice(None)), (1, part)):
        alone = [x[b : b + 1, :, tokens] for x in tensors]
        want = sparse_attn.attention(*alone, config, fallback=False)
        assert torch.equal(out[b : b + 1, tokens].transpose(1, 2), want)
    assert sparse_attn.select(*alone[:2], config).density(600, 600) < 0.8


@pytest.mark.parametrize("frozen", [False, True])
def test_left_padded_prompts_in_chunks_in_transformers(frozen):
    """The means, of a call or frozen, are those of real tokens of one sequence."""
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("sparse_attn.integrations.transformers")
    config, states = Sale(threshold=0.05, min_length=0), {}

    def attend(query, key, value, layer, causal, scale):
        if not frozen:
            return sparse_attn.attention(query, key, value, config, scale=scale, fallback=False)
        state = states.setdefault(key.shape[2] % 400, SaleState(config))  # what tells them apart
        return state.attention(query, key, value, scale=scale, fallback=False)[0]

    integration.register_function(attend, "sale_chunks")
    run = transformers.AttentionInterface()["sale_chunks"]
    query, key, value = (torch.cat([x, x.flip(1)]) for x in structured("sharp", 1200))
    pad = 300
    for x in (key, value):
        x[1, :, :pad] = 1e4  # would win every block
    alone = {b: SaleState(config) for b in (0, 1)}
    for start in (0, 400, 800):
        end = start + 400
        real = torch.arange(end) >= torch.tensor([0, pad])[:, None]
        i = torch.arange(start, end)[:, None]
        mask = real[:, None, None] & (torch.arange(end) <= i)
        out, _ = run(torch.nn.Module(), query[:, :, start:end], key[:, :, :end],
                     value[:, :, :end], mask, is_causal=True)  # fmt: skip
        for b in (0, 1):
            first = max(start, b * pad)
            own = (
                query[b : b + 1, :, first:end],
                *(x[b : b + 1, :, b * pad : end] for x in (key, value)),
            )
            want = sparse_attn.attention(*own, config, fallback=False)
            if frozen:
                want, _ = alone[b].attention(*own, fallback=False)
            assert torch.equal(out[b : b + 1, first - start :].transpose(1, 2), want)


def test_no_other_head_dim_or_mask():
    query, key, value = inputs(Shape(D=33, Dv=33))
    with pytest.raises(NotImplementedError, match="head_dim 33 is odd"):
        sparse_attn.attention(query, key, value, "sale")
    query, key, value = inputs(Shape())
    with pytest.raises(NotImplementedError, match="causal prefill"):
        sparse_attn.attention(query, key, value, "sale", causal=False)


# ---- the config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("threshold", -1, "0 or more"),
        ("threshold", float("nan"), "0 to"),
        ("threshold", None, "a number"),
        ("threshold", True, "a number"),
        ("q_block", 48, r"one of \(16, 32, 64, 128\)"),
        ("kv_block", 128, r"one of \(16, 32, 64\)"),
        ("kv_block", "a", "an integer"),
        ("local", 0, "1 or more"),
        ("sink", -1, "0 or more"),
        ("min_length", 1.5, "an integer"),
        ("share_kv_heads", 1, "True or False"),
    ],
)
def test_config_checks_itself(name, value, expected):
    with pytest.raises(
        (ValueError, TypeError), match=f"{name}: got {value!r}, expected {expected}"
    ):
        Sale(**{name: value})


def test_files_are_checked(tmp_path):
    with pytest.raises(ValueError, match="threshold: there is no file"):
        Sale(threshold=str(tmp_path / "none.json"))
    path = tmp_path / "other.json"
    layers = {"0": {"threshold": [0.1]}, "1": {"threshold": [0.1], "q_block": 32}}
    for found in (
        "{", [], {"method": "sale"}, {"method": "hip", "options": {}, "layers": {}},
        {"method": "sale", "options": [], "layers": {}},
        {"method": "sale", "options": {"block": 3}, "layers": {}},
        {"method": "sale", "options": {}, "layers": layers},
    ):  # fmt: skip
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        with pytest.raises(ValueError, match="is no file that calibrate_sale wrote"):
            Sale(threshold=path)
    layer = {"threshold": [0.1, 0.2]}
    path.write_text(json.dumps({"method": "sale", "options": {}, "layers": {"0": layer}}))
    assert Sale(path).threshold == (0.1, 0.2)
    with pytest.raises(ValueError, match="layer: got 1, expected one of 0, the layers"):
        Sale(path, layer=1)
    assert Sale(path, layer=0) == Sale((0.1, 0.2))
    with pytest.raises(ValueError, match="layer: got 3, but threshold is no file"):
        Sale(threshold=0.01, layer=3)


def test_a_file_gives_all_fields_and_nothing_contradicts_it(tmp_path):
    fields = {
        "q_block": 128, "kv_block": 64, "local": 512, "sink": 64, "min_length": 4096,
        "share_kv_heads": True,
    }  # fmt: skip
    tensors = [torch.randn(1, heads, 300, 32) for heads in (2, 1, 1)]
    config = Sale(0.5, **fields)
    path = tmp_path / "sale.json"
    calibrate_sale([[tensors]] * 2, max_error=5.0, config=config, progress=False).save(path)
    want = Sale((START, START), **fields)
    assert Sale.load(path) == {0: want, 1: want}
    by_register = settings.read(path)  # layers that the file lacks have its options too
    assert by_register == (Sale(**fields), Sale.load(path))
    assert Sale(path, layer=1) == want == Sale(str(path), layer=0, sink=64, share_kv_heads=True)
    assert Sale.load(path, sink=32)[0] == Sale((START, START), **{**fields, "sink": 32})
    for name, other in (("q_block", 64), ("sink", 32), ("share_kv_heads", False)):
        message = f"{name}: got {other}, but .*sale.json' was calibrated for {fields[name]}; Sale"
        with pytest.raises(ValueError, match=message):
            Sale(path, layer=1, **{name: other})
    assert Sale(q_block=None, sink=None) == Sale() == Sale(0.004, 64, 32, 128, 32, 1024, False)


def test_thresholds_of_other_heads_are_refused_where_the_dense_path_is_taken():
    query, key, value = inputs(Shape())
    for call in (sparse_attn.attention, sparse_attn.explain):
        with pytest.raises(ValueError, match="threshold: number of heads is 7, expected 2"):
            call(query, key, value, Sale(threshold=[0.1] * 7))


def test_config_is_frozen_and_hashable():
    config = Sale(threshold=torch.tensor([0.5, 0.25]))
    assert config == Sale(threshold=(0.5, 0.25)) and hash(config) == hash(Sale([0.5, 0.25]))
    with pytest.raises(AttributeError):
        config.threshold = 1
    assert METHOD.name == "sale"

"""Thresholds of SALE: the search, what it measures, and the file."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attn
from sparse_attn import BlockIndex, Sale
from sparse_attn.calibrate_sale import START, calibrate_sale
from tests.ops.test_sale_select import structured


def prompts(*kinds, length=1200):
    return [structured(kind, length) for kind in kinds]


@pytest.mark.parametrize("target", [{"max_error": 0.15}, {"min_recall": 0.985}, {}], ids=str)
def test_calibration_reaches_its_target(target, tmp_path):
    found = calibrate_sale([prompts("sharp"), prompts("flat", "mixed")], **target, progress=False)
    assert found.target == (target or {"max_error": 0.4})
    for layer, n in zip(found.layers, (1, 2), strict=True):
        assert layer.prompts == n and all(0 <= t <= START for t in layer.threshold)
        # the target holds for each prompt, so for the mean
        if "min_recall" in target:
            assert min(layer.recall) >= target["min_recall"] - 1e-6
        else:
            assert max(layer.error) <= found.target["max_error"] + 1e-6
        numbers = zip(layer.threshold, layer.density, strict=True)
        assert all(density == 1 for threshold, density in numbers if threshold == 0)
    found.save(tmp_path / "sale.json")
    configs = Sale.load(tmp_path / "sale.json", min_length=3)
    assert [configs[i].threshold for i in (0, 1)] == [tuple(x.threshold) for x in found.layers]
    assert configs[1].min_length == 3
    assert Sale(str(tmp_path / "sale.json"), layer=1).threshold == configs[1].threshold
    # what the file says is what a call finds
    query, key, value = prompts("sharp")[0]
    index = sparse_attn.select(query, key, configs[0])
    visible = BlockIndex.full(1200, 1200, 64, 32).counts.sum()
    torch.testing.assert_close(
        (index.counts[0].sum(-1) / visible), torch.tensor(found.layers[0].density)
    )
    text = (tmp_path / "sale.json").read_text()
    assert json.loads(text)["measured"]["target"] == found.target
    assert max(len(line) for line in text.split("\n")) < 200, "one list a line"


def test_thresholds_are_halved_only_where_needed():
    """The published search, head by head."""
    query, key, value = prompts("mixed")[0]
    (layer,) = calibrate_sale([[(query, key, value)]], max_error=0.1, progress=False).layers
    dense = sparse_attn.attention(query, key, value, "dense").float()
    for h in range(4):
        tau = START
        while tau >= 1e-4:
            config = Sale(threshold=tau)
            out = sparse_attn.attention(query, key, value, config, fallback=False).float()
            if (out - dense)[0, h].abs().sum(-1).mean() <= 0.1:
                break
            tau /= 2
        assert layer.threshold[h] == pytest.approx(tau if tau >= 1e-4 else 0, rel=1e-5)
    assert len(set(layer.threshold)) > 1


def test_thresholds_only_go_down():
    """Whatever the order, a head has the lowest that it has on any prompt alone."""
    hard, easy = prompts("mixed", "flat", length=800)
    find = lambda *x: calibrate_sale([x], max_error=0.1, progress=False).layers[0]  # noqa: E731
    alone = find(hard).threshold, find(easy).threshold
    low = [min(x) for x in zip(*alone, strict=True)]
    assert low != list(alone[1]), "the first prompt lowers what would do for the second"
    assert find(hard, easy).threshold == find(easy, hard).threshold == low


@pytest.mark.parametrize("share", [False, True])
def test_what_is_measured(share):
    """From scratch in float64: two different batches, options and a scale of their own."""
    tensors = [torch.cat(x) for x in zip(*prompts("mixed", "sharp", length=400), strict=True)]
    query, key, value = (x.float() for x in tensors)
    config = Sale(q_block=32, kv_block=16, local=64, sink=0, share_kv_heads=share)
    options = {"min_recall": 0.8, "config": config, "scale": 0.1, "progress": False}
    layer = calibrate_sale([[(query, key, value)]], **options).layers[0]
    assert min(layer.recall) < 0.998 and min(layer.density) < 0.95
    chosen = Sale(layer.threshold, 32, 16, 64, 0, share_kv_heads=share)
    mask = chosen.select(query, key, scale=0.1).to_mask(400).repeat_interleave(1 + share, 1)
    visible = BlockIndex.full(400, 400, 32, 16).counts.sum()
    key, value = (x.double().repeat_interleave(2, 1) for x in (key, value))
    scores = 0.1 * query.double() @ key.mT
    weights = scores.masked_fill(torch.ones(400, 400).triu(1).bool(), -torch.inf).softmax(-1)
    tokens = mask.repeat_interleave(32, 2)[:, :, :400].repeat_interleave(16, 3)[..., :400]
    kept = weights * tokens
    recall = kept.sum(-1)
    error = ((kept / recall[..., None] - weights) @ value).abs().sum(-1).mean((0, 2))
    density = mask.sum((0, 2, 3)) / (2 * visible)
    for name, want in (("recall", recall.mean((0, 2))), ("error", error), ("density", density)):
        got = torch.tensor(getattr(layer, name), dtype=torch.float64)
        torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-5)
    assert (recall[0] - recall[1]).mean(1).abs().max() > 1e-3, "the batches differ"


def test_calibration_uses_the_backend_it_is_given():
    used = set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "sparse_attn":
                used.add((function._opname, function._overloadname))
            return function(*args, **(kwargs or {}))

    with Note():
        calibrate_sale([prompts("sharp", length=300)], backend="reference", progress=False)
    operators = ("sale_select", "block_sparse_attention")
    assert used >= {(name, "reference") for name in operators}
    assert {backend for _, backend in used} == {"reference"}


def test_calibration_shows_a_bar(capsys):
    calibrate_sale([prompts("sharp")])
    assert "layer 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ([], {}, "layers: got none"),
        ([[]], {}, "layers: layer 0 has no prompt"),
        ([[torch.zeros(1)]], {}, "layers: layer 0 holds a tensor, expected its prompts"),
        ([], {"min_recall": 1.5}, "min_recall: got 1.5, expected 0 to 1"),
        ([], {"max_error": "a"}, "max_error: got 'a', expected a number"),
    ],
)
def test_calibration_checks_its_arguments(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        calibrate_sale(arguments, **options, progress=False)

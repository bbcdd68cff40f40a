"""Every field of a method's config reaches the operator that chooses, as it is."""

from dataclasses import fields

import pytest
import torch

from sparse_attn.methods import METHODS
from tests.cases import Shape, inputs

# other than the default, each; two fields of a method are never equal
OTHER = {
    "flex_prefill": {"gamma": 0.7, "tau": 0.3, "min_budget": 128, "max_budget": 192,
                     "block_size": 32, "variant": "official"},
    "hip": {"budget": 48, "q_block": 32, "kv_block": 4, "q_stride": 3, "key_stride": 5, "sink": 6,
            "window": 40, "representative": "first", "branch": 2, "share_kv_heads": True},
    "infinite_hip": {"chunks": (64, 32, 16), "keeps": (128, 96, 48), "q_strides": (2, 3, 5),
                     "q_block": 33, "sink": 7, "window": 41, "representative": "first",
                     "merge_heads": "group"},
    "sale": {"threshold": (0.02, 0.03, 0.04, 0.05), "q_block": 16, "kv_block": 64, "local": 65,
             "sink": 33, "share_kv_heads": True},
}  # fmt: skip
ELSEWHERE = {"sale": {"min_length", "layer"}, "squeezed": {"context"}}  # no argument of a kernel
FIELDS = [(name, field) for name, values in OTHER.items() for field in values]


def plain(x):
    """A value to compare: a tensor of thresholds and a list are what they hold."""
    if isinstance(x, torch.Tensor):
        return tuple(round(v, 6) for v in x.tolist())
    return tuple(x) if isinstance(x, list) else x


def passed(config, causal=True, scale=None):
    """What the selector's operator is given, by name, without the tensors of the call."""
    query, key, _ = inputs(Shape(Hq=4, Hkv=2, Tq=40, Tk=300, D=32))
    op, args = config.selector(query, key, causal, scale)
    given = dict(zip(op._signature.parameters, op.bind(*args), strict=True))
    assert given.pop("query") is query and given.pop("key") is key
    return {name: plain(x) for name, x in given.items()}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_field_is_forgotten_here(name):
    tested = set(OTHER.get(name, ())) | ELSEWHERE.get(name, set())
    assert tested == {field.name for field in fields(METHODS[name])}


@pytest.mark.parametrize("name, field", FIELDS)
def test_each_field_is_passed_on_and_changes_nothing_else(name, field):
    """All others at their own values at once, so that none can stand in for another."""
    config, default = METHODS[name](**OTHER[name]), METHODS[name]()
    before = OTHER[name] | {field: getattr(default, field)}
    if (name, field) == ("infinite_hip", "chunks"):
        before["chunks"] = (64, 32, 8)
    base, changed = passed(METHODS[name](**before)), passed(config)
    assert changed[field] == OTHER[name][field] != base.pop(field)
    assert base == {other: x for other, x in changed.items() if other != field}


@pytest.mark.parametrize("name", OTHER)
def test_the_call_is_passed_on(name):
    config = METHODS[name](**OTHER[name])
    assert passed(config)["scale"] is None and passed(config)["causal"] is True
    assert passed(config, False, 0.3)["scale"] == 0.3
    assert passed(config, False, 0.3)["causal"] is False


@pytest.mark.parametrize("name", OTHER)
def test_select_is_the_selectors_call(monkeypatch, name):
    """And the index says of its blocks, its sink and its window what the config says."""
    query, key, _ = inputs(Shape(Hq=4, Hkv=2, Tq=300, Tk=300, D=32))
    config, own = METHODS[name](**OTHER[name]), OTHER[name]
    asked, selector = [], METHODS[name].selector

    def watched(self, query, key, causal, scale, *cache):
        asked.append((causal, scale))
        return selector(self, query, key, causal, scale, *cache)

    monkeypatch.setattr(METHODS[name], "selector", watched)
    index = config.select(query, key, scale=-0.3)
    op, args = selector(config, query, key, True, -0.3)
    indices, counts, *_ = op(*args)
    assert asked == [(True, -0.3)]
    assert torch.equal(index.indices, indices) and torch.equal(index.counts, counts)
    kv_block = own["chunks"][-1] if "chunks" in own else own.get("kv_block", own.get("block_size"))
    assert (index.q_block, index.kv_block) == (own.get("q_block", kv_block), kv_block)
    assert (index.sink, index.window) == (
        (own["sink"], own["window"]) if "window" in own else (0, 0)
    )

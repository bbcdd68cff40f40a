"""Methods as written on a command line."""

import json

import pytest

from sparse_attn import Dense, FlexPrefill
from sparse_attn.evaluate.specs import defaults, parse


def test_names_and_options():
    assert parse("dense").settings.method == Dense()
    spec = parse("flex_prefill:gamma=0.9,max_budget=None,variant=official")
    assert spec.settings.method == FlexPrefill(gamma=0.9, max_budget=None, variant="official")
    assert (spec.family, spec.setting) == (
        "flex_prefill",
        "gamma=0.9,max_budget=None,variant=official",
    )
    assert parse("flex_prefill").setting == "defaults"
    assert {"dense", "flex_prefill"} <= {spec.label for spec in defaults()}


def test_a_file_of_layers(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {
                "method": "flex_prefill",
                "options": {"min_budget": 64},
                "layers": {"1": {"gamma": 0.8}},
            }
        )
    )
    spec = parse(str(path))
    assert spec.settings.of(0) == FlexPrefill(min_budget=64)
    assert spec.settings.of(1) == FlexPrefill(min_budget=64, gamma=0.8)
    assert (spec.label, spec.family) == ("mine.json", "mine.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flash", "flash: no such method 'flash'; there are .*'dense'"),
        ("dense:size=3", r"dense:size=3: dense has no \['size'\]; it has \[\]"),
        ("flex_prefill:gamma", "expected field=value, got 'gamma'"),
        ("flex_prefill:gamma=-1", "flex_prefill:gamma=-1: gamma"),
        ("missing.json", "missing.json: .*No such file"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)

"""Methods as written on a command line."""

import json

import pytest

from sparse_attn import Dense, FlexPrefill
from sparse_attn.evaluate.specs import defaults, parse
from sparse_attn.methods import METHODS
from sparse_attn.squeezed.context import Parameters


def test_names_and_options():
    assert parse("dense").settings.method == Dense()
    spec = parse("flex_prefill:gamma=0.9,max_budget=None,variant=official")
    assert spec.settings.method == FlexPrefill(gamma=0.9, max_budget=None, variant="official")
    assert (spec.family, spec.setting) == (
        "flex_prefill",
        "gamma=0.9,max_budget=None,variant=official",
    )
    assert parse("flex_prefill").setting == "defaults"
    assert [spec.label for spec in defaults()] == list(METHODS)


def test_a_context_has_parameters():
    spec = parse("squeezed:sparsity=0.7,coarse=0.01,shared=True")
    assert spec.context == Parameters(sparsity=0.7, coarse=0.01, shared=True)
    assert (spec.family, spec.setting) == ("squeezed", "sparsity=0.7,coarse=0.01,shared=True")
    assert parse("squeezed").context == Parameters() and parse("dense").context is None


def test_which_choose_in_decoding(tmp_path):
    names = [spec.label for spec in defaults() if spec.decodes]
    assert names == ["hip", "infinite_hip", "squeezed"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"method": "dense", "layers": {"1": {"method": "hip"}}}))
    assert parse(str(path)).decodes


def test_lists():
    """For each head, or for each stage."""
    found = parse("sale:threshold=(0.1,0.2),sink=64").settings.method
    assert found.threshold == (0.1, 0.2)
    assert parse("sale:threshold=[0.1, 0.2]").settings.method.threshold == (0.1, 0.2)
    found = parse("infinite_hip:keeps=(512,64),chunks=(64,8),q_strides=(4,1)").settings.method
    assert (found.keeps, found.chunks, found.q_strides) == ((512, 64), (64, 8), (4, 1))


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
        ("flex_prefil", r"there are .*; did you mean 'flex_prefill'\?"),
        ("squeezed:keep=0.1", r"squeezed has no \['keep'\]; it has \['clusters'"),
        ("flex_prefill:gama=0.9", r"it has .*; did you mean 'gamma'\?"),
        ("squeezed:sparsity=1", "squeezed:sparsity=1: sparsity: got 1, expected 0 to below 1"),
        ("dense:size=3", r"dense:size=3: dense has no \['size'\]; it has \[\]"),
        ("flex_prefill:gamma", "expected field=value, each field once, got 'gamma'"),
        ("flex_prefill:gamma=0.5,gamma=1", "each field once, got 'gamma=1'"),
        ("sale:threshold=(0.1,0.2", "each field once, got '0.2'"),
        ("sale:threshold=a/missing.file,layer=1", "a/missing.file"),
        ("flex_prefill:gamma=-1", "flex_prefill:gamma=-1: gamma"),
        ("missing.json", "missing.json: .*No such file"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)

"""Methods by layer in a file: what is written is what is read."""

import json

import pytest

from sparse_attn import Dense, FlexPrefill, settings
from sparse_attn.settings import Settings


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "mine.json"
    given = Settings(
        FlexPrefill(min_budget=64, gamma=0.9),
        {
            0: Dense(),
            2: FlexPrefill(min_budget=64, gamma=0.5),
            11: FlexPrefill(gamma=0.9),
            3: FlexPrefill(min_budget=64),
        },
    )
    settings.write(path, given, {"for": "readers"})
    assert settings.read(path) == given
    assert settings.read(str(path)).of(1) == given.method == given.of(None)
    found = json.loads(path.read_text())
    assert list(found["layers"]) == ["0", "2", "3", "11"]
    assert found["layers"]["0"] == {"method": "dense"}
    assert found["layers"]["2"] == {"gamma": 0.5, "min_budget": 64}
    assert found["options"] == {"gamma": 0.9, "min_budget": 64}
    assert found["measured"] == {"for": "readers"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected a JSON object with the name of a method"),
        ("{", "Expecting property name"),
        ('{"method": 3}', "expected a JSON object with the name of a method"),
        ('{"method": "flash"}', "no such method 'flash'"),
        ('{"method": "dense", "options": {"size": 1}}', r"dense has no \['size'\]"),
        ('{"method": "dense", "layers": {"x": {}}}', "layer x: expected a number and an object"),
        ('{"method": "dense", "layers": {"1": 3}}', "layer 1: expected a number and an object"),
        ('{"method": "dense", "layers": []}', r"layers: got \[\], expected an object"),
        ('{"method": "dense", "layers": null}', "layers: got None, expected an object"),
        ('{"method": "dense", "options": null}', "options: got None, expected an object"),
        ('{"method": "dense", "options": 3}', "options: got 3, expected an object"),
        ('{"method": "dense", "layers": {"²": {}}}', "layer ²: expected a number and an object"),
        ('{"method": "dense", "layers": {"01": {}}}', "layer 01: expected a number and an object"),
        ('{"method": "dense", "layers": {"1": {"method": []}}}', "layer 1: expected the name"),
        (b'{"method": "\xff"}', ".*can't decode byte 0xff"),
        pytest.param("[" * 100_000, ".*recursion", id="deep"),
        ('{"method": "dense", "layers": {"1": {"gamma": 3}}}', r"layer 1: dense has no \['gamma'"),
        (
            '{"method": "flex_prefill", "layers": {"1": {"gamma": -3}}}',
            "layer 1: gamma: got -3",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"bad.json: {message}"):
        settings.read(path)

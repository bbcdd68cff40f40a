"""`python -m sparse_attn calibrate`: the cheapest values that keep enough, as a file."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from sparse_attn import Dense, FlexPrefill, Sale, settings
from sparse_attn.__main__ import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
from sparse_attn.calibrate import search  # noqa: E402
from sparse_attn.integrations.transformers import register  # noqa: E402
from tests.evaluate.test_evaluate import prepare  # noqa: E402

VALUES = ("--values", 0.3, 0.6, 0.9, 0.99)
METHOD = "flex_prefill:min_budget=16,block_size=16,tau=0.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("calibrate"))


def calibrate(folder, *options):
    out = folder / "mine.json"
    main([
        "calibrate", "--model", str(folder / "model"), "--text", str(folder / "text.py"),
        "--length", "300", "--dtype", "float32", "--method", METHOD, "--out", str(out),
        *map(str, options),
    ])  # fmt: skip
    return out


def test_more_mass_costs_more(folder):
    computed = []
    for target in (0.5, 0.9):
        found = settings.read(calibrate(folder, *VALUES, "--mass", target))
        written = json.loads((folder / "mine.json").read_text())["measured"]
        assert written["target"] == {"mass": target} and written["tokens"] == 300
        assert set(found.layers) == {0, 1}
        for layer, config in found.layers.items():
            assert config == Dense() or config.gamma in (0.3, 0.6, 0.9, 0.99)
            assert written["layers"][str(layer)]["kept"] >= target
        computed.append(sum(layer["pairs"] for layer in written["layers"].values()))
    assert computed[0] < computed[1]


def test_the_file_is_a_method(folder):
    path = calibrate(folder, *VALUES, "--mass", 0.6)
    register(path, "calibrated", fallback=False)
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    model.set_attn_implementation("calibrated")
    ids = torch.randint(0, 256, (1, 100))
    with torch.no_grad():
        sparse = model(input_ids=ids).logits
        model.set_attn_implementation("sdpa")
        assert (sparse - model(input_ids=ids).logits).abs().max() > 1e-3


def test_a_loss_that_is_accepted(folder):
    calibrate(folder, *VALUES, "--loss", 0.5)
    generous = json.loads((folder / "mine.json").read_text())["measured"]["target"]
    assert 0 != generous["lost"] <= 0.5  # the method is forced: its dense path loses nothing
    calibrate(folder, "--values", 0.3, 1.0, "--loss", 1e-4)
    strict = json.loads((folder / "mine.json").read_text())["measured"]["target"]
    assert strict["lost"] <= 1e-4 and strict["mass"] >= generous["mass"]


def test_the_budget_of_stages(folder):
    """An option that is a tuple for all heads."""
    method = "infinite_hip:sink=0,window=16,q_block=16"
    found = settings.read(calibrate(folder, "--method", method, "--mass", 0.5))
    written = json.loads((folder / "mine.json").read_text())["measured"]["layers"]
    assert set(found.layers) == {0, 1}
    for layer, config in found.layers.items():
        assert config.keeps in search.SEARCHED["infinite_hip"][1] and config.window == 16
        assert written[str(layer)]["kept"] >= 0.5 and written[str(layer)]["pairs"] < 1


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("flex_prefill:min_budget=0,block_size=16", "gamma"),
        ("hip:sink=0,window=16,q_block=16,kv_block=4", "budget"),
        ("infinite_hip:sink=0,window=16,q_block=16", "keeps"),
        ("sale:q_block=16,kv_block=16,local=16,sink=0,min_length=0", "threshold"),
    ],
)
def test_a_value_for_each_head_of_every_method(folder, method, field):
    found = settings.read(calibrate(folder, "--method", method, "--mass", 0.9, "--heads"))
    written = json.loads((folder / "mine.json").read_text())["measured"]["layers"]
    assert all(layer["kept"] >= 0.9 for layer in written.values())
    assert [len(getattr(config, field)) for config in found.layers.values()] == [4, 4]
    register(folder / "mine.json", fallback=False)
    ids = torch.randint(0, 256, (1, 200))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    model.set_attn_implementation("sparse_attn")
    assert model(input_ids=ids).logits.isfinite().all()


def trials():
    """Two heads; the first needs 3, the second is content with 2."""
    made = search.Trials(PerHead(), "size", (1, 2, 3))
    made.layers[0] = [
        search.Trial(1, [0.5, 0.7], [0.1, 0.1]),
        search.Trial(2, [0.8, 0.95], [0.2, 0.2]),
        search.Trial(3, [0.92, 0.97], [0.4, 0.4]),
    ]
    return made


@dataclass(frozen=True)
class PerHead:
    """A method whose option takes a list of one number for each head."""

    size: float | tuple[float, ...] = 1
    name: ClassVar[str] = "per_head"


@dataclass(frozen=True)
class Bounded(FlexPrefill):
    """A method whose kernels have no room for a large `gamma`."""

    def select(self, *args, **options):
        if self.gamma > 0.6:
            raise NotImplementedError("gamma: served up to 0.6")
        return super().select(*args, **options)


def test_values_that_are_refused_are_left_out(folder, monkeypatch, capsys):
    from sparse_attn.methods import METHODS

    monkeypatch.setitem(METHODS, "flex_prefill", Bounded)
    found = settings.read(calibrate(folder, *VALUES, "--mass", 0.1))
    assert {config.gamma for config in found.layers.values()} <= {0.3, 0.6}
    said = capsys.readouterr().out
    for value in (0.9, 0.99):
        why = f"left out, since it is not served: gamma={value}: gamma: served up to 0.6"
        assert said.count(why) == 1
    with pytest.raises(SystemExit, match="^--values: none is served: gamma: served up to 0.6"):
        calibrate(folder, "--values", 0.8, 0.9)


def test_the_cheapest_by_layer_and_by_head():
    tried = trials()
    assert search.assemble(tried, 0.6).layers == {0: PerHead(1)}
    assert search.assemble(tried, 0.87).layers == {0: PerHead(2)}
    assert search.assemble(tried, 0.96).layers == {0: Dense()}
    assert search.assemble(tried, 0.9, heads=True).layers == {0: PerHead((3, 2))}
    assert search.assemble(tried, 0.96, heads=True).layers == {0: Dense()}
    found = search.assemble(tried, 0.9, heads=True)
    assert search.report(tried, found) == {"0": {"kept": 0.935, "pairs": 0.3}}


def test_a_list_for_each_head_survives_the_file(tmp_path, monkeypatch):
    from sparse_attn.methods import METHODS

    monkeypatch.setitem(METHODS, "per_head", PerHead)
    given = search.assemble(trials(), 0.9, heads=True)
    settings.write(tmp_path / "heads.json", given)
    assert json.loads((tmp_path / "heads.json").read_text())["layers"] == {"0": {"size": [3, 2]}}
    assert settings.read(tmp_path / "heads.json") == given


@pytest.mark.parametrize(
    ("config", "field", "dense"), [(Sale(), "threshold", 0.0), (FlexPrefill(), "gamma", 1.0)]
)
def test_a_head_that_no_value_satisfies_is_dense(config, field, dense):
    """It keeps everything, and the report of what is kept says so."""
    tried = search.Trials(config, field, (0.9, 0.5))
    tried.layers[0] = [
        search.Trial(0.9, [0.5, 0.97], [0.1, 0.1]),
        search.Trial(0.5, [0.8, 0.98], [0.2, 0.2]),
    ]
    found = search.assemble(tried, 0.96, heads=True)
    assert found.layers == {0: replace(config, **{field: (dense, 0.9)})}
    assert search.report(tried, found) == {"0": {"kept": 0.985, "pairs": 0.55}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "flash"), "--method: flash: no such method"),
        (("--method", "dense"), "--field and --values: what to search in dense is not .*hip"),
        (("--field", "size", "--values", 1), r"--field: flex_prefill has no 'size'; it has \['b"),
        (("--field", "tau"), "--field and --values: what to search"),
        (("--values", -1), "--values: gamma"),
        (
            ("--heads", "--field", "tau", "--values", 1),
            "--values with --heads: tau: got .*a number",
        ),
        (("--mass", 1.5), "--mass: got 1.5, expected a number above 0, 1 at most"),
        (("--loss", 0), "--loss: got 0.0, expected a number above 0"),
        (("--length", 0), "--length: got 0, expected 2 or more"),
        (("--length", 1, "--loss", 1), "--length: got 1, expected 2 or more"),
        (("--out", "no/x.json"), "--out: got no/x.json, expected a file in a folder that exists"),
        (("--out", "."), "--out: got ., expected a file in a folder that exists"),
        (("--length", 10_000_000), "--length or --text: text: "),
    ],
)
def test_bad_arguments(folder, options, message):
    with pytest.raises(SystemExit, match=f"^{message}"):
        calibrate(folder, *options)


def test_the_table_names_real_options():
    """Of all methods that have an option to search."""
    from sparse_attn.methods import METHODS

    for name, (field, values) in search.SEARCHED.items():
        for value in values:
            METHODS[name](**{field: value})
    others = set(METHODS) - set(search.SEARCHED)
    assert others == {"dense", "squeezed"}  # as docs/calibrate.md says
    assert FlexPrefill().gamma in search.SEARCHED["flex_prefill"][1]

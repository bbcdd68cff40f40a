"""`python -m sparse_attn evaluate` on a small random model: results, going on, the report."""

import base64
import io
import json
import shutil
import subprocess
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest
import torch

from sparse_attn.__main__ import main

transformers = pytest.importorskip("transformers")
matplotlib_image = pytest.importorskip("matplotlib.image")
for module in ("tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(module)
from sparse_attn.evaluate import measure  # noqa: E402
from sparse_attn.evaluate.look import Look  # noqa: E402
from sparse_attn.evaluate.measure import Evaluation  # noqa: E402
from sparse_attn.evaluate.report import methods, report  # noqa: E402
from sparse_attn.evaluate.specs import parse  # noqa: E402
from sparse_attn.probe import Probe, register_probe  # noqa: E402

LINE = "def area_of_a_circle(radius):\n    return 3.14159 * radius**2\n\n\n"
SMALL = "flex_prefill:gamma=0.5,min_budget=32,block_size=32"
LARGE = "flex_prefill:gamma=0.9,min_budget=32,block_size=32"
BEHIND = "squeezed:sparsity=0.6,window=16,iterations=2"
BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")
VOID = {"meta", "img", "br", "wbr"}


def build(folder, vocabulary=256):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        initializer_range=0.4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def evaluate(folder, *options):
    """The results of a run with few samples on the model and text in the folder."""
    main([
        "evaluate", "--model", str(folder / "model"), "--out", str(folder / "out"),
        "--text", str(folder / "text.py"), "--dtype", "float32", "--depths", "2",
        "--samples", "1", "--repeats", "1", *map(str, options),
    ])  # fmt: skip
    return json.loads((folder / "out" / "results.json").read_text())


def prepare(folder):
    build(folder / "model")
    (folder / "text.py").write_text(LINE * 40)
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "DECODED", 6)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where dense and two settings of FlexPrefill were evaluated at two lengths."""
    made = prepare(tmp_path_factory.mktemp("evaluate"))
    evaluate(made, "--lengths", 400, 520, "--methods", "dense", SMALL, LARGE)
    return made


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture
def no_report(monkeypatch):
    """Saves its pictures where the report is not what is tested."""
    monkeypatch.setattr("sparse_attn.evaluate.measure.write_report", lambda *args: "no report")
    monkeypatch.setattr(Look, "draw", lambda *args: [])


def test_results(results):
    assert list(results["cells"]) == ["400", "520"]
    for cells in results["cells"].values():
        assert list(cells) == ["sdpa", "dense", SMALL, LARGE]
        base, dense = cells["sdpa"], cells["dense"]
        assert dense["bits"] == pytest.approx(base["bits"], abs=1e-4)
        for cell in cells.values():
            assert set(cell["needles"]) == {"0.000", "1.000"}
            shares = [*cell["needles"].values(), cell["copying"], cell["multi_value"]]
            shares += [cell["multi_key"], cell["variable_tracking"]]
            assert all(0 <= share <= 1 for share in shares)
            assert cell["prefill"] >= cell["attention"] > 0
            assert cell["peak_bytes"] is None or cell["peak_bytes"] >= 0
        for layer in dense["layers"]:
            assert layer["density"] == 1 and layer["error"] == 0
            assert layer["recall"] == pytest.approx([1] * 4)
        small, large = (cells[label]["layers"] for label in (SMALL, LARGE))
        for fewer, more in zip(small, large, strict=True):
            assert 0.1 < fewer["density"] <= more["density"] <= 1
            assert 0.05 < sum(fewer["recall"]) / 4 <= sum(more["recall"]) / 4 + 1e-6
            assert fewer["error"] > 1e-3
        assert abs(cells[SMALL]["bits"] - base["bits"]) > 1e-4  # it is forced all the same
        assert "dense is faster below" in cells[SMALL]["fallback"]
        for cell in cells.values():  # none of these chooses in decoding
            assert cell["decode"] >= cell["decode_attention"] > 0
        assert base["decode_bits"] > 0 and dense["decode_bits"] is None


def test_behind_a_prepared_context(tmp_path, no_report):
    """The tail of a prompt over its beginning, and single tokens over all before them."""
    prepare(tmp_path)
    everything = BEHIND.replace("0.6", "0")
    found = evaluate(tmp_path, "--lengths", 400, "--methods", BEHIND, everything, "hip:budget=32")
    base, sparse, whole, hip = found["cells"]["400"].values()
    assert found["methods"][BEHIND]["config"].startswith("Parameters(clusters=0.05")
    assert (sparse["context"], sparse["tail"]) == (199, 201) and sparse["build"] > 0
    assert whole["bits"] == pytest.approx(base["bits"], abs=1e-4)
    assert whole["needles"] == base["needles"] and whole["copying"] == base["copying"]
    assert whole["decode_bits"] == pytest.approx(base["decode_bits"], abs=1e-4)
    assert whole["kept"] == whole["decode_kept"] == [1, 1]
    assert abs(sparse["bits"] - base["bits"]) > 1e-4
    for cell in (sparse, hip):
        assert abs(cell["decode_bits"] - base["decode_bits"]) > 1e-4
    n, m, window = 201, 199, 16  # pairs of the tail: what is kept, the window, itself
    for layer, kept in zip(sparse["layers"], sparse["kept"], strict=True):
        pairs = (n * (kept * (m - window) + window) + n * (n + 1) / 2) / (n * m + n * (n + 1) / 2)
        assert sum(layer["pairs"]) / 4 == pytest.approx(pairs, abs=0.02)
        assert layer["density"] == pytest.approx(pairs, abs=0.1)  # of blocks of 128 queries
        assert len(layer["recall"]) == 4 and 0 < min(layer["recall"]) < 1 and layer["error"] > 1e-3
    assert sparse["baseline"]["prefill"] > 0 < sparse["prefill"]
    assert all(layer["error"] < 1e-5 and layer["density"] == 1 for layer in whole["layers"])
    assert "baseline" not in hip and hip["decode"] > 0


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, no_report):
    """Each piece is measured once, whatever stops the run, and a new method only adds its own."""
    prepare(tmp_path)
    done = []

    def stop_after_three(name, method):
        def step(self, *args):
            if len(done) == 3:
                raise KeyboardInterrupt
            method(self, *args)
            done.append((name, *(str(getattr(a, "label", a)) for a in args[:2])))

        return step

    for name in ("tasks", "look", "time", "decode"):
        step = stop_after_three(name, getattr(Evaluation, name))
        monkeypatch.setattr(Evaluation, name, step)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, "--lengths", 400, "--methods", "dense")
    want = [("tasks", "400", "sdpa"), ("tasks", "400", "dense"), ("look", "400", "dense")]
    assert done == want
    done.append(None)  # no more stops
    evaluate(tmp_path, "--lengths", 400, "--methods", "dense")
    assert done[4:] == [("time", "400"), ("decode", "400")]
    evaluate(tmp_path, "--lengths", 400, "--methods", "dense", SMALL)
    new = [("tasks", "400", SMALL), ("look", "400", SMALL), ("time", "400"), ("decode", "400")]
    assert done[6:] == new
    found = evaluate(tmp_path, "--lengths", 400, "--methods", "dense", SMALL)
    assert len(done) == 10 and list(found["cells"]["400"]) == ["sdpa", "dense", SMALL]
    with pytest.raises(SystemExit, match="results with another samples; give another folder"):
        evaluate(tmp_path, "--samples", 2)
    later = evaluate(tmp_path, "--lengths", 400, "--methods", LARGE)["cells"]["400"]
    for label, run in (("dense", found["cells"]["400"]), (LARGE, later)):  # each with its own sdpa
        want = {what: run["sdpa"][what] for what in ("prefill", "attention", "decode")}
        assert later[label]["same_run"] == want
    assert later["sdpa"]["prefill"] != found["cells"]["400"]["sdpa"]["prefill"]


def write_settings(path, **found):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"method": "flex_prefill", **found}))
    return path


def test_results_of_other_settings_are_not_taken(tmp_path, monkeypatch, no_report):
    """A file of the same name with another method, or other layers, is another method."""
    prepare(tmp_path)
    path = write_settings(tmp_path / "m.json", layers={"1": {"gamma": 0.5, "min_budget": 32}})
    cell = {"bits": 1.0, "needles": {"0.000": 1.0}, "attention": 1.0, "prefill": 1.0, "layers": []}
    with monkeypatch.context() as patch:  # what is measured does not matter
        patch.setattr(Evaluation, "tasks", lambda self, *at: self.cell(*at).update(cell))
        patch.setattr(Evaluation, "look", lambda *args: None)
        patch.setattr(Evaluation, "time", lambda *args: None)
        patch.setattr(Evaluation, "decode", lambda *args: None)
        found = evaluate(tmp_path, "--lengths", 300, "--methods", path)
    page = methods(found)
    assert "layer 1: FlexPrefill(gamma=0.5" in page and found["settings"]["machine"] in page
    assert "gamma=0.5" in found["methods"]["m.json"]["layers"]["1"]
    for other in ({"method": "dense"}, {"layers": {"1": {"gamma": 0.6, "min_budget": 32}}}):
        write_settings(path, **other)
        with pytest.raises(SystemExit, match="results with another m.json; give another folder"):
            evaluate(tmp_path, "--lengths", 300, "--methods", path)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    with monkeypatch.context() as patch:
        patch.setattr("sparse_attn.evaluate.measure.machine", lambda device: "an abacus")
        with pytest.raises(SystemExit, match="results with another machine"):
            evaluate(tmp_path, "--lengths", 300, "--methods", "dense")
    (tmp_path / "text.py").write_text(LINE * 41)
    with pytest.raises(SystemExit, match="results with another text"):
        evaluate(tmp_path, "--lengths", 300, "--methods", "dense")
    (tmp_path / "text.py").write_text(LINE * 40)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    model.model.layers[1].mlp.up_proj.weight.data[5, 7] += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="results with another weights"):
        evaluate(tmp_path, "--lengths", 300, "--methods", "dense")


def test_two_methods_of_one_name(tmp_path):
    paths = [write_settings(tmp_path / folder / "m.json") for folder in "ab"]
    with pytest.raises(SystemExit, match=r"^--methods: m.json is given twice; files need names"):
        evaluate(tmp_path, "--methods", *paths)


def test_layers_that_the_model_lacks(tmp_path):
    prepare(tmp_path)
    path = write_settings(tmp_path / "m.json", layers={"2": {"gamma": 0.5}})
    with pytest.raises(SystemExit, match="m.json has layer 2, the model the layers 0 to 1"):
        evaluate(tmp_path, "--lengths", 300, "--methods", path)
    register_probe(Probe(*parse(str(path)).settings), "probe_of_layers")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    model.set_attn_implementation("probe_of_layers")
    with pytest.raises(ValueError, match="given for layer 2, but the model has the layers 0 to 1"):
        model(input_ids=torch.zeros(1, 40, dtype=torch.long))


def test_an_error_in_a_method_is_not_hidden(monkeypatch):
    """One that cannot choose is measured without its choice; one that fails is not."""
    from sparse_attn import Dense, FlexPrefill, api

    given = (*torch.randn(3, 1, 2, 64, 32), 0, True, None)
    attend = api.attention  # which computes without this choice
    monkeypatch.setattr(api, "attention", lambda q, k, v, _, **kw: attend(q, k, v, Dense(), **kw))

    def fails(error):
        def select(*args, **kwargs):
            raise error

        monkeypatch.setattr(FlexPrefill, "select", select)
        look = Look("one", parse("flex_prefill").settings, None)
        look(*given)
        return look.layers[0]["recall"]

    assert fails(NotImplementedError("no lists")) is None
    for error in (AttributeError("a typing error"), TypeError("another")):
        with pytest.raises(type(error), match=str(error)):
            fails(error)
    monkeypatch.delattr(FlexPrefill, "select")
    look = Look("one", parse("flex_prefill").settings, None)
    look(*given)
    assert look.layers[0]["recall"] is None and look.layers[0]["density"] == 1


class Page(HTMLParser):
    """Checks that tags are closed in order and collects what a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.rows, self.ids, self.links = [], [], [], set(), []
        self.tables = []  # rows with cells in each
        self.feed(text)
        assert not self.open
        assert text.startswith("<!DOCTYPE html>") and "url(" not in text and "@import" not in text

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            assert given["alt"]
            self.images.append(given["src"])
            assert given["src"].startswith("data:image/")
        if tag == "table":
            self.tables.append(0)
        if tag == "a":
            self.links.append(given["href"])
        if tag == "tr":
            self.rows.append([])
            self.tables[-1] += 1
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if "id" in given:
            self.ids.add(given["id"])
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") or name == "srcset" for name in given)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_report_has_everything_in_it(folder, results):
    page = Page((folder / "out" / "report.html").read_text())
    assert len(page.tables) == 5 and min(page.tables) >= 2  # a head and what is below it
    assert page.links and {link[1:] for link in page.links} == page.ids
    kinds = []
    for source in page.images:
        kind, _, data = source.partition(";base64,")
        content = base64.b64decode(data)
        if kind == "data:image/svg+xml":
            drawing = xml.etree.ElementTree.fromstring(content)
            assert float(drawing.get("width").removesuffix("pt")) > 100
            for part in drawing.iter():  # nothing is fetched
                links = [v for k, v in part.items() if k.endswith("href")]
                assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
            assert "http://" not in "".join(drawing.itertext())
        else:
            assert kind == "data:image/png"
            pixels = matplotlib_image.imread(io.BytesIO(content), format="png")
            assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.01
        kinds.append(kind)
    assert kinds.count("data:image/png") == 4  # heads and layers of two methods
    assert kinds.count("data:image/svg+xml") == 8  # 2 trade-offs, needles, 2 times, layers, heads
    head, *rows = page.rows
    summary = {row[0]: dict(zip(head, row, strict=True)) for row in rows[:4]}
    assert list(summary) == ["sdpa", "dense", SMALL, LARGE]
    cell = results["cells"]["520"][SMALL]
    assert summary[SMALL]["bits/token"] == f"{cell['bits']:.4f}"
    assert summary["dense"]["density"] == "100.0%"
    assert summary["dense"]["within limits"] in ("yes", "bits only")  # it may find no needle


def test_the_report_of_a_stopped_run(folder, results):
    """Of the lengths that are complete, whatever longer one was begun."""
    cells = results["cells"] | {"900": {"sdpa": {"bits": 2.0}}}
    page = report(results | {"cells": cells}, folder / "out")
    assert "At 520 tokens" in page and "900" not in "".join(map(str, Page(page).rows))


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no headless browser")
def test_a_browser_shows_the_report(folder, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    page = (folder / "out" / "report.html").read_text()
    script = """<script>onload = () => { document.title = [
        document.images.length, [...document.images].filter(i => i.naturalWidth > 0).length,
        document.documentElement.scrollWidth <= innerWidth ].join(" ") }</script>"""
    (tmp_path / "page.html").write_text(page.replace("</head>", f"{script}</head>"))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800",
         "--virtual-time-budget=5000", "--dump-dom", str(tmp_path / "page.html")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "<title>12 12 true</title>" in done.stdout


def test_a_method_that_refuses_is_named(tmp_path, monkeypatch):
    from sparse_attn import FlexPrefill

    prepare(tmp_path)
    monkeypatch.setattr(FlexPrefill, "why_not", lambda *args: "not <today>; use 'dense'")
    found = evaluate(tmp_path, "--lengths", 400, "--methods", "flex_prefill", "dense")
    assert "not <today>" in found["cells"]["400"]["flex_prefill"]["refused"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "flex_prefill was not measured" in page and "not &lt;today&gt;" in page
    assert [row[0] for row in Page(page).rows[1:3]] == ["sdpa", "dense"]


def test_a_model_with_a_tokenizer(tmp_path, no_report):
    tokenizers = pytest.importorskip("tokenizers")
    prepare(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    words.train_from_iterator([LINE], trainer)
    shutil.rmtree(tmp_path / "model")
    build(tmp_path / "model", words.get_vocab_size())
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(
        tmp_path / "model"
    )
    found = evaluate(tmp_path, "--lengths", 300, "--methods", SMALL)
    assert list(found["cells"]["300"]) == ["sdpa", SMALL]
    assert found["cells"]["300"]["sdpa"]["bits"] > 0


def test_layers_that_use_no_method(tmp_path):
    """Those with a sliding window: the others keep their numbers. A context cannot have them."""
    prepare(tmp_path)
    config = transformers.Qwen2Config(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=64, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"], initializer_range=0.4,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    found = evaluate(tmp_path, "--lengths", 400, "--methods", SMALL, "squeezed")
    assert "a sliding window" in found["cells"]["400"]["squeezed"]["refused"]
    sliding, full = found["cells"]["400"][SMALL]["layers"]
    assert sliding is None and 0 < full["density"] < 1
    page = Page((tmp_path / "out" / "report.html").read_text())
    rows = [row for row in page.rows if row[:2] in ([SMALL, "0"], [SMALL, "1"])]
    assert rows[0][2:] == ["sliding window", "–", "–", "–"]
    assert rows[1][2] == f"{full['density']:.1%}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "flash"), "--methods: flash: no such method"),
        (("--lengths", 100), "--lengths or --text: length: 100 tokens are too few"),
        (("--lengths", 100_000), "--lengths or --text: text: .* too few"),
        (("--text", "missing"), "--text: .*missing"),
        (("--model", "./missing"), "--model: there is no ./missing"),
        (("--layer", 2), "--layer: got 2, the model has the layers 0 to 1"),
        (("--repeats", 0), "--repeats: got 0, expected at least 1"),
    ],
)
def test_bad_arguments(folder, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"^{message}"):
        evaluate(folder, "--out", tmp_path / "new", *options)

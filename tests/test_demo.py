"""`python -m sparse_attn demo` on short prompts."""

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

from sparse_attn.__main__ import main
from sparse_attn.methods import METHODS
from sparse_attn.methods.dense import Dense

for module in ("transformers", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(module)
LINE = "def area_of_a_circle(radius):\n    return 3.14159 * radius**2\n\n\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text(LINE * 40)  # 2,520 bytes
    return path


def demo(*options):
    main(["demo", "--repeats", "1", *map(str, options)])


def table(printed):
    """The cells of the rows, by (bytes, method), and the notes below."""
    lines = printed.splitlines()
    head = next(i for i, line in enumerate(lines) if "bits/byte" in line)
    end = lines.index("", head)
    rows = [line.replace(" s ", " ").replace(" *", "*").split() for line in lines[head + 1 : end]]
    return {(row[0], row[1]): row[2:] for row in rows}, "\n".join(lines[end:])


@pytest.mark.parametrize("command", ["demo", "evaluate", "calibrate"])
def test_help_shows_every_default(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    found = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    options = re.split(r" (?=--[a-z]+ [A-Z{])", found)[1:]
    assert len(options) >= 6
    for option in options:
        no_default = option.startswith(("--method METHOD ", "--field", "--loss"))
        assert "(default: " in option or (no_default and command == "calibrate"), option


def test_table_and_picture(text, tmp_path, capsys):
    from matplotlib.image import imread

    out = tmp_path / "new" / "folder"
    demo("--text", text, "--out", out, "--lengths", 1024, 512, "--method", "dense", "flex_prefill")
    rows, notes = table(capsys.readouterr().out)
    methods = ("sdpa", "dense", "flex_prefill*")
    assert list(rows) == [(length, method) for length in ("512", "1,024") for method in methods]
    for length in ("512", "1,024"):
        baseline = rows[length, "sdpa"]
        for method in methods[1:]:
            prefill, ratio, seconds, gain, density, bits, needles = rows[length, method]
            assert float(prefill) >= float(seconds) > 0
            assert float(ratio[:-1]) > 0 and float(gain[:-1]) > 0
            assert density == "100.0%"
            assert abs(float(bits) - float(baseline[5])) < 0.02 and float(bits) < 3
            assert 0 <= float(needles[:-1]) <= 100
    assert "* dense is faster below" in notes and "keys (1024 given)" in notes
    assert [p.name for p in out.iterdir()] == ["flex_prefill.png"]
    height, width, _ = imread(out / "flex_prefill.png").shape
    assert 600 < height < 2000 and 1000 < width < 2000


def test_one_method_that_is_not_dense(text, tmp_path, capsys, monkeypatch):
    """Where the method runs, its density is below 1 and the table says so."""
    monkeypatch.setattr("sparse_attn.crossover.MEASURED", {})
    text.write_text(LINE * 80)
    demo("--text", text, "--out", tmp_path, "--lengths", 4096, "--method", "flex_prefill")
    rows, notes = table(capsys.readouterr().out)
    assert list(rows) == [("4,096", "sdpa"), ("4,096", "flex_prefill")]
    assert 10 < float(rows["4,096", "flex_prefill"][4][:-1]) < 95
    assert "*" not in notes


def test_long_runs_are_not_repeated_and_too_long_ones_left_out(text, tmp_path, capsys, monkeypatch):
    from sparse_attn.demo import measure

    runs, forward = [], measure.forward
    monkeypatch.setattr(measure, "forward", lambda *args: runs.append(args[1]) or forward(*args))
    monkeypatch.setattr(measure, "LENGTHS", (512, 1024))
    monkeypatch.setattr(measure, "VERY_LONG", 0.0)
    options = ("--text", text, "--out", tmp_path, "--method", "dense", "--repeats", 3)
    demo(*options, "--lengths", 512)
    assert runs == ["sdpa", "dense"]
    rows, _ = table(capsys.readouterr().out)
    assert all(float(row[0]) >= float(row[2]) > 0 for row in rows.values())
    monkeypatch.setattr(measure, "VERY_LONG", 60.0)
    demo(*options, "--lengths", 512)
    assert runs[2:] == ["sdpa", "dense"] * 4
    monkeypatch.setattr(measure, "TOO_LONG", 0.0)
    capsys.readouterr()
    demo(*options)
    rows, notes = table(capsys.readouterr().out)
    assert {length for length, _ in rows} == {"512"}
    assert re.search(r"1,024 bytes and more were left out, .*: --lengths 1024 measures", notes)
    demo(*options, "--lengths", 512, 1024)
    rows, notes = table(capsys.readouterr().out)
    assert {length for length, _ in rows} == {"512", "1,024"} and "left out" not in notes


@dataclass(frozen=True)
class SinkAndWindow:
    """A method that lists no block."""

    name: ClassVar[str] = "sink_and_window"

    def why_not(self, query, key, causal):
        return None

    def selector(self, query, key, causal, scale):
        return None

    def select(self, query, key, *, causal=True, scale=None, backend=None):
        return Dense().select(query, key)._replace(sink=16, window=64)


def test_a_new_method_appears_by_itself(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "sink_and_window", SinkAndWindow)
    demo("--text", text, "--out", tmp_path, "--lengths", 512)
    rows, notes = table(capsys.readouterr().out)
    alone = {n for n, method in METHODS.items() if not getattr(method, "needs_context", False)}
    assert {name.rstrip("*") for _, name in rows} == {"sdpa", *alone}
    assert rows["512", "sink_and_window"][5] != rows["512", "dense"][5]
    assert (tmp_path / "flex_prefill.png").exists()
    assert (tmp_path / "sink_and_window.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "missing.py"), "--text: .*missing.py"),
        (("--text", "."), "--text: .*directory"),
        (("--lengths", "4096"), "--text: 2520 bytes are too few for a prompt of 4096"),
        (("--lengths", "100"), "--lengths: got 100, expected at least 512"),
        (("--lengths", "512", "-5"), "--lengths: got -5, expected at least 512"),
        (
            ("--method", "flash"),
            r"--method: no such method \['flash'\]; there are .*'flex_prefill'",
        ),
        (("--repeats", "0"), "--repeats: got 0, expected at least 1"),
        (("--model", "nowhere"), "no model in nowhere: .*--model"),
    ],
)
def test_bad_arguments(text, tmp_path, monkeypatch, capsys, options, message):
    """One line, and nothing was measured before it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^{message}") as error:
        demo("--text", text, "--lengths", 512, *options)
    assert "\n" not in error.value.code
    assert capsys.readouterr().out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["text.py"]


def test_the_folder_for_the_picture_is_a_file(text):
    with pytest.raises(SystemExit, match="^--out: .*text.py"):
        demo("--text", text, "--out", text, "--lengths", 512)


def test_the_process_fails_with_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sparse_attn", "demo", "--text", "missing.py", "--out", tmp_path],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("--text: ") and done.stderr.count("\n") == 1

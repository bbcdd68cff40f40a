"""The script for a GPU, run without one: each part at tiny sizes, and what becomes of bad parts."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench import gpu_check
from bench.gpu import machine, page
from bench.gpu.baselines import checked
from bench.gpu.cases import random_index, rows_error
from bench.gpu.context import Context
from sparse_attn.block_index import BlockIndex
from sparse_attn.ops.block_sparse_attention import op
from tests.cases import Shape, inputs

ROOT = Path(__file__).parents[1]


def run(*words, **env):
    return subprocess.run(
        [sys.executable, "bench/gpu_check.py", *words], cwd=ROOT, env=os.environ | env,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_every_part_runs_dry(tmp_path):
    parts = set(gpu_check.PARTS) - {"tests", "first_call"}  # they start Python anew
    found = run("--dry-run", "--only", ",".join(parts), OUT=str(tmp_path))
    assert found.returncode == 0, found.stderr[-3000:]
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: p["status"] for name, p in result["parts"].items()} == dict.fromkeys(
        parts, "done"
    ), found.stdout
    assert not [row for row in result["rows"] if "FAILED" in row.get("note", "")]
    measured = {row["part"] for row in result["rows"] if row.get("value", 0) > 0}
    assert measured == parts - {"build", "memcheck", "racecheck"}
    for row in result["rows"]:
        assert row["what"] in found.stdout
        assert gpu_check.met(row) in ("", "yes", "NO")
    with pytest.raises(SystemExit, match="no GPU"):
        page.measured(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    found = run()
    assert found.returncode != 0 and found.stdout == ""
    assert found.stderr.startswith("no CUDA device") and found.stderr.count("\n") == 1


def test_unknown_parts_are_named():
    assert "no such part ['densely']" in run("--only", "densely,dense").stderr


def test_bad_parts_are_survived():
    start = time.monotonic()
    killed = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    assert gpu_check.in_a_process(killed, (), 20) == "failed, exit status -9"
    assert gpu_check.in_a_process(time.sleep, (60,), 1) == "ended after 1 s"
    assert gpu_check.in_a_process(time.sleep, (0,), 20) == "done"
    assert time.monotonic() - start < 20


BUILD_FIRST = """
import sys
from bench import gpu_check

def part(target, args, seconds):
    print("part", args[0], "sparse_attn" in sys.modules)
    return "done"

gpu_check.in_a_process = part
print("part", gpu_check.run_all(["machine", "build"], True)["cuda_kernels"])
"""


def test_what_was_built_is_imported_after_it():
    found = subprocess.run(
        [sys.executable, "-c", BUILD_FIRST], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    *parts, kernels = [line for line in found.splitlines() if line.startswith("part")]
    assert parts == ["part build False", "part machine True"]
    assert kernels.startswith(("part extension", "part NVRTC", "part none: CUDA extension"))


def test_what_fails_is_reported_and_left_out(tmp_path):
    query, key, value = inputs(Shape(Tq=100, Tk=100))
    context = Context("x", tmp_path / "rows", 60, dry=True)

    def broken():
        raise RuntimeError("no kernel image")

    exact = lambda: op.default(query, key, value, *BlockIndex.full(100, 100).blocks)[0]  # noqa: E731
    alternatives = {"good": exact, "broken": broken, "wrong": lambda: exact() * 1.1}
    assert set(checked(context, alternatives, query, key, value)) == {"good"}
    notes = [json.loads(line) for line in context.file.read_text().splitlines()]
    assert [n["what"] for n in notes] == ["broken", "wrong"]
    assert notes[0]["note"] == "FAILED: RuntimeError: no kernel image"
    assert "relative error 0.1" in notes[1]["note"]


@pytest.mark.parametrize("status, last", [
    (1, "3 failed, 3 passed, 3 skipped, 3 errors in 2s"), (2, "no such option"),
    (None, ".."), (0, "5 passed in 1s"),
])  # fmt: skip
def test_failing_suites_fail_the_part(tmp_path, monkeypatch, status, last):
    monkeypatch.setattr(machine, "command", lambda *args: (status, f"...\n{last}\n"))
    context = Context("tests", tmp_path / "rows", 60, dry=True)
    context.file.touch()
    with pytest.raises(RuntimeError) if status != 0 else nullcontext():
        machine.tests(context)
    rows = [json.loads(line) for line in context.file.read_text().splitlines()]
    counts = [(r["value"], r["failed"], r["error"], r["skipped"]) for r in rows]
    assert counts == {1: [(3, 3, 3, 3)], 0: [(5, 0, 0, 0)]}.get(status, [])


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "hypothesis" else name)
    context = Context("tests", tmp_path / "rows", 60, dry=True)
    machine.tests(context)
    assert json.loads(context.file.read_text())["note"] == "skipped: no hypothesis"


def test_no_part_takes_the_time_of_another():
    assert sum(seconds for _, seconds in gpu_check.PARTS.values()) <= gpu_check.TOTAL < 480
    assert list(gpu_check.PARTS)[:4] == ["build", "machine", "check", "tests"]


def test_the_sanitizer_watches_every_own_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}")
    context = Context("racecheck", tmp_path / "rows", 60, dry=True)
    machine.racecheck(context)
    words = json.loads(context.file.read_text())["note"]
    assert "--tool racecheck" in words and words.endswith(" -m bench.gpu.check")
    for name in ("merge_attention_states", "key_gradient", "block_mean", "probe_join", "list"):
        assert f"--kernel-name kernel_substring={name}_kernel " in words


def test_the_sampled_check_sees_a_wrong_block():
    query, key, value = inputs(Shape(Tq=300, Tk=300, Hq=4, Hkv=2))
    index, share = random_index(300, 4, 0.6, "cpu", 64)
    assert 0.2 < share <= 1
    out, _ = op(query, key, value, *index.blocks, True, 5, 40)
    assert rows_error(query, key, value, out, index, 5, 40) < 1e-5
    assert rows_error(query, key, value, out, index, 5, 0) > 1e-2
    assert rows_error(query, key, value, out) > 1e-2
    assert rows_error(query, key, value, out * float("nan"), index, 5, 40) == float("inf")
    assert rows_error(query, key, value, op(query, key, value, *index.blocks)[0], index) < 1e-5


def test_goals():
    row = {"value": 0.9, "goal": ">= 0.9"}
    assert gpu_check.met(row) == "yes" and gpu_check.met(row | {"goal": "> 0.9"}) == "NO"
    assert gpu_check.met(row | {"goal": "<= 0.8"}) == "NO" and gpu_check.met({"value": 1}) == ""


def test_the_page_is_made_from_the_results(tmp_path):
    """docs/gpu.md is what the results say; this fails when one changes without the other."""
    assert (ROOT / "docs" / "gpu.md").read_text() == page.text()
    result = {
        "device": {"gpu": "GPU X", "arch": "sm_90", "driver": "1.2", "torch": "2.11",
                   "triton": "3.6", "cuda": "13.0", "date": "2026-01-02"},
        "cuda_kernels": "NVRTC",
        "parts": {"dense": {"status": "done", "seconds": 3.0}},
        "rows": [{"part": "dense", "what": "own", "value": 0.5, "unit": "x", "goal": ">= 0.9"},
                 {"part": "dense", "what": "flex", "note": "FAILED: no"}],
    }  # fmt: skip
    text = page.measured(result)
    assert "GPU X" in text and "2026-01-02" in text and "CUDA kernels: NVRTC." in text
    assert "| own | 0.5 x | >= 0.9 | NO |" in text
    assert "FAILED: no" in text

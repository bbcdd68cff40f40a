"""Every kernel compiles for GPUs that are not here, within their registers and shared memory."""

import json
import os
import subprocess
import sys

import pytest

from bench.aot import SHARED_LIMIT, SPILL_LIMIT, Row, cases, merged, over_limits
from bench.gpu.page import RESULTS
from bench.gpu.page import compiled as compiled_table


@pytest.fixture(scope="module")
def compiled():
    # what the interpreter's variable makes of this process cannot be compiled
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench", "aot", "--quick", "--json"],
        env=env, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.triton
def test_kernels_fit(compiled):
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    rows = [Row(**row) for row in json.loads(compiled.stdout)]
    for arch in SHARED_LIMIT:
        found = [row for row in rows if row.arch == arch]
        assert {row.case for row in found} == set(cases(quick=True))
        assert all(row.registers > 0 for row in found)
        assert {row.kernel for row in found} >= {
            "block_sparse_attention", "join_splits", "merge_attention_states", "probe_profile",
            "choose", "list", "cluster_scores", "squeezed_attend",
        }  # fmt: skip


def test_the_committed_table_has_every_case():
    """Fails until `python -m bench aot` has run again after a case was added or taken away."""
    rows = json.loads((RESULTS / "aot.json").read_text())
    for arch in SHARED_LIMIT:
        assert {row["case"] for row in rows if row["arch"] == arch} == set(cases(quick=False))


def test_only_the_cases_asked_for_are_renewed():
    names = list(cases(quick=False))
    old = [Row(name, "sm_80", "x", 4, 2, 90, 0, 0, 1.0) for name in (names[7], "gone", names[2])]
    new = [Row(name, "sm_90", "x", 4, 2, 91, 0, 0, 1.0) for name in (names[5], names[2])]
    found = [(row.case, row.registers) for row in merged(new, old)]
    assert found == [(names[2], 91), (names[5], 91), (names[7], 90)]


def test_the_page_keeps_widths_apart():
    rows = [
        Row(f"{call} bf16 {d}", arch, kernel, 4, 2, registers, 0, d * 1024, 1.0)
        for arch in SHARED_LIMIT
        for call in ("backward", "backward, sink+window")
        for kernel in ("key_gradient", "attention_delta")
        for d, registers in ((64, 90), (128, 91))
    ]  # fmt: skip
    lines = compiled_table(rows).splitlines()
    assert lines[0].startswith("| backward bf16 | `attention_delta` | 91 / 0 / 128 KiB |")
    assert len(lines) == 5 and lines[2].startswith("| backward bf16 64 | `key_gradient` | 90 ")


def test_what_does_not_fit_is_named():
    row = Row("prefill", "sm_80", "attention", 4, 2, 255, SPILL_LIMIT, SHARED_LIMIT["sm_80"], 1.0)
    assert not over_limits([row])
    for change in ({"spilled": SPILL_LIMIT + 1}, {"shared": SHARED_LIMIT["sm_80"] + 1}):
        (message,) = over_limits([Row(**(vars(row) | change))])
        assert message.startswith("prefill, attention, sm_80: ")

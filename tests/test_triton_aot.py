"""Every kernel compiles for GPUs that are not here, within their registers and shared memory."""

import json
import os
import subprocess
import sys

import pytest

from bench.aot import SHARED_LIMIT, SPILL_LIMIT, Row, cases, over_limits


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
            "choose", "list",
        }  # fmt: skip


def test_what_does_not_fit_is_named():
    row = Row("prefill", "sm_80", "attention", 4, 2, 255, SPILL_LIMIT, SHARED_LIMIT["sm_80"], 1.0)
    assert not over_limits([row])
    for change in ({"spilled": SPILL_LIMIT + 1}, {"shared": SHARED_LIMIT["sm_80"] + 1}):
        (message,) = over_limits([Row(**(vars(row) | change))])
        assert message.startswith("prefill, attention, sm_80: ")

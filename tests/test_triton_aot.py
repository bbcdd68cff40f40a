"""Every kernel compiles for GPUs that are not here, within their registers and shared memory."""

import json
import os
import subprocess
import sys

import pytest

from bench.aot import SHARED_LIMIT

SPILL_BOUND = 128  # bytes per thread: a few values that live across the loops, none inside them


@pytest.fixture(scope="module")
def rows():
    # what the interpreter's variable makes of this process cannot be compiled
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "bench", "aot", "--quick", "--json"],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.triton
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_fit(rows, arch):
    found = [row for row in rows if row["arch"] == arch]
    assert len(found) >= 7
    spilled = {(r["case"], r["kernel"]): r["spilled"] for r in found if r["spilled"] > SPILL_BOUND}
    assert not spilled
    large = {r["case"]: r["shared"] for r in found if r["shared"] > SHARED_LIMIT[arch]}
    assert not large

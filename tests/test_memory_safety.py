"""The C++ operators touch nothing outside their tensors and write to none of their inputs.

What they write outside their results and scratch memory, `make sanitize` finds.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import ISAS

ROOT = Path(__file__).parent.parent


def survive(subject):
    """Runs tests/guard_pages.py; fails with the case that it died of."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.guard_pages", subject],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return done.stdout.split("\n")
    died = signal.Signals(-done.returncode).name if done.returncode < 0 else "an error"
    case = (done.stdout.split("\n")[-2:] or [""])[0]
    raise AssertionError(f"{subject}: {died} in the case\n  {case}\n{done.stderr[-2000:]}")


@pytest.mark.parametrize("isa", ISAS)
def test_operators_stay_in_their_tensors(isa):
    cases = survive(isa)
    for name in ("block_sparse_attention,", "block_sparse_attention in pages of",
                 "block_sparse_attention_backward", "flex_prefill_select", "flex_prefill_attention",
                 "hip_select", "hip_prune_select", "sale_quantize", "sale_estimate",
                 "sale_attention", "squeezed_lookup", "squeezed_attend",
                 "merge_attention_states"):  # fmt: skip
        assert any(case.startswith(name) for case in cases)


@pytest.mark.parametrize("fault", ["read past the end", "read before the start", "write an input"])
def test_the_guards_catch(fault):
    with pytest.raises(AssertionError, match=f"(SIGSEGV|SIGBUS) in the case\n  {fault}\n"):
        survive(fault)

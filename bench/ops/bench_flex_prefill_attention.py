"""Memory that a FlexPrefill call of 128k tokens needs beside its inputs."""

from __future__ import annotations

from sparse_attn.evaluate.memory import MEASURABLE

from ..harness import Report
from ..memory import DIM, HEADS, measure_elsewhere

TOKENS = 131072


def run(report: Report) -> None:
    if not MEASURABLE:
        print("skipped: the peak cannot be measured on this system")
        return
    for key_heads in (8, 2):
        report.add(
            f"peak extra memory / size of q + k + v, {HEADS}/{key_heads} x {TOKENS} x {DIM}",
            measure_elsewhere("flex_prefill_attention", TOKENS, key_heads),
            "< 2",
            dtype="bfloat16",
        )

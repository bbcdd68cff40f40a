"""What `import sparse_attn` costs beyond `import torch`, each time in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys

from ..harness import Report

CODE = """
import time, torch
start = time.perf_counter()
import sparse_attn
print(time.perf_counter() - start)
"""


def run(report: Report) -> None:
    seconds = [float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(5)]
    report.add("import sparse_attn, ms beyond torch", statistics.median(seconds) * 1e3, "<= 50")

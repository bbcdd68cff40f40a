"""What `import sparse_attn` costs beyond `import torch`, each time in a fresh interpreter."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from tempfile import TemporaryDirectory

from ..harness import Report

CODE = """
import time, torch
start = time.perf_counter()
import sparse_attn
print(time.perf_counter() - start)
"""


def run(report: Report) -> None:
    with TemporaryDirectory() as compiled:  # as after an installation: bytecode is written
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, "-c", CODE]
        output = [subprocess.check_output(command, env=environ) for _ in range(6)]
    seconds = [float(text) for text in output[1:]]
    report.add("import sparse_attn, ms beyond torch", statistics.median(seconds) * 1e3, "<= 50")

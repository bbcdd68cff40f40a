"""The device code as NVRTC takes it: one text, with no file of ours to include."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def csrc() -> Path:
    """The sources: in the package where it was installed, beside it in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.exists() else PACKAGE.parent / "csrc"


@cache
def assembled(op: str) -> str:
    """csrc/cuda/<op>.cuh with our own headers in place of their includes.

    CuPy caches what it has compiled by this text, the architecture and the options.
    """
    seen = set()

    def read(path: Path) -> str:
        path = path.resolve()
        if path in seen:
            return ""
        seen.add(path)

        def included(line: re.Match[str]) -> str:
            header = path.parent / line[1]
            return read(header) if header.exists() else line[0]

        text = path.read_text().replace("#pragma once\n", "")
        return re.sub(r'^#include "(.*)"$', included, text, flags=re.MULTILINE)

    return read(csrc() / "cuda" / f"{op}.cuh")


@cache
def include_options() -> tuple[str, ...]:
    """Where cuda_fp16.h is: in a toolkit, or in what came with torch; else CuPy's own search."""
    import torch

    packages = Path(torch.__file__).parents[1] / "nvidia"
    homes = [Path(h) for h in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if h]
    folders = [*homes, *sorted(packages.glob("cu[0-9]*")), packages / "cuda_runtime"]
    for folder in (*folders, Path("/usr/local/cuda")):
        if (folder / "include" / "cuda_fp16.h").exists():
            return (f"-I{folder / 'include'}",)
    return ()
